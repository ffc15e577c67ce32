"""``sparse-lm convert``: a published directory to a model that generates, a trained run to a directory."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import tiny_config
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from sparse_lm.convert import load_model, open_hf
from train.cli import main
from train.data.tokenizer import ByteTokenizer
from train.errors import UserError
from train.evaluate import evaluate_checkpoint
from train.run import convert, loop
from train.run.checkpoint_reading import load_for_inference

GOLDENS = Path(__file__).parents[2] / "sparse_lm" / "convert" / "goldens"
WORDS = [f"w{number}" for number in range(39)]
TOKENS = load_file(GOLDENS / "llama" / "expected.safetensors")["tokens"][0, :8].tolist()
FIRST = TOKENS[0]  # the publisher puts it before every text


def write_tokenizer(directory: Path, words=WORDS) -> None:
    rust = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[0]))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.add_special_tokens([AddedToken("</s>", special=True)])
    rust.post_processor = TemplateProcessing(
        single=f"w{FIRST} $A </s>", special_tokens=[(f"w{FIRST}", FIRST), ("</s>", len(words))]
    )
    rust.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "chat_template": "{{ messages }}"}'
    )


@pytest.fixture
def published(tmp_path):
    """A published model with a tokenizer of its own vocabulary of 40."""
    directory = Path(shutil.copytree(GOLDENS / "llama", tmp_path / "published"))
    write_tokenizer(directory)
    return directory


def test_a_published_model_generates_and_goes_back(published, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", "--source", str(published), "--out", str(ours), "--dtype", "float32"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("llama: 2 layers, d_model 32, d_ff 32, relu, 17.1k parameters\n")
    assert f"sparse-lm generate --checkpoint {ours}" in output

    expected = load_file(published / "expected.safetensors")
    prompt = " ".join(WORDS[token] for token in TOKENS[1:])
    arguments = ["--prompt", prompt, "--temperature", "0", "--max-new-tokens", "4"]
    assert main(["generate", "--checkpoint", str(ours), *arguments]) == 0
    words = " ".join(WORDS[token] for token in expected["greedy"][0, :4])
    assert words in capsys.readouterr().out

    assert main(["convert", "--source", str(ours), "--out", str(back), "--to", "hf"]) == 0
    first, second = (load_file(path / "model.safetensors") for path in (published, back))
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 39
    tokenizer = Tokenizer.from_file(str(back / "tokenizer.json"))
    assert tokenizer.encode("w3 w5 </s>").ids == [FIRST, 3, 5, 39, 39]
    assert "chat_template" in json.loads((back / "tokenizer_config.json").read_text())


def test_a_trained_run_goes_out_and_comes_back(finished, tmp_path):
    """The exported directory holds the run's own weights, in f32, and reads text as the run did."""
    out = tmp_path / "out"
    made = convert.to_hf(str(finished.workdir), out)
    assert made.model_type == "llama"
    assert made.notes == ()
    model, _, config, _ = load_for_inference(finished.workdir)
    with open_hf(out) as weights:
        assert weights.config.d_ff == config.model.d_ff
        again = load_model(weights)
    tokens = np.arange(32).reshape(2, 16)
    np.testing.assert_array_equal(jax.jit(again)(tokens)[0], jax.jit(model)(tokens)[0])

    text = "the sum 🙂 of\n\n our ½ hopes"
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode(text).ids == ByteTokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|endoftext|>").ids == [256]
    assert convert.from_hf(str(out), tmp_path / "in").config == weights.config


@pytest.mark.filterwarnings("ignore")  # of transformers, whose version is the user's
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_transformers_reads_an_exported_tokenizer(finished, published, tmp_path):
    from transformers import AutoTokenizer

    convert.to_hf(str(finished.workdir), tmp_path / "bytes")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bytes")
    text = "the sum 🙂 of\n\n our ½ hopes"
    assert tokenizer.encode(text) == ByteTokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 256

    convert.from_hf(str(published), tmp_path / "ours")
    convert.to_hf(str(tmp_path / "ours"), tmp_path / "words")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "words")
    assert tokenizer.encode("w3 w5") == [FIRST, 3, 5, 39]
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_model_without_a_class_in_transformers_says_so(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    config |= {"model_type": "bamboo", "sliding_window": 16}
    (published / "config.json").write_text(json.dumps(config))
    made = convert.from_hf(str(published), tmp_path / "ours")
    assert "slides over 16 tokens" in made.notes[0]
    assert made.config.activation == "drelu"
    exported = convert.to_hf(str(tmp_path / "ours"), tmp_path / "back")
    assert "put the modelling code of its publisher beside it" in exported.notes[0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda directory: (directory / "tokenizer.json").unlink(), "must hold tokenizer.json"),
        (lambda directory: write_tokenizer(directory, [f"w{n}" for n in range(41)]), "another model's"),
        (lambda directory: (directory / "config.json").write_text("{}"), "must have a model_type"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing_behind(published, tmp_path, capsys, spoil, said):
    spoil(published)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", "--source", str(published), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_leaves_nothing_behind(published, tmp_path, monkeypatch):
    def full(weights, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.run.converted.write_own", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        convert.from_hf(str(published), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_exists_is_left_alone(published, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="must be a new directory"):
        convert.from_hf(str(published), tmp_path / "out")
    with pytest.raises(UserError, match="must be a new directory"):
        convert.to_hf(str(converted(published, tmp_path)), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def converted(published, tmp_path):
    return convert.from_hf(str(published), tmp_path / "ours").out


def test_a_converted_model_whose_weights_were_exchanged(published, tmp_path):
    ours = converted(published, tmp_path)
    shutil.copyfile(published / "model.safetensors", next((ours / "params").glob("*.safetensors")))
    with pytest.raises(UserError, match="must hold"):
        load_for_inference(ours)


def test_no_run_begins_in_a_converted_model(published, tmp_path, corpus):
    """Or `evaluate` would not know which of the two is meant."""
    ours = converted(published, tmp_path)
    before = sorted(ours.iterdir())
    with pytest.raises(UserError, match="holds a converted model: choose another with --workdir"):
        loop.run(tiny_config(corpus, ours))
    assert sorted(ours.iterdir()) == before


def test_a_converted_model_is_measured_on_text(published, tmp_path):
    report = evaluate_checkpoint(converted(published, tmp_path), tokens=64, batch_size=2)
    assert report.step == 0
    assert report.tokens == 2 * 32
    assert "what a converted model was trained on is not known" in report.notes[0]


def test_dtype_is_refused_for_an_export(capsys):
    assert main(["convert", "--source", "a", "--out", "b", "--to", "hf", "--dtype", "float32"]) == 2
    assert "--dtype is for --to sparse-lm" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["nowhere", "./no/where"])
def test_no_such_source(source, tmp_path):
    with pytest.raises(UserError, match="must be a directory"):
        convert.from_hf(source, tmp_path / "out")


def test_a_name_is_asked_of_the_hub(published, tmp_path, monkeypatch):
    """Only weights, configuration and tokenizer are fetched, no pickle and no code."""
    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(published)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert.from_hf("someone/model", tmp_path / "out")
    assert asked == {"someone/model": ["*.safetensors", "*.json", "*.jinja"]}

    def fail(name, **_):
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"the hub cannot give it: no network$"):
        convert.from_hf("someone/model", tmp_path / "again")
