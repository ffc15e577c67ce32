"""``sparse-lm chat``: replies are those of the whole conversation, whatever the cache kept of it."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from sparse_lm import decoding
from sparse_lm.conversation import Conversation
from sparse_lm.generate import GREEDY, Sampling, generate
from train import cli
from train.run import convert
from train.run.chat_template import ChatTemplate
from train.run.checkpoint_reading import load_for_inference

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "sparse_lm" / "convert" / "goldens" / "llama"
CONTROLS = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "</s>"]
WORDS = [f"w{number}" for number in range(40 - len(CONTROLS))]
ID = {word: at for at, word in enumerate([*WORDS, *CONTROLS])}
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.content == 'w13' %}{{ raise_exception('w13 brings bad luck') }}{% endif %}
<|{{ message.role }}|> {{ message.content }}
    {%- if message.role != 'user' %} {{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
LIMIT = 32


def write_model(directory: Path, **config) -> Path:
    """A published model of 40 tokens with a context of 32, and a chat template."""
    shutil.copytree(GOLDEN, directory)
    rust = Tokenizer(models.WordLevel({word: ID[word] for word in WORDS}, unk_token="w0"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.add_special_tokens([AddedToken(name, special=True) for name in CONTROLS])
    rust.save(str(directory / "tokenizer.json"))
    given = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(given))
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    source = write_model(directory / "published")
    return convert.from_hf(str(source), directory / "ours", dtype="float32").out


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_for_inference(checkpoint)[0]


@pytest.fixture
def chat(checkpoint, capsys, monkeypatch):
    """What a chat prints for some typed lines: replies on stdout, notes on stderr."""

    def run(*lines, options=(), checkpoint=checkpoint, status=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert cli.main(["chat", "--checkpoint", str(checkpoint), *options]) == status
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


def rendered(*turns, system=None):
    """Ids of a conversation, written by hand: messages and replies in turn."""
    ids = [ID["<s>"]]
    if system is not None:
        ids += [ID["<|system|>"], *(ID[word] for word in system.split()), ID["</s>"]]
    for number, turn in enumerate(turns):
        words = [ID[word] for word in turn.split()]
        ids += [ID["<|assistant|>"], *words, ID["</s>"]] if number % 2 else [ID["<|user|>"], *words]
    return [*ids, ID["<|assistant|>"]]


def replies(model, *messages, system=None, new_tokens=4, eos="</s>", **asked):
    """Each reply, the model reading the whole conversation anew."""
    turns = []
    for message in messages:
        prompt = rendered(*turns, message, system=system)
        new = generate(model, [prompt], max_new_tokens=new_tokens, eos_id=ID[eos], **asked)[0]
        words = [word for word in ([*WORDS, *CONTROLS][token] for token in new) if word not in CONTROLS]
        turns += [message, " ".join(words)]
    return turns[1::2]


GREEDY_OPTIONS = ["--temperature", "0", "--max-new-tokens", "4"]


@pytest.mark.parametrize("speculate", ["0", "3"])
def test_replies_are_those_of_the_whole_conversation(chat, model, monkeypatch, speculate):
    """Of each turn only what is new is read: the end of the last reply, the message, the template's words."""
    read = []
    original = Conversation._reply

    def watched(self, *arguments):
        yield from original(self, *arguments)
        read.append(self.read)

    monkeypatch.setattr(Conversation, "_reply", watched)
    out, err = chat("w3 w5", "", "w8", "w9", options=[*GREEDY_OPTIONS, "--speculate", speculate])
    assert [line.strip() for line in out] == replies(model, "w3 w5", "w8", "w9", sampling=GREEDY)
    assert err == ""
    assert len(read) == 3
    assert max(read[1:]) <= 6


def test_draws_follow_the_seed_and_the_system_is_heard(chat, model):
    options = ["--temperature", "2", "--top-p", "1", "--max-new-tokens", "4", "--system", "w30 w31"]
    first, _ = chat("w3", "w4", options=[*options, "--seed", "5"])
    expected = replies(model, "w3", "w4", system="w30 w31", sampling=Sampling(2.0), seed=5)
    assert [line.strip() for line in first] == expected
    assert chat("w3", "w4", options=[*options, "--seed", "6"])[0] != first


def test_what_ends_a_reply(chat, model, checkpoint, tmp_path):
    """The publisher's tokens, the user's strings."""
    (whole,) = replies(model, "w3 w5", sampling=GREEDY, new_tokens=8)
    first, second, *_ = whole.split()
    options = ["--temperature", "0", "--max-new-tokens", "8"]
    stopped, _ = chat("w3 w5", options=[*options, "--stop", second])
    assert [line.strip() for line in stopped] == [first]

    ours = shutil.copytree(checkpoint, tmp_path / "ours")
    (ours / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [39, ID[second]]}))
    stopped, _ = chat("w3 w5", options=options, checkpoint=ours)
    assert [line.strip() for line in stopped] == [first]


