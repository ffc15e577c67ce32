"""No token is lost or repeated, whatever the process count or the interruption; held-out text does not depend
on how it is cut into batches."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import batches as batches_module
from train.data.batches import TrainBatches, heldout_batches
from train.data.corpus import Corpus, CorpusIdentity, Heldout, Stream
from train.data.shards import InMemory, Joined
from train.data.tokenizer import ByteTokenizer
from train.errors import UserError

RING = np.arange(1, 702, dtype=np.uint16)


def heldout_text(length):
    """Token t stands for t % 5 bytes."""
    ids = np.arange(1, length + 1, dtype=np.uint16)
    return Heldout(InMemory(ids), InMemory(ids.astype(np.uint32) % 5))


def corpus(*rings, weights=(1.0,)):
    streams = tuple(Stream(InMemory(ring), heldout_text(100)) for ring in rings or [RING])
    return Corpus(ByteTokenizer(), streams, weights, CorpusIdentity("", 0, 0, 0, 0))


def start(*rings, weights=(1.0,), **changes):
    arguments = {"context_length": 8, "batch_size": 4, "seed": 0} | changes
    return TrainBatches(corpus(*rings, weights=weights), **arguments)


def take(batches, count):
    return [next(batches)["tokens"] for _ in range(count)]


# --- Training -----------------------------------------------------------------------------------------------


def test_batches_have_their_shape_and_type():
    tokens = next(start())["tokens"]
    assert tokens.shape == (4, 9)
    assert tokens.dtype == np.int32


@settings(max_examples=15, deadline=None)
@given(context_length=st.integers(1, 40), seed=st.integers(-(2**40), 2**40), cut=st.integers(0, 701))
def test_an_epoch_has_each_target_once_and_what_it_leaves_begins_the_next(context_length, seed, cut):
    per_epoch = len(RING) // context_length
    ring = Joined([InMemory(RING[:cut]), InMemory(RING[cut:])])
    batches = TrainBatches(
        Corpus(ByteTokenizer(), (Stream(ring, heldout_text(9)),), (1.0,), CorpusIdentity("", 0, 0, 0, 0)),
        context_length=context_length, batch_size=1, seed=seed,
    )  # fmt: skip
    position = np.arange(context_length + 1)
    for _ in range(2):
        windows = np.concatenate(take(batches, per_epoch))
        expected = []
        for _ in range(per_epoch):
            expected.append(RING.take(position, mode="wrap").astype(np.int32))
            position = position + context_length
        assert Counter(map(bytes, windows)) == Counter(map(bytes, expected))


def test_the_order_follows_from_the_seed_alone():
    first, again, other = (np.stack(take(start(seed=seed), 40)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_second_epoch_has_another_order_and_not_that_of_the_next_seed():
    orders = {}
    for seed in (0, 1):
        batches = start(RING[:17], context_length=1, batch_size=1, seed=seed)
        targets = np.concatenate(take(batches, 34))[:, 1]
        orders |= {(seed, epoch): tuple(targets[17 * epoch : 17 * (epoch + 1)]) for epoch in (0, 1)}
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1
    assert len(set(orders.values())) == 4


@settings(max_examples=10, deadline=None)
@given(before=st.integers(0, 150), after=st.integers(1, 30))
def test_a_position_is_taken_up_exactly(before, after):
    batches = start()
    take(batches, before)
    position = batches.position
    assert position == 4 * before
    expected = take(batches, after)
    restored = start()
    for _ in range(2):
        restored.seek(position)
        assert np.array_equal(take(restored, after), expected)
    assert restored.position == batches.position


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_share_each_batch_row_for_row(process_count):
    whole = start()
    parts = [start(process_index=i, process_count=process_count) for i in range(process_count)]
    for _ in range(120):
        rows = np.concatenate([next(part)["tokens"] for part in parts])
        assert np.array_equal(rows, next(whole)["tokens"])


def test_a_position_is_one_number_for_every_number_of_processes_and_batch_size():
    whole = start()
    take(whole, 7)
    halves = [start(batch_size=8, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.seek(whole.position)
    rows = np.concatenate([next(half)["tokens"] for half in halves])
    assert np.array_equal(rows, np.concatenate(take(whole, 2)))


def test_a_mixture_has_its_shares_everywhere_and_each_stream_its_own_epochs():
    small, large = np.arange(1, 82, dtype=np.uint16), np.arange(1000, 3000, dtype=np.uint16)
    windows = np.concatenate(take(start(small, large, weights=(3, 1), batch_size=10), 40))
    of_small = windows[:, 0] < 1000
    assert of_small.sum() == 300
    for part in np.split(of_small, 10):
        assert abs(part.sum() - 30) <= 1
    # 81 tokens are 10 windows of 8: each of the 30 epochs has each target once.
    starts = windows[of_small][:, 1:].reshape(30, 80)
    assert len({tuple(row) for row in starts}) == 30
    assert all(len(set(row)) == 80 for row in starts)


def test_a_mixture_is_taken_up_beyond_its_cycle(monkeypatch):
    monkeypatch.setattr(batches_module, "_CYCLE", 100)
    rings = (RING, RING[::-1].copy(), np.arange(2000, 3000, dtype=np.uint16))
    batches = start(*rings, weights=(0.5, 0.2, 0.3), batch_size=19)
    *_, across, after = take(batches, 7)
    restored = start(*rings, weights=(0.5, 0.2, 0.3), batch_size=19)
    restored.seek(5 * 19)
    assert np.array_equal(take(restored, 2), [across, after])
    assert np.unique(across[:, 0] >= 2000, return_counts=True)[1].tolist() == [13, 6]


def test_training_text_shorter_than_one_window():
    start(RING[:9], batch_size=1)
    with pytest.raises(UserError, match=r"the training documents must hold at least 9 tokens.*found 8"):
        start(RING[:8], batch_size=1)


def test_a_batch_that_the_processes_cannot_share():
    with pytest.raises(UserError, match="multiple of the number of processes, 3; got 4"):
        start(process_count=3)


# --- Held out -----------------------------------------------------------------------------------------------


def evaluated(length=100, **changes):
    arguments = {"context_length": 4, "tokens": 10**9, "batch_size": 4} | changes
    return heldout_batches([heldout_text(length)], (1.0,), **arguments)


SHAPES = [(4, 1), (25, 1), (64, 1), (8, 8), (16, 8), (24, 8), (64, 64)]


@pytest.mark.parametrize(("batch_size", "devices"), SHAPES)
def test_the_same_windows_for_every_batch_shape(batch_size, devices):
    found = evaluated(batch_size=batch_size, devices=devices)
    windows, size = [], 0
    for batch in found:
        assert len(batch["tokens"]) % devices == 0
        assert len(batch["tokens"]) <= batch_size
        rows, counts = np.unique(batch["tokens"], axis=0, return_counts=True)
        assert len(rows) == batch["rows"]
        assert len(set(counts)) == 1  # so that a batch's mean is that of its different rows
        windows += [tuple(row) for row in rows]
        size += batch["bytes"]
    ring = np.arange(1, 101)
    assert sorted(windows) == [
        tuple(ring.take(np.arange(at, at + 5), mode="wrap")) for at in range(0, 100, 4)
    ]
    assert size == (ring % 5).sum()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batches_and_count_all_their_bytes(process_count):
    arguments = {"batch_size": 8, "devices": 4}
    whole = evaluated(**arguments)
    parts = [
        evaluated(**arguments, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    for number, batch in enumerate(whole):
        rows = np.concatenate([part[number]["tokens"] for part in parts])
        assert np.array_equal(rows, batch["tokens"])
        assert {(part[number]["bytes"], part[number]["rows"]) for part in parts} == {
            (batch["bytes"], batch["rows"])
        }


@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (7, 1), (8, 2), (11, 2), (10**9, 25)])
def test_whole_windows_of_the_tokens_asked_for(tokens, windows):
    assert sum(batch["rows"] for batch in evaluated(tokens=tokens)) == windows


def test_each_corpus_of_a_mixture_has_its_share():
    texts = [heldout_text(100), Heldout(InMemory(np.arange(1001, 1101)), InMemory(np.ones(100, np.uint32)))]
    batches = heldout_batches(texts, (1, 3), context_length=4, tokens=64, batch_size=8)
    first = np.concatenate([batch["tokens"] for batch in batches])[:, 0]
    assert ((first <= 1000).sum(), (first > 1000).sum()) == (4, 12)


def test_heldout_text_shorter_than_one_window():
    evaluated(5)
    with pytest.raises(
        UserError, match=r"the held-out documents must hold at least 5 tokens.*found 4: .*holdout"
    ):
        evaluated(4)
