"""Which text a run is trained and evaluated on, through the program: a corpus is what its documents say, not
what its files are called, and what was trained on is never taken for held out."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from corpora import write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from train import cli
from train.data.holdout import digest, is_held_out
from train.data.tokenizer import load_tokenizer
from train.evaluate import evaluate_checkpoint
from train.run.loop import run

TEXTS = [f"document {n}: " + " ".join(f"word{n * k % 17}" for k in range(1, 12)) for n in range(12)]
SMALL = {
    "--steps": "2", "--batch-size": "4", "--data.tokenizer": "byte", "--model.vocab-size": "257",
    "--model.d-model": "16", "--model.d-ff": "32", "--model.num-layers": "1", "--model.num-heads": "2",
    "--model.num-kv-heads": "1", "--model.context-length": "16", "--optimizer.warmup-steps": "1",
    "--data.holdout": "0.4",
}  # fmt: skip
HELD_OUT = [text for text in TEXTS if is_held_out(digest(text), int(0.4 * 2**64))]


def train(workdir, *paths, **options):
    """Status of a small run; ``options`` are options with _ for . and -- in front."""
    given = {f"--{name.replace('__', '.').replace('_', '-')}": value for name, value in options.items()}
    words = ["--workdir", str(workdir), "--data.paths", *map(str, paths)]
    return cli.main(["train", *words, *itertools.chain(*(SMALL | given).items())])


def evaluation(capsys, workdir, *options):
    """The figures of ``evaluate`` and what it said."""
    capsys.readouterr()
    status = cli.main(["evaluate", "--checkpoint", str(workdir), "--json", "-", *map(str, options)])
    out, err = capsys.readouterr()
    return json.loads(out) if status == 0 else None, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of twelve documents in a directory that nobody writes to; named by a relative path."""
    directory = tmp_path_factory.mktemp("trained")
    write_jsonl(directory / "c.jsonl", TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert train("run", "./c.jsonl") == 0
    return directory


@pytest.fixture
def copy(trained, tmp_path):
    """Its directory in another place, which the checkpoints do not know of; the old one stays as it was."""
    return shutil.copytree(trained, tmp_path / "copy")


def windows(texts):
    return sum(len(text.encode()) + 1 for text in texts) // 16


def test_evaluation_from_any_directory(trained, tmp_path, monkeypatch, capsys):
    here, _ = evaluation(capsys, trained / "run")
    (tmp_path / "c.jsonl").write_text('{"text": "another text of the same name"}\n')
    monkeypatch.chdir(tmp_path)
    assert evaluation(capsys, trained / "run")[0] == here
    assert here["tokens"] == 16 * windows(HELD_OUT)
    assert here["notes"] == []


def test_a_corpus_that_moved_is_the_same_corpus(copy, capsys, trained):
    there, _ = evaluation(capsys, trained / "run")
    moved = (copy / "c.jsonl").rename(copy / "moved.ndjson")
    assert evaluation(capsys, copy / "run", "--data.paths", moved)[0] == there
    assert train(copy / "run", moved, steps="3") == 0
    assert "resuming after step 2 of 3" in capsys.readouterr().out


def test_documents_that_go_leave_no_trained_one_held_out(trained, tmp_path, capsys):
    assert len(HELD_OUT) > 3
    fewer = write_jsonl(tmp_path / "c.jsonl", [text for text in TEXTS if text not in HELD_OUT[:3]])
    figures, said = evaluation(capsys, trained / "run", "--data.paths", fewer)
    assert figures["tokens"] == 16 * windows(HELD_OUT[3:])
    assert "the corpus is not the one trained on: 9 documents with fingerprint" in said
    none = write_jsonl(tmp_path / "none.jsonl", [text for text in TEXTS if text not in HELD_OUT])
    figures, said = evaluation(capsys, trained / "run", "--data.paths", none)
    assert figures is None
    assert "the held-out documents must hold at least 17 tokens, one window of the context; found 0" in said


def test_text_that_training_never_had_can_be_evaluated_whole(trained, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [text[::-1] for text in TEXTS])
    figures, said = evaluation(capsys, trained / "run", "--data.paths", other, "--data.every-document")
    assert figures["tokens"] == 16 * windows(TEXTS)
    assert "evaluated on every document" in said


def test_another_corpus_is_refused_on_resume_unless_asked_for(copy, tmp_path, capsys):
    changed = write_jsonl(tmp_path / "c.jsonl", [*TEXTS[:-1], "another end of the same corpus"])
    assert train(copy / "run", changed, steps="3") == 1
    said = capsys.readouterr().err
    assert "was trained on another corpus: 12 documents with fingerprint" in said
    assert "--data.accept-change" in said
    words = ["--workdir", str(copy / "run"), "--data.paths", str(changed), "--data.accept-change"]
    assert cli.main(["train", *words, *itertools.chain(*(SMALL | {"--steps": "3"}).items())]) == 0


def test_a_run_on_token_shards(copy, tmp_path, capsys, trained):
    """Shards of the same documents are the same corpus; a lost or damaged one is one sentence."""
    shards = tmp_path / "shards"
    words = ["--out", str(shards), "--data.paths", str(copy / "c.jsonl"), "--data.holdout", "0.4"]
    assert cli.main(["tokenize", *words, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert f"12 documents, {sum(map(len, set(TEXTS) - set(HELD_OUT))) + 12 - len(HELD_OUT):,} tokens" in out
    assert f"train --data.paths {shards}" in out
    assert train(copy / "run", shards, steps="3") == 0
    assert "resuming after step 2 of 3" in capsys.readouterr().out
    there, _ = evaluation(capsys, trained / "run")
    assert evaluation(capsys, trained / "run", "--data.paths", shards)[0] == there
    assert cli.main(["tokenize", *words]) == 0
    assert "was finished before: 12 documents" in capsys.readouterr().out

    file = shards / "train-00000.tokens"
    data = file.read_bytes()
    file.write_bytes(b"\1\0" + data[2:])
    assert train(copy / "run", shards, steps="4") == 1
    assert (
        "train-00000.tokens must be whole; found that values 0 and after are not" in capsys.readouterr().err
    )
    file.unlink()
    assert train(copy / "run", shards, steps="4") == 1
    err = capsys.readouterr().err
    assert "train-00000.tokens must be whole; found that it cannot be read (No such file or directory)" in err


def test_a_mixture(tmp_path, capsys):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [f"{n} {text}" for text in TEXTS]) for n in range(2)]
    words = ["--data.paths", *map(str, paths), "--data.weights", "3", "1", "--workdir", str(tmp_path / "run")]
    assert cli.main(["train", *words, *itertools.chain(*SMALL.items())]) == 0
    said = capsys.readouterr().out
    figures, _ = evaluation(capsys, tmp_path / "run")
    assert f"{figures['tokens']} held-out tokens: CE {figures['ce']:.4f}" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--out {tmp}/o --data.tokenizer bpe", "--data.tokenizer bpe needs --vocab-size; got none"),
        (
            "--out {tmp}/o --vocab-size 300",
            "--vocab-size is for --data.tokenizer bpe; got byte: leave it out",
        ),
        ("--out {tmp}/o --processes 0", "--processes must be at least 1; got 0"),
        ("--out {tmp}/o --data.holdout 2", "data.holdout must lie between 0 and 1; got 2.0"),
        ("", "tokenize needs --out; got none"),
        ("--out {tmp}/o --data.paths {shards}", "holds token shards: leave it out"),
        ("--out {tmp}/o --data.paths {tmp}/none", "there is no file"),
        ("--out {tmp}/o --data.tokenizer bpe --vocab-size 9", "a vocabulary of at least 257"),
        ("--out {tmp}/file", "--out must be a directory that can be made and written to; "),
        ("--out {tmp}", "must be an empty directory, or one of token shards that were begun; found file"),
    ],
)
def test_mistakes_of_tokenize(tmp_path, tmp_path_factory, capsys, options, sentence):
    (tmp_path / "file").touch()
    shards = tmp_path_factory.mktemp("shards")
    (shards / "index.json").touch()
    words = options.format(tmp=tmp_path, shards=shards).split()
    assert cli.main(["tokenize", *words]) in (1, 2)
    assert sentence in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]


