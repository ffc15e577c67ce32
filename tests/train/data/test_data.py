"""No token is lost or repeated, whatever the process count or the interruption;
every bad corpus is one sentence."""

import functools
import gzip
import json
import lzma
import os
from collections import Counter

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataConfig
from train.data.batches import heldout_batches, train_batches
from train.data.documents import read_documents
from train.data.tokenizer import ByteTokenizer, build_tokenizer
from train.errors import UserError

TOKENIZER = ByteTokenizer()
# Without the time of day in the file, so that tests have the same names in every process.
GZIP = functools.partial(gzip.compress, mtime=0)
COMPRESS = {"": bytes, ".gz": GZIP, ".xz": lzma.compress, ".zst": zstandard.compress}


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return DataConfig(paths=(str(path),), text_field=field)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty documents of 1 to 118 bytes, each told apart by its number."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return write_jsonl(path, [f"{n:02d}" + "abcdefghij "[: n % 11] * (n % 13) for n in range(40)])


def start(corpus, **changes):
    arguments = {"context_length": 8, "batch_size": 4, "seed": 0} | changes
    return train_batches(corpus, TOKENIZER, **arguments)


def take(iterator, count):
    return [next(iterator)["tokens"] for _ in range(count)]


def ring_of(texts):
    return np.array([i for text in texts for i in (*text.encode(), 256)], np.int32)


def heldout_texts(corpus):
    """The documents round the held-out ring, whose windows of one target start at its second token."""
    lap = heldout_batches(corpus, TOKENIZER, context_length=1, batch_size=1, limit=10**9)
    ring = np.roll([batch["tokens"][0, 1] for batch in lap], 1)
    assert ring[-1] == TOKENIZER.eos_id
    return [TOKENIZER.decode(ids) for ids in np.split(ring, np.flatnonzero(ring == 256) + 1)[:-1]]


# --- Order and completeness ---------------------------------------------------------------------------------


def test_batches_have_their_shape_and_type(corpus):
    tokens = next(start(corpus))["tokens"]
    assert tokens.shape == (4, 9)
    assert tokens.dtype == np.int32


@settings(max_examples=15, deadline=None)
@given(context_length=st.integers(1, 40), seed=st.integers(-(2**40), 2**40))
def test_an_epoch_has_each_target_once_and_what_it_leaves_begins_the_next(corpus, context_length, seed):
    heldout = set(heldout_texts(corpus))
    ring = ring_of(text for text in read_documents(corpus) if text not in heldout)
    per_epoch = len(ring) // context_length
    iterator = start(corpus, context_length=context_length, batch_size=1, seed=seed)
    position = np.arange(context_length + 1)
    for _ in range(2):
        windows = np.concatenate(take(iterator, per_epoch))
        expected = []
        for _ in range(per_epoch):
            expected.append(ring.take(position, mode="wrap"))
            position = position + context_length
        assert Counter(map(bytes, windows)) == Counter(map(bytes, expected))


def test_heldout_documents_are_whole_and_of_the_share_asked_for(corpus):
    documents = list(read_documents(corpus))
    heldout = heldout_texts(corpus)
    assert len(heldout) == len(set(heldout)) == round(0.05 * len(documents))
    assert set(heldout) < set(documents)


