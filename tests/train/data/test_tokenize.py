"""Shards hold the documents' tokens, the same ones however often the making of them was interrupted."""

import json
import shutil

import numpy as np
import pytest
from corpora import TEXTS, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from train.data import shard_writer
from train.data import tokenize as module
from train.data.documents import find_sources
from train.data.holdout import choose_threshold, digest, is_held_out
from train.data.lock import locked
from train.data.shards import TokenShards
from train.data.tokenize import tokenize
from train.data.tokenizer import ByteTokenizer, HFTokenizer, fit_bpe
from train.errors import UserError

THRESHOLD = choose_threshold(TEXTS, 0.3)


@pytest.fixture(autouse=True)
def small_chunks_and_shards(monkeypatch):
    """Seven chunks, three files of training documents."""
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 150)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 300)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def make(path, out, tokenizer=None, **options):
    settings = {"text_field": "text", "holdout": 0.3, "threshold": THRESHOLD} | options
    return tokenize(find_sources([str(path)]), tokenizer or ByteTokenizer(), out, **settings)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_CHARACTERS", 150)
        patch.setattr(shard_writer, "SHARD_TOKENS", 300)
        out = tmp_path_factory.mktemp("whole") / "shards"
        make(path, out)
    return out


def test_shards_hold_every_document_on_its_side(whole):
    shards = TokenShards(whole)
    assert len(list(whole.glob("train-*.tokens"))) == 3
    for held_out, values in ((False, shards.train), (True, shards.heldout)):
        expected = [
            i
            for text in TEXTS
            if is_held_out(digest(text), THRESHOLD) == held_out
            for i in (*text.encode(), 256)
        ]
        assert values.read(0, len(values)).tolist() == expected
    ids = shards.heldout.read(0, len(shards.heldout))
    assert shards.heldout_sizes.read(0, len(ids)).tolist() == (ids != 256).tolist()
    assert shards.index.documents == 40
    assert shards.index.text_bytes == sum(map(len, TEXTS))
    assert shards.index.tokens + shards.index.heldout_tokens == shards.index.text_bytes + 40


def test_sizes_of_any_tokenizer_sum_to_the_text(tmp_path):
    texts = [f"{n} naïve café — ☃ 東京 🦊 \n" for n in range(40)]
    path = write_jsonl(tmp_path / "c.jsonl", texts)
    tokenizer = fit_bpe(texts, 270)
    index = make(path, tmp_path / "out", tokenizer)
    shards = TokenShards(tmp_path / "out")
    held_out = [text for text in texts if is_held_out(digest(text), THRESHOLD)]
    assert shards.heldout_sizes.read(0, index.heldout_tokens).sum() == sum(len(t.encode()) for t in held_out)
    assert index.dtype == "uint16"
    ids = shards.train.read(0, index.tokens)
    pieces = [
        tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]
    ]
    assert pieces == [text for text in texts if text not in held_out]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("chunks", [1, 4, 6])
def test_an_interrupted_making_goes_on_and_ends_the_same(path, whole, tmp_path, chunks):
    out = tmp_path / "shards"
    told = []

    def interrupt(read, total, tokens):
        told.append(tokens)
        if len(told) == chunks:
            raise Interrupted

    with pytest.raises(Interrupted):
        make(path, out, on_progress=interrupt)
    after = []
    make(path, out, on_progress=lambda read, total, tokens: after.append((read, total, tokens)))
    assert len(after) == 7 - chunks
    assert after[-1] == (path.stat().st_size, path.stat().st_size, sum(map(len, TEXTS)) + 40)
    assert contents(out) == contents(whole)


def begun(path, out, chunks=5):
    def interrupt(*_):
        if len((out / shard_writer.LOG).read_text().splitlines()) > chunks:
            raise Interrupted

    with pytest.raises(Interrupted):
        make(path, out, on_progress=interrupt)


# What a process that is killed, or a machine that loses power, leaves behind.
DAMAGES = {
    "a line cut off": lambda out: append(out / "progress.jsonl", b'{"digest": "12'),
    "tokens beyond the log": lambda out: append(out / "train-00001.tokens", bytes(77)),
    "a file beyond the log": lambda out: (out / "train-00007.tokens").write_bytes(bytes(8)),
    "a file cut short": lambda out: cut(out / "heldout-00000.tokens", 50),
    "a hole": lambda out: zero(out / "train-00000.tokens"),
    "a lost file": lambda out: (out / "heldout-00000.sizes").unlink(),
    "a lost log": lambda out: (out / "progress.jsonl").write_bytes(b""),
    "checksums begun": lambda out: append(out / "train-00000.tokens", bytes(4)),
}


def append(file, data):
    file.write_bytes(file.read_bytes() + data)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def zero(file):
    file.write_bytes(file.read_bytes()[:100] + bytes(file.stat().st_size - 100))


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_kill_leaves_behind_is_made_good(path, whole, tmp_path, damage):
    out = tmp_path / "shards"
    begun(path, out)
    DAMAGES[damage](out)
    make(path, out)
    assert contents(out) == contents(whole)


def test_other_documents_are_not_added_to_what_was_begun(path, tmp_path):
    begun(path, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    changed = write_jsonl(tmp_path / "changed.jsonl", ["other", *TEXTS[1:]])
    with pytest.raises(UserError, match="was begun from other documents, or in another order"):
        make(changed, tmp_path / "shards")
    assert contents(tmp_path / "shards") == before


@pytest.mark.parametrize("change", [{"tokenizer": fit_bpe(TEXTS, 260)}, {"threshold": THRESHOLD // 2}])
def test_other_options_are_refused(path, tmp_path, change):
    begun(path, tmp_path / "shards")
    with pytest.raises(UserError, match="was begun with another tokenizer or other options"):
        make(path, tmp_path / "shards", **change)


def test_a_directory_of_something_else_is_left_alone(path, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(
        UserError, match=r"must be an empty directory.*found corpus|found letter\.txt: choose another"
    ):
        make(path, tmp_path)
    assert contents(tmp_path) == {"letter.txt": b"dear"}


def test_two_writers_are_not_let_in(path, tmp_path):
    with (
        locked(tmp_path / "shards", wait=False),
        pytest.raises(UserError, match="is being written by another"),
    ):
        make(path, tmp_path / "shards")


def test_who_waited_takes_what_the_other_made(whole, path, tmp_path):
    out = shutil.copytree(whole, tmp_path / "shards")
    before = contents(out)
    assert make(path, out, wait=True) == TokenShards(whole).index
    assert contents(out) == before


@pytest.mark.timeout(120)
def test_processes_make_the_same_shards(path, whole, tmp_path):
    make(path, tmp_path / "shards", processes=2)
    assert contents(tmp_path / "shards") == contents(whole)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_text_without_tokens_is_named(tmp_path, held_out):
    """A tokenizer without bytes and without an unknown token."""
    rust = Tokenizer(models.WordLevel({"known": 0, "</s>": 1}))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = HFTokenizer(json.loads(rust.to_str()), source="words.json")
    path = write_jsonl(tmp_path / "c.jsonl", ["known", "known known", "alien"])
    threshold = (1 << 64) - 1 if held_out else 1
    with pytest.raises(
        UserError, match=r"c\.jsonl, line 3: the tokenizer words\.json has no tokens for some"
    ):
        make(path, tmp_path / "out", tokenizer, threshold=threshold)


def test_a_corpus_of_empty_documents(tmp_path):
    with pytest.raises(UserError, match="found only empty ones"):
        make(write_jsonl(tmp_path / "c.jsonl", ["", ""]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