# --- Tokenizers ---------------------------------------------------------------------------------------------


def word_tokenizer(path: Path, model) -> Path:
    rust = Tokenizer(model)
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    rust.add_special_tokens(["</s>"])
    rust.save(str(path))
    return path


def copy_trained_with(tokenizer: Path, finished, tmp_path: Path) -> Path:
    """A copy of a run that says it was trained with another tokenizer."""
    run_copy = shutil.copytree(finished.workdir, tmp_path / "copy")
    checkpoint = run_copy / "checkpoints" / "8"
    shutil.copy(tokenizer, checkpoint / "tokenizer" / "tokenizer.json")
    saved = json.loads((checkpoint / "run" / "metadata").read_text())
    saved["tokenizer"] = load_tokenizer(checkpoint / "tokenizer").fingerprint
    (checkpoint / "run" / "metadata").write_text(json.dumps(saved))
    return run_copy


def test_prompt_and_continuation_are_one_text(finished, tmp_path, monkeypatch, capsys):
    words = ["<unk>", "▁ship", "▁harbour", "▁lamp", "▁wind"]
    model = models.Unigram([(word, -1.0) for word in words], 0, False)
    path = word_tokenizer(tmp_path / "tokenizer.json", model)
    run_copy = copy_trained_with(path, finished, tmp_path)
    steps = {1: [[4], [1]], 2: [[4, 2], [1, None]]}
    monkeypatch.setattr("sparse_lm.generate.stream", lambda model, prompts, **_: iter(steps[len(prompts)]))
    prompts = ["--prompt", "ship harbour lamp"]
    assert cli.main(["generate", "--checkpoint", str(run_copy), *prompts]) == 0
    assert capsys.readouterr().out == "ship harbour lamp wind ship\n"
    assert cli.main(["generate", "--checkpoint", str(run_copy), *prompts, "--prompt", "ship"]) == 0
    assert capsys.readouterr().out == "[1/2] ship harbour lamp wind ship\n[2/2] ship harbour\n"