def test_the_order_follows_from_the_seed_alone(corpus):
    first, again, other = (np.stack(take(start(corpus, seed=seed), 40)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_second_epoch_has_another_order_and_not_that_of_the_next_seed(tmp_path):
    letters = "abcdefghijklmnop"
    corpus = write_jsonl(tmp_path / "c.jsonl", [letters, "held out, or not"])
    # 17 windows of one target: the ring, so that each epoch holds the same windows.
    orders = {}
    for seed in (0, 1):
        targets = np.concatenate(take(start(corpus, context_length=1, batch_size=1, seed=seed), 34))[:, 1]
        orders |= {(seed, epoch): tuple(targets[17 * epoch : 17 * (epoch + 1)]) for epoch in (0, 1)}
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1
    assert len(set(orders.values())) == 4


@settings(max_examples=10, deadline=None)
@given(before=st.integers(0, 150), after=st.integers(1, 30))
def test_a_restored_iterator_goes_on_exactly(corpus, before, after):
    iterator = start(corpus)
    take(iterator, before)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, after)
    restored = start(corpus)
    restored.set_state(state)
    assert np.array_equal(take(restored, after), expected)
    restored.set_state(state)
    assert np.array_equal(take(restored, after), expected)


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_share_the_global_batch(corpus, process_count):
    whole = start(corpus)
    parts = [start(corpus, process_index=i, process_count=process_count) for i in range(process_count)]
    for _ in range(120):
        rows = np.concatenate([next(part)["tokens"] for part in parts])
        assert Counter(map(bytes, rows)) == Counter(map(bytes, next(whole)["tokens"]))


def test_a_run_resumes_on_another_number_of_processes(corpus):
    iterator = start(corpus)
    take(iterator, 7)
    halves = [start(corpus, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.set_state(iterator.get_state())
    rows = np.concatenate([next(half)["tokens"] for half in halves])
    assert Counter(map(bytes, rows)) == Counter(map(bytes, next(iterator)["tokens"]))


@pytest.mark.parametrize("process_count", [2, 4])
def test_heldout_processes_share_the_global_batches_and_count_all_their_bytes(corpus, process_count):
    arguments = {"context_length": 4, "batch_size": 4, "limit": 3}
    whole = heldout_batches(corpus, TOKENIZER, **arguments)
    parts = [
        heldout_batches(corpus, TOKENIZER, **arguments, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for number, batch in enumerate(whole):
        rows = np.concatenate([part[number]["tokens"] for part in parts])
        assert Counter(map(bytes, rows)) == Counter(map(bytes, batch["tokens"]))
        assert {part[number]["bytes"] for part in parts} == {batch["bytes"]}


def test_bytes_are_those_of_the_targets(corpus):
    for batch in heldout_batches(corpus, TOKENIZER, context_length=4, batch_size=2, limit=100):
        assert batch["bytes"] == (batch["tokens"][:, 1:] != 256).sum()


def test_bytes_of_another_tokenizer_sum_to_those_of_the_text(tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", [f"{n} naïve café — ☃ 東京 🦊 \n" for n in range(40)])
    tokenizer = build_tokenizer(DataConfig(paths=corpus.paths, tokenizer="bpe"), 270)
    lap = heldout_batches(corpus, tokenizer, context_length=1, batch_size=1, limit=10**9)
    by_bytes = heldout_batches(corpus, TOKENIZER, context_length=1, batch_size=1, limit=10**9)
    assert len(lap) < len(by_bytes)
    assert sum(batch["bytes"] for batch in lap) == sum(batch["bytes"] for batch in by_bytes)


def test_heldout_text_of_less_than_a_batch_goes_round(corpus):
    (batch,) = heldout_batches(corpus, TOKENIZER, context_length=8, batch_size=64, limit=16)
    assert batch["tokens"].shape == (64, 9)
    assert batch["bytes"] == (batch["tokens"][:, 1:] != 256).sum()


def test_heldout_batches_stop_at_the_limit(corpus):
    assert len(heldout_batches(corpus, TOKENIZER, context_length=4, batch_size=1, limit=3)) == 3


@pytest.mark.parametrize("holdout", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(tmp_path, holdout):
    corpus = write_jsonl(tmp_path / "c.jsonl", ["first document", "second document"])
    corpus = DataConfig(paths=corpus.paths, holdout=holdout)
    train = next(train_batches(corpus, TOKENIZER, context_length=8, batch_size=1, seed=0))
    (heldout, *_) = heldout_batches(corpus, TOKENIZER, context_length=8, batch_size=1, limit=1)
    assert train["tokens"].shape == heldout["tokens"].shape


def test_copies_of_a_document_stay_on_one_side(tmp_path):
    texts = [f"document {n}" for n in range(10)]
    corpus = DataConfig(paths=write_jsonl(tmp_path / "c.jsonl", texts * 5).paths, holdout=0.3)
    assert sorted(Counter(heldout_texts(corpus)).values()) == [5, 5, 5]


def test_a_split_does_not_depend_on_the_order_of_documents(tmp_path):
    texts = [f"document number {n}" for n in range(40)]
    there, back = (
        heldout_texts(write_jsonl(tmp_path / f"{name}.jsonl", order))
        for name, order in (("there", texts), ("back", texts[::-1]))
    )
    assert there == back[::-1]


def test_the_default_corpus_ships_with_the_package():
    documents = list(read_documents(DataConfig()))
    assert len(documents) == 233
    assert 10e6 < sum(map(len, documents)) < 11e6


# --- Formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a", "a.dat"])
def test_json_lines(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    path.write_bytes(
        COMPRESS[suffix](b'{"text": "one\\u2028\xc3\xa9", "n": 1}\r\n\n{"text": ""}\n{"text": "two"}')
    )
    assert list(read_documents(DataConfig(paths=(str(path),)))) == ["one\u2028é", "two"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.dat", "a"])
def test_plain_text_is_one_document_a_file(tmp_path, name, suffix):
    text = "[not JSON]\n{neither}\n"
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    assert list(read_documents(DataConfig(paths=(str(path),)))) == [text]


def test_compression_is_told_by_content_and_parts_may_follow_each_other(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"{suffix or 'none'}.txt"
        path.write_bytes(compress(b"one ") + compress(b"two"))
        assert list(read_documents(DataConfig(paths=(str(path),)))) == ["one two"]


def test_globs_are_sorted_and_a_file_counts_once(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "[d].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = tuple(str(tmp_path / p) for p in ("b.txt", "[d].txt", "*.txt", "**/c.txt", "*"))
    assert list(read_documents(DataConfig(paths=paths))) == ["b.txt", "[d].txt", "a.txt", "sub/c.txt"]


# --- Bad corpora --------------------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'
TRUNCATED = {suffix: COMPRESS[suffix](GOOD * 50)[:-9] for suffix in (".gz", ".xz", ".zst")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b"", "found it empty"),
        ("c.txt", b"  \n\n", "found it empty"),
        ("c.jsonl.gz", b"", "found it empty"),
        ("c.jsonl.gz", GZIP(b""), "found it empty"),
        *((f"c.jsonl{suffix}", data, "truncated or damaged") for suffix, data in TRUNCATED.items()),
        ("c.jsonl.gz", GZIP(GOOD)[:12] + b"damage" + GZIP(GOOD)[18:], "truncated or damaged"),
        ("c.jsonl.zst", GOOD, "compressed as its name says"),
        ("c.txt", b"\x7fELF\x00\x01", "found binary data"),
        ("c.txt", "text".encode("utf-16"), "found binary data"),
        ("c.txt", b"one\ntwo\ncaf\xe9", "line 3 must be UTF-8; found the byte 0xe9"),
        ("c.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "line 2 must be UTF-8"),
        ("c.jsonl", GOOD + b"\n{broken\n", "line 3 must be one JSON object; found no valid JSON"),
        ("c.jsonl", GOOD + b"[" * 100_000, "line 2 must be one JSON object; found no valid JSON"),
        ("c.jsonl", GOOD + b'"text"\n', "line 2 must be one JSON object; found a string: mend"),
        ("c.json", b'[\n{"text": "a"}\n]', "line 1 must be one JSON object"),
        ("c.jsonl", GOOD + b'{"body": "a", "id": 1}\n',
         "line 2 must have the text field 'text'; found the fields body, id"),
        ("c.jsonl", GOOD + b"{}\n", "line 2 must have the text field 'text'; found the fields none"),
        ("c.jsonl", GOOD + b'{"text": null}\n',
         "line 2 must hold a string in 'text'; found null: name another field"),
        ("c.jsonl", GOOD + b'{"text": ["a"]}\n', "line 2 must hold a string in 'text'; found a list"),
        ("c.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 2 must hold Unicode text"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_documents(DataConfig(paths=(str(path),))))
    sentence = str(caught.value)
    assert message in sentence
    assert str(path) in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "there is no file"),
        ("*.jsonl", "no file matches"),
        ("", "is a directory: pass"),
        ("sub*", "no file matches"),
    ],
)
def test_paths_that_are_no_files(tmp_path, path, message):
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        list(read_documents(DataConfig(paths=(f"{tmp_path}/{path}",))))
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "c.txt"
    path.write_text("text")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything

        def refuse(self):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(UserError, match=r"c\.txt cannot be read: Permission denied"):
        list(read_documents(DataConfig(paths=(str(path),))))


@pytest.mark.parametrize("texts", [["alone"], ["twin", "twin"], [""]])
def test_a_corpus_without_two_documents_cannot_be_split(tmp_path, texts):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    with pytest.raises(UserError, match=r"at least 2 different documents.*found [01]"):
        start(corpus)


@pytest.mark.parametrize("function", [train_batches, heldout_batches])
def test_a_corpus_shorter_than_one_window(tmp_path, function):
    corpus = write_jsonl(tmp_path / "c.jsonl", ["1234567", "abcdefg"])
    which = "training" if function is train_batches else "held-out"
    rest = {"seed": 0} if function is train_batches else {"limit": 1}
    function(corpus, TOKENIZER, context_length=7, batch_size=1, **rest)
    with pytest.raises(UserError, match=f"the {which} documents must hold at least 9 tokens.*found 8"):
        function(corpus, TOKENIZER, context_length=8, batch_size=1, **rest)


def test_a_batch_that_the_processes_cannot_share(corpus):
    with pytest.raises(UserError, match="multiple of the number of processes, 3; got 4"):
        start(corpus, process_count=3)


# --- The tokenizer a configuration names --------------------------------------------------------------------


def test_bpe_is_fitted_on_training_documents_only(tmp_path):
    texts = [f"{letter * 3}-{letter * 3}-{letter * 3}" for letter in "abcdefghijklmnopqrst"]
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    bpe = build_tokenizer(DataConfig(paths=corpus.paths, tokenizer="bpe", holdout=0.5), 400)
    assert (
        bpe.fingerprint
        == build_tokenizer(DataConfig(paths=corpus.paths, tokenizer="bpe", holdout=0.5), 400).fingerprint
    )
    learned = {letter for letter in "abcdefghijklmnopqrst" if len(bpe.encode(letter * 3)) == 1}
    assert len(learned) == 10


def test_a_tokenizer_beyond_the_model_is_refused():
    with pytest.raises(UserError, match=r"has 257 ids but model\.vocab-size is 100"):
        build_tokenizer(DataConfig(), 100)
