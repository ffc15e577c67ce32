"""PanelELL's counts and lists of designed hits, run by Pallas' interpreter on a CPU, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.panel import pallas_triton_counts as counting
from pallas_kernels.panel import pallas_triton_lists as listing
from pallas_kernels.panel.pallas_triton_counts import GatePanel, count_active
from pallas_kernels.panel.pallas_triton_lists import build_lists

PANEL, TILE = 128, 192


def designed(n_panels, segments, d_ff, pattern):
    """Hits (n_panels, segments, F) and the gates of their tokens; the gate stage's own arrays are wider."""
    rng = np.random.default_rng(d_ff)
    most, shape = PANEL // segments, (n_panels, segments, d_ff)
    if pattern == "all":
        hits = np.full(shape, most)
    else:
        hits = rng.integers(1, most + 1, shape) * (rng.random(shape) < rng.random((n_panels, 1, 1)) ** 3)
        if pattern == "gaps":  # empty panels, and one with a neuron alone in the last block
            hits[::2] = 0
            hits[0, -1, -1] = most
    nnz = rng.integers(0, 99, (37, n_panels * PANEL))
    wide = np.pad(hits, ((0, 0), (0, 0), (0, 24)), constant_values=most).reshape(-1, d_ff + 24)
    values = jnp.zeros((n_panels, d_ff + 24, PANEL), jnp.bfloat16)
    return hits, nnz, GatePanel(values, jnp.asarray(wide, jnp.uint8), jnp.asarray(nnz, jnp.int32))


@pytest.mark.parametrize(
    ("n_panels", "segments", "d_ff", "chunk", "pattern"),
    [  # blocks of neurons that are full, cut, few, and more than a program counts at one time
        (1, 8, 2048, 128, "some"),
        (5, 8, 2049, 128, "gaps"),
        (2, 8, 2049, 128, "all"),
        (3, 1, 9000, 64, "gaps"),
        (2, 1, 9000, 128, "all"),
        (4, 2, 50, 16, "some"),
    ],
)
def test_lists_of_blocks_of_neurons(n_panels, segments, d_ff, chunk, pattern):
    hits, nnz, gate = designed(n_panels, segments, d_ff, pattern)
    by_panel, active = hits.sum(axis=1), (hits > 0).any(axis=1)
    counts = count_active(gate, d_ff=d_ff, interpret=True)
    bits = ((hits > 0) << np.arange(segments)[:, None]).sum(axis=1)
    own = active.sum(axis=1)
    expected = {
        "neurons": own,
        "gates": nnz.reshape(37, n_panels, PANEL).sum(axis=(0, 2)),
        "most": nnz.sum(axis=0).reshape(n_panels, PANEL).max(axis=1),
        "hits": by_panel,
        "segments": bits,
        "before": (np.cumsum(active, axis=1) - active)[:, :: counting.block_of(d_ff)],
    }
    assert set(expected) == set(counts._fields)
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(counts, name), value, err_msg=name)

    tokens, chunks, tiles = n_panels * PANEL - 3, -(-own // chunk), -(-own // TILE)
    needed, pairs = chunks.sum(), -(-chunks // 2)
    for room, with_slots in ((None, True), (max(needed, 1), False), (max(needed - 1, 1), True)):
        lists, totals = build_lists(
            counts,
            tokens=tokens,
            chunk=chunk,
            room=room,
            tile=TILE,
            with_slots=with_slots,
            interpret=True,
        )
        fits = room is None or needed <= room
        assert lists.chunk == chunk
        assert int(lists.needed) == needed
        assert lists.n_pairs.tolist() == [pairs.sum() * fits]
        assert lists.n_tiles.tolist() == [tiles.sum() * fits]
        np.testing.assert_array_equal(lists.counts, own * fits)
        np.testing.assert_array_equal(lists.offsets, np.concatenate([[0], np.cumsum(chunks)]) * chunk * fits)
        np.testing.assert_array_equal(lists.totals, by_panel.sum(axis=0) * fits)
        np.testing.assert_array_equal(totals.hits, by_panel.sum(axis=0))
        assert [int(total) for total in (totals.neurons, totals.gates, totals.most)] == [
            own.sum(),
            nnz.sum(),
            expected["most"].max(),
        ]
        np.testing.assert_allclose(totals.mean, nnz.sum() / tokens, rtol=1e-6)
        assert int(totals.overflow_rows) == int(totals.dense_tokens) == (0 if fits else tokens)
        assert (lists.slots is not None) == with_slots
        if with_slots:
            slots = (np.cumsum(chunks) - chunks)[:, None] * chunk + np.cumsum(active, axis=1) - 1
            slots = np.where(active & (slots < len(lists.neurons)), slots, -1)
            np.testing.assert_array_equal(lists.slots, slots)
        if fits:
            _check_slots(lists, active, bits, chunks, chunk)
            np.testing.assert_array_equal(lists.owner[:needed], np.repeat(np.arange(n_panels), chunks))
            assert lists.tiles[: tiles.sum()].tolist() == [
                panel * -(-d_ff // TILE) + nth for panel, n in enumerate(tiles) for nth in range(n)
            ]


def _check_slots(lists, active, bits, chunks, chunk):
    """Each panel's neurons ascending with their segments, and zeros up to whole chunks."""
    for panel, (start, n) in enumerate(zip(np.asarray(lists.offsets), chunks, strict=False)):
        neurons = np.flatnonzero(active[panel])
        padded = np.pad(neurons, (0, n * chunk - len(neurons)))
        np.testing.assert_array_equal(lists.neurons[start : start + n * chunk], padded)
        segments = np.where(np.arange(n * chunk) < len(neurons), bits[panel, padded], 0)
        np.testing.assert_array_equal(lists.segments[start : start + n * chunk], segments)


@pytest.mark.parametrize("block", [2048, 8])
@pytest.mark.parametrize("n_panels", [1, 7, 30])
def test_places_of_panels(n_panels, block, monkeypatch):
    """Also with more panels and neurons than a program looks at at one time."""
    monkeypatch.setattr(counting, "_BLOCK", block)
    monkeypatch.setattr(listing, "_PANELS", block)
    monkeypatch.setattr(listing, "_HIT_ROWS", 4)
    d_ff, chunk = 50, 16
    hits, nnz, gate = designed(n_panels, 2, d_ff, "some")
    active = (hits > 0).any(axis=1)
    counts = count_active(gate, d_ff=d_ff, interpret=True)
    np.testing.assert_array_equal(counts.neurons, active.sum(axis=1))
    lists, totals = build_lists(counts, tokens=1, chunk=chunk, interpret=True)
    np.testing.assert_array_equal(totals.hits, hits.sum(axis=(0, 1)))
    assert (int(totals.neurons), int(totals.gates)) == (active.sum(), nnz.sum())
    assert int(totals.most) == nnz.sum(axis=0).max()
    chunks = -(-active.sum(axis=1) // chunk)
    assert int(lists.needed) == chunks.sum()
    np.testing.assert_array_equal(lists.offsets, np.concatenate([[0], np.cumsum(chunks)]) * chunk)
    first = np.asarray(lists.offsets)[:-1] // chunk
    pairs = [
        2 * (start + nth) + (nth + 1 < own)
        for start, own in zip(first, chunks, strict=True)
        for nth in range(0, own, 2)
    ]
    assert lists.n_pairs.tolist() == [len(pairs)]
    np.testing.assert_array_equal(lists.pairs[: len(pairs)], pairs)
    np.testing.assert_array_equal(lists.owner[: chunks.sum()], np.repeat(np.arange(n_panels), chunks))