def test_text_outside_a_vocabulary_names_the_document(finished, tmp_path, capsys):
    path = word_tokenizer(tmp_path / "words.json", models.WordLevel({"▁known": 0}))
    corpus = write_jsonl(tmp_path / "c.jsonl", ["known", "known alien", "known known"])
    assert train(tmp_path / "run", corpus, data__tokenizer=str(path)) == 1
    said = capsys.readouterr().err
    assert f"{corpus}, line 2: the tokenizer {path} has no tokens for some of the text" in said
    assert said.count("\n") == 1
    run_copy = copy_trained_with(path, finished, tmp_path)
    assert cli.main(["generate", "--checkpoint", str(run_copy), "--prompt", "alien"]) == 1
    assert "--prompt 1: the tokenizer" in capsys.readouterr().err


def test_dropout_of_a_tokenizer_is_switched_off_and_said(tmp_path, capsys):
    content = json.loads(Tokenizer(models.BPE()).to_str())
    letters = sorted(set("".join(TEXTS)) | {"</s>"})
    pairs = ["wo", "rd", "word"]
    content["model"] |= {
        "vocab": {piece: i for i, piece in enumerate([*letters, *pairs])},
        "merges": [["w", "o"], ["r", "d"], ["wo", "rd"]],
        "dropout": 0.5,
    }
    (tmp_path / "t.json").write_text(json.dumps(content))
    corpus = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    assert train(tmp_path / "run", corpus, data__tokenizer=str(tmp_path / "t.json")) == 0
    assert "t.json has a BPE dropout of 0.5: it is switched off" in capsys.readouterr().out
    first, _ = evaluation(capsys, tmp_path / "run")
    assert evaluation(capsys, tmp_path / "run")[0] == first


# --- Batches and processes ----------------------------------------------------------------------------------


def test_the_same_heldout_text_for_every_batch_shape(finished, corpus, tmp_path):
    """Of 128 tokens asked for; the run that is compared with has two micro-batches of 4 rows on 4 devices."""
    optimizer = dataclasses.replace(tiny_runs.OPTIMIZER, accumulation=1)
    report = dataclasses.replace(finished.config.report, evaluate_tokens=7 * 16)
    other = {}
    for accumulation in (1, 2):
        optimizer = dataclasses.replace(tiny_runs.OPTIMIZER, accumulation=accumulation)
        config = tiny_runs.tiny_config(
            corpus, tmp_path / f"run-{accumulation}", optimizer=optimizer, report=report
        )
        other[accumulation] = run(dataclasses.replace(config, steps=1)).evaluation
    assert other[1].tokens == other[2].tokens == 7 * 16
    for name in ("ce", "unigram_entropy", "bits_per_byte", "l0_per_layer"):
        np.testing.assert_allclose(getattr(other[1], name), getattr(other[2], name), rtol=1e-4, err_msg=name)
    assert other[1].max_nnz_per_layer == other[2].max_nnz_per_layer
    alone = evaluate_checkpoint(tmp_path / "run-2")  # on one device
    assert alone.tokens == other[2].tokens
    for name in ("ce", "unigram_entropy", "bits_per_byte", "l0_per_layer"):
        np.testing.assert_allclose(getattr(alone, name), getattr(other[2], name), rtol=1e-4, err_msg=name)


def test_the_batch_size_of_an_evaluation_changes_no_figure(trained, capsys):
    expected, _ = evaluation(capsys, trained / "run", "--tokens", 100)
    assert expected["tokens"] == 96
    for size in (1, 4, 5):
        figures, _ = evaluation(capsys, trained / "run", "--tokens", 100, "--batch-size", size)
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, rel=1e-5), name
