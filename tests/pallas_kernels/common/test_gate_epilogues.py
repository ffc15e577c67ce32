"""The PTX of the gates' epilogues, emulated: what it writes of a tile whose halves are spread over its rows
as on Hopper and as on Blackwell."""

import jax.numpy as jnp
import numpy as np
import ptx
import pytest

from pallas_kernels import FFNOptions, Threshold
from pallas_kernels.common import blackwell_gemm, hopper_gemm
from pallas_kernels.common.tile_walk import HALVES, TILE_M
from pallas_kernels.formats import TwELL
from pallas_kernels.panel import pallas_mosaic_gpu as panel
from pallas_kernels.twell import pallas_mosaic_gpu as twell

SPREADS = {"hopper": hopper_gemm._HALVES, "blackwell": blackwell_gemm._HALVES}
RULES = {"relu": FFNOptions().rule, "threshold": FFNOptions(activation=Threshold(0.25)).rule}
each_spread = pytest.mark.parametrize("rows", SPREADS.values(), ids=SPREADS)


def tile_of_gates(columns, dtype, *, tokens, d_ff):
    """A tile (128, columns), rounded, of which a part exists; past it are zeros and NaN. About one gate in
    ten is active, and none of the first 16 columns."""
    rng = np.random.default_rng(0)
    gates = np.asarray(jnp.asarray(rng.normal(-1.3, 1, (TILE_M, columns)), dtype), np.float32)
    gates[:, :16] = -1
    gates[3, 20], gates[40, 21] = np.nan, np.inf
    gates[tokens:] = 0
    gates[:, d_ff:] = 0
    gates[tokens:, 18] = gates[2, d_ff:] = np.nan
    return gates


def active_of(gates, rule, dtype, *, tokens, d_ff):
    active = ~(gates <= rule.last_inactive(dtype))
    active[tokens:] = active[:, d_ff:] = False
    return active


def halves(gates, rows):
    """For each half its first row, and each thread's `hopper_gemm.values`."""
    thread = np.arange(ptx.THREADS)
    upper, quarter = thread // 32 * rows.warp_step + thread % 32 // 4, thread % 4
    for half in range(HALVES):
        first = half * rows.step
        yield (
            first,
            [
                gates[first + upper + below, 8 * (k // 2) + 2 * quarter + k % 2]
                for below in (0, 8)
                for k in range(gates.shape[1] // 4)
            ],
        )


@each_spread
@pytest.mark.parametrize(
    ("rule", "dtype", "tokens"), [("relu", "bfloat16", 128), ("threshold", "float16", 101)], ids=str
)
def test_panel(rows, rule, dtype, tokens):
    tile, d_ff, rule = 48, 40, RULES[rule]
    gates = tile_of_gates(tile, dtype, tokens=tokens, d_ff=d_ff)
    active = active_of(gates, rule, dtype, tokens=tokens, d_ff=d_ff)
    untouched = 7
    values = np.full((tile, TILE_M), untouched, np.uint16)
    memory = ptx.Memory(values, np.zeros((TILE_M // 16, tile), np.uint8), np.zeros(TILE_M, np.int32))
    to_values, to_hits, to_nnz, _ = memory.addresses
    text = panel._epilogue(tile, tile, rows.warp_step, tokens == TILE_M, dtype, rule)
    for first, registers in halves(gates, rows):
        pointers = to_values + 2 * first, to_hits + first // 16 * tile, to_nnz + 4 * first
        ptx.run(text, [*registers, *pointers, min(tokens - first, rows.span), d_ff], memory)
    values, hits, nnz = memory.arrays()
    by_segment = active.reshape(-1, 16, tile).sum(axis=1)
    np.testing.assert_array_equal(hits, by_segment)
    np.testing.assert_array_equal(nnz, active.sum(axis=1))
    stored = by_segment.repeat(16, axis=0).T > 0
    kept = np.asarray(jnp.asarray(np.where(active, gates, 0), dtype)).view(np.uint16).T
    np.testing.assert_array_equal(values, np.where(stored, kept, untouched))


@each_spread
@pytest.mark.parametrize(
    ("rule", "dtype", "tile", "tokens"),
    [("relu", "bfloat16", 128, 128), ("threshold", "float16", 256, 101)],
    ids=str,
)
def test_twell(rows, rule, dtype, tile, tokens):
    """Rows of the second column of tiles, of whose words some overflow."""
    d_ff, slots, rule = tile - 8, tile // 8, RULES[rule]
    gates = tile_of_gates(tile, dtype, tokens=tokens, d_ff=d_ff)
    gates[5, 30:70] = 1
    active = active_of(gates, rule, dtype, tokens=tokens, d_ff=d_ff)
    words = np.zeros((TILE_M, 2 * slots), np.uint32)
    memory = ptx.Memory(
        words,
        np.zeros((HALVES, tile), np.uint8),
        np.zeros(tile, np.int32),
        np.zeros(tile // 8 * ptx.THREADS, np.uint32),
    )
    to_words, to_hits, counters, held, _ = memory.addresses
    row_bytes = words.strides[0]
    text = twell._walk(tile, slots, row_bytes, rows.warp_step, dtype, rule)
    for half, (first, registers) in enumerate(halves(gates, rows)):
        ptx.run(twell._zero_counters(tile), [counters], memory)
        pointers = to_words + first * row_bytes + 4 * slots, to_hits + half * tile, counters, held
        ptx.run(text, [*registers, *pointers, tile, min(tokens - first, rows.span), d_ff], memory)
        ptx.run(twell._flush_counters(tile), [pointers[1], counters], memory)
    words, hits, *_ = memory.arrays()
    packed = TwELL(jnp.asarray(words), None, 2 * tile, tile, slots, jnp.dtype(dtype))
    counts = active.sum(axis=1)
    np.testing.assert_array_equal(packed.counts, np.stack([np.zeros(TILE_M), counts], axis=1))
    assert packed.overflow_count > 0
    np.testing.assert_array_equal(hits.sum(axis=0), active.sum(axis=0))
    fits = counts < slots
    found = np.asarray(packed.to_dense(), np.float32)[fits, tile:]
    np.testing.assert_array_equal(found, np.where(active, gates, 0)[fits])
