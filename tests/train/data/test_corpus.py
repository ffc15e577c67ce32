"""The same content is the same corpus, in whatever files it comes; text is tokenized once."""

import gzip
import json
import os

import numpy as np
import pytest
from corpora import TEXTS, of_files, write_jsonl

from train.data import corpus as module
from train.data.corpus import choose_tokenizer, fit_tokenizer, open_corpus
from train.data.documents import find_sources
from train.data.evaluation_text import read_evaluation_text
from train.data.tokenize import tokenize
from train.data.tokenizer import ByteTokenizer, fit_bpe
from train.errors import UserError

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def opened(config, cache, **options):
    return open_corpus(config, BYTES, cache, **options)


def all_of(values):
    return values.read(0, len(values)).tolist()


def shards_of(path, out, holdout=0.05, tokenizer=BYTES):
    config = of_files(path, holdout=holdout)
    threshold = module.choose_split(config, find_sources(config.paths))
    tokenize(
        find_sources(config.paths), tokenizer, out, text_field="text", holdout=holdout, threshold=threshold
    )
    return out


def test_the_same_content_is_the_same_corpus(path, tmp_path):
    expected = opened(of_files(path), tmp_path / "cache")
    (tmp_path / "moved.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    halves = [write_jsonl(tmp_path / "a.ndjson", TEXTS[:17]), write_jsonl(tmp_path / "b.json", TEXTS[17:])]
    shards = shards_of(path, tmp_path / "shards")
    for config in (of_files(tmp_path / "moved.jsonl.gz"), of_files(*halves), of_files(shards)):
        found = opened(config, tmp_path / "cache")
        assert found.identity == expected.identity
        assert all_of(found.streams[0].train) == all_of(expected.streams[0].train)
        assert all_of(found.heldout[0].ids) == all_of(expected.heldout[0].ids)


@pytest.mark.parametrize(
    "texts", [TEXTS[:-1], [*TEXTS, "more"], TEXTS[::-1], [*TEXTS[:-1], TEXTS[-1] + " "]],
    ids=["one less", "one more", "reversed", "a space"],
)  # fmt: skip
def test_other_content_is_another_corpus(path, tmp_path, texts):
    other = opened(of_files(write_jsonl(tmp_path / "c.jsonl", texts)), tmp_path / "cache").identity
    assert other.fingerprint != opened(of_files(path), tmp_path / "cache").identity.fingerprint
    assert other.threshold == opened(of_files(path), tmp_path / "cache").identity.threshold


def test_text_is_tokenized_once(path, tmp_path, monkeypatch):
    said = []
    first = opened(of_files(path), tmp_path, say=said.append)
    monkeypatch.setattr(module, "read_documents", None)
    monkeypatch.setattr(module, "tokenize", None)
    again = opened(of_files(path), tmp_path, say=said.append)
    assert again.identity == first.identity
    assert [sentence.startswith("tokenizing the corpus, once") for sentence in said] == [True]


def test_a_changed_file_is_tokenized_again(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl")
    first = opened(of_files(path), tmp_path / "cache").identity
    write_jsonl(path, TEXTS[:-1])
    assert opened(of_files(path), tmp_path / "cache").identity.documents == first.documents - 1


def test_a_tokenizer_is_fitted_once_on_the_training_documents(tmp_path, monkeypatch):
    texts = [f"{letter * 3}-{letter * 3}-{letter * 3}" for letter in "abcdefghijklmnopqrst"]
    config = of_files(write_jsonl(tmp_path / "c.jsonl", texts), tokenizer="bpe", holdout=0.5)
    bpe = choose_tokenizer(config, 400, tmp_path / "cache")
    learned = {letter for letter in "abcdefghijklmnopqrst" if len(bpe.encode(letter * 3)) == 1}
    trained_on = open_corpus(config, bpe, tmp_path / "cache").streams[0].train
    assert learned == set(bpe.decode(all_of(trained_on))) - {"-"}
    assert 4 < len(learned) < 16
    monkeypatch.setattr(module, "fit_bpe", None)
    assert choose_tokenizer(config, 400, tmp_path / "cache").fingerprint == bpe.fingerprint


def test_a_fit_reads_no_more_than_it_needs(path, monkeypatch):
    monkeypatch.setattr(module, "_FIT_CHARACTERS", 200)
    config = of_files(path)
    fitted = fit_tokenizer(config, 300, find_sources(config.paths), 1)
    count = next(n for n in range(40) if sum(map(len, TEXTS[:n])) >= 200)
    assert fitted.fingerprint == fit_bpe(TEXTS[:count], 300).fingerprint


def test_a_mixture_keeps_its_corpora_apart(path, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [text.upper() for text in TEXTS])
    mixed = opened(of_files(path, other, weights=(2, 1)), tmp_path / "cache")
    alone = [opened(of_files(each), tmp_path / "cache") for each in (path, other)]
    assert mixed.weights == (2, 1)
    assert [all_of(stream.train) for stream in mixed.streams] == [all_of(c.streams[0].train) for c in alone]
    same = opened(
        of_files(*(shards_of(p, tmp_path / p.stem) for p in (path, other)), weights=(2, 1)), tmp_path
    )
    assert same.identity == mixed.identity
    assert same.identity.fingerprint not in {c.identity.fingerprint for c in alone}
    assert opened(of_files(path, other, weights=(1, 1)), tmp_path).identity.fingerprint != (
        mixed.identity.fingerprint
    )


def test_shards_bring_their_tokenizer(path, tmp_path):
    bpe = fit_bpe(TEXTS, 262)
    shards = shards_of(path, tmp_path / "shards", tokenizer=bpe)
    assert choose_tokenizer(of_files(shards, tokenizer="bpe"), 262, tmp_path).fingerprint == bpe.fingerprint
    with pytest.raises(
        UserError, match=r"was tokenized with another tokenizer.*pass its own, --data\.tokenizer"
    ):
        opened(of_files(shards), tmp_path)
    with pytest.raises(UserError, match=r"has 262 ids but model\.vocab-size is 261"):
        choose_tokenizer(of_files(shards, tokenizer="bpe"), 261, tmp_path)


def test_shards_with_another_holdout_are_refused(path, tmp_path):
    shards = shards_of(path, tmp_path / "shards", holdout=0.2)
    with pytest.raises(UserError, match=r"holds out 0\.2 of its documents.*pass --data\.holdout 0\.2"):
        opened(of_files(shards), tmp_path)


def test_text_and_shards_do_not_mix(path, tmp_path):
    shards = shards_of(path, tmp_path / "shards")
    with pytest.raises(UserError, match="either files of documents or directories of token shards; got both"):
        opened(of_files(path, shards), tmp_path)


def test_unfinished_shards_are_told(path, tmp_path):
    (tmp_path / "progress.jsonl").touch()
    with pytest.raises(UserError, match="holds token shards that are not finished: run the same"):
        opened(of_files(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "found no valid JSON"),
        (b"[]", "found version None"),
        (b'{"version": 99}', "of version 1; found version 99"),
        (b'{"version": 1}', "found other fields"),
    ],
)
def test_an_index_that_is_none(path, tmp_path, content, message):
    shards = shards_of(path, tmp_path / "shards")
    (shards / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(of_files(shards), tmp_path)


def test_a_lost_shard_is_one_sentence(path, tmp_path):
    shards = shards_of(path, tmp_path / "shards")
    (shards / "train-00000.tokens").unlink()
    with pytest.raises(UserError, match=r"the token shard .*train-00000\.tokens must be whole; found that"):
        opened(of_files(shards), tmp_path)


def test_opening_does_not_read_the_tokens(path, tmp_path):
    """Ten billion tokens, in files without content: what is opened at once takes no time to open."""
    shards = shards_of(path, tmp_path / "shards")
    index = json.loads((shards / "index.json").read_text())
    count = 10**10
    index["train"] = [count]
    (shards / "index.json").write_text(json.dumps(index))
    os.truncate(shards / "train-00000.tokens", count * 2 + -(-count // 4096) * 4)
    assert opened(of_files(shards), tmp_path).identity.tokens == count


# --- What a model is evaluated on ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 40, 10**9])
def test_evaluation_reads_what_training_held_out(path, tmp_path, tokens):
    config = of_files(path, holdout=0.3)
    corpus = opened(config, tmp_path)
    shards = shards_of(path, tmp_path / "shards", holdout=0.3)
    for given in (config, of_files(shards, holdout=0.3)):
        text = read_evaluation_text(given, BYTES, corpus.identity.threshold, tokens=tokens)
        assert (text.fingerprint, text.documents) == (corpus.identity.fingerprint, 40)
        found = all_of(text.heldout[0].ids)
        assert len(found) > min(tokens, corpus.identity.heldout_tokens - 1)
        assert found == all_of(corpus.heldout[0].ids)[: len(found)]
        assert all_of(text.heldout[0].sizes) == [int(i != 256) for i in found]


def test_evaluation_can_have_every_document(path, tmp_path):
    text = read_evaluation_text(of_files(path), BYTES, 1, tokens=10**9, every_document=True)
    assert np.count_nonzero(np.array(all_of(text.heldout[0].ids)) == 256) == 40
    shards = shards_of(path, tmp_path / "shards")
    threshold = opened(of_files(shards), tmp_path).identity.threshold
    with pytest.raises(UserError, match="holds token shards: pass the documents themselves"):
        read_evaluation_text(of_files(shards), BYTES, threshold, tokens=9, every_document=True)


def test_evaluation_refuses_shards_that_hold_out_other_documents(path, tmp_path):
    shards = shards_of(path, tmp_path / "shards", holdout=0.3)
    with pytest.raises(UserError, match="with the tokenizer and the held-out documents of the checkpoint"):
        read_evaluation_text(of_files(shards), BYTES, 5, tokens=1)