def test_ctrl_c_ends_a_reply_and_not_the_chat(chat, model, monkeypatch):
    decode_block = decoding.decode_block
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode_block(*arguments)

    monkeypatch.setattr("sparse_lm.decoding.decode_block", interrupted)
    out, _ = chat("w3 w5", "w8", "w9", options=GREEDY_OPTIONS)
    first, second, third = (line.strip() for line in out)
    assert first == replies(model, "w3 w5", sampling=GREEDY)[0]
    assert second == replies(model, "w3 w5", "w8", sampling=GREEDY)[1].split()[0]
    prompt = rendered("w3 w5", first, "w8", second, "w9")
    assert third.split() == [WORDS[token] for token in generate(model, [prompt], max_new_tokens=4)[0]]


def test_ctrl_c_before_a_reply_forgets_the_message(chat, model, monkeypatch):
    render, calls = ChatTemplate.render, []

    def interrupted(self, messages):
        calls.append(messages)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return render(self, messages)

    monkeypatch.setattr(ChatTemplate, "render", interrupted)
    out, _ = chat("w8", "w3 w5", options=GREEDY_OPTIONS)
    assert [line.strip() for line in out] == ["", *replies(model, "w3 w5", sampling=GREEDY)]


def test_a_conversation_outgrows_the_context(chat, model):
    """The oldest turn goes, the system's word stays, and a message that is too long is forgotten."""
    long = " ".join(["w7"] * 20)
    options = [*GREEDY_OPTIONS, "--system", "w30"]
    out, err = chat("w3 w4 w5 w6", " ".join(["w7"] * 30), long, options=options)
    notes = err.splitlines()
    assert notes == [
        "sparse-lm: a message must leave room for a reply of 4 tokens in the model's context of 32; got one "
        "of 36 with the template: shorten it",
        "sparse-lm: the model's context has 32 tokens: the oldest 1 of 2 turns are left out from here on",
    ]
    first = replies(model, "w3 w4 w5 w6", system="w30", sampling=GREEDY)[0]
    last = replies(model, long, system="w30", sampling=GREEDY)[0]
    assert [line.strip() for line in out] == [first, last]


def test_a_message_that_the_template_refuses_is_forgotten(chat, model):
    out, err = chat("w13", "w3", options=GREEDY_OPTIONS)
    assert [line.strip() for line in out] == replies(model, "w3", sampling=GREEDY)
    assert "does not take this conversation; it says: w13 brings bad luck" in err
    assert err.count("\n") == 1


def test_a_model_without_a_template_is_refused_in_one_sentence(chat, checkpoint, tmp_path):
    ours = shutil.copytree(checkpoint, tmp_path / "ours")
    (ours / "tokenizer" / "tokenizer_config.json").unlink()
    _, err = chat(checkpoint=ours, status=1)
    assert err.startswith("sparse-lm: chat needs a model with a chat template; found none in ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said", "status"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1; got 0", 2),
        (
            ["--max-new-tokens", "32"],
            "must leave room for messages in the model's context of 32 tokens",
            1,
        ),
        (["--seed", "-1"], "--seed must be at least 0", 2),
        (["--speculate", "16"], "--speculate must be from 0 to 15", 2),
    ],
)
def test_values_out_of_range_are_one_sentence(chat, options, said, status):
    _, err = chat("w3", options=options, status=status)
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_at_a_terminal(checkpoint):
    """Ctrl-C at the prompt drops the line, Ctrl-D ends the chat."""
    import pty

    ours, theirs = pty.openpty()
    with programs.signals_of_a_terminal():
        process = subprocess.Popen(
            [sys.executable, "-m", "train", "chat", "--checkpoint", str(checkpoint), *GREEDY_OPTIONS],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TERM": "dumb"},
        )
    os.close(theirs)
    seen = ""

    def wait_for(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 4096).decode()
        seen = seen.partition(text)[2]

    def interrupt():
        """Until something answers: a signal between the prompt and the read behind it waits for the next."""
        process.send_signal(signal.SIGINT)
        while not select.select([ours], [], [], 2)[0]:
            process.send_signal(signal.SIGINT)

    try:
        wait_for("Ctrl-D the chat.")
        wait_for("> ")
        os.write(ours, b"w3 w")
        wait_for("w3 w")
        interrupt()
        wait_for("> ")
        os.write(ours, b"w3 w5\n")
        wait_for("> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
