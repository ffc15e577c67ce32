"""The epilogues of the gates on Mosaic GPU without PTX, for the interpreter: `pallas_mosaic_gpu._write` of
PanelELL and `pallas_mosaic_gpu._pack` of TwELL."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

_WARPS, _WARP_ROWS = 4, 16


def write(acc, values, hits, nnz, rows_left, columns_left, *, tile, width, warp_step, all_rows, dtype, rule):
    """Values of a neuron that no token of a warp activates are left alone."""
    for first, gates, active in _of_warps(acc, rows_left, columns_left, warp_step, rule, dtype):
        rows, hit = pl.ds(first, _WARP_ROWS), jnp.any(active, axis=0)
        kept = jnp.where(active, gates, 0).astype(dtype).T
        values[:, rows] = jnp.where(hit[:, None], kept, values[:, rows])
        hits[first // _WARP_ROWS, :] = jnp.sum(active, axis=0, dtype=jnp.uint8)
        nnz[rows] = jnp.sum(active, axis=1, dtype=jnp.int32)


def pack(
    acc, words, hits, counters, gates, column, rows_left, columns_left,
    *, slots, row_bytes, warp_step, dtype, rule,
):  # fmt: skip
    """Counters are used, so that a race for them is seen."""
    tile = acc.shape[1]
    counters[...] = jnp.zeros((tile,), jnp.int32)
    for first, values, active in _of_warps(acc, rows_left, columns_left, warp_step, rule, dtype):
        counters[...] += jnp.sum(active, axis=0, dtype=jnp.int32)
        order = jnp.argsort(~active, axis=1, stable=True)[:, : slots - 1]
        bits = lax.bitcast_convert_type(jnp.take_along_axis(values, order, axis=1).astype(dtype), jnp.uint16)
        stored = bits.astype(jnp.uint32) << 16 | (order + column).astype(jnp.uint32)
        counts = jnp.sum(active, axis=1, keepdims=True, dtype=jnp.uint32)
        row_words = jnp.concatenate([counts, stored], axis=1)

        def write_row(row, _, first=first, row_words=row_words):
            @pl.when(first + row < rows_left)
            def _():
                words[first + row, :] = lax.dynamic_index_in_dim(row_words, row, keepdims=False)

        lax.fori_loop(0, _WARP_ROWS, write_row, None)
    hits[...] = counters[...].astype(jnp.uint8)


def _of_warps(acc, rows_left, columns_left, warp_step, rule, dtype):
    """Each warp's first row, gates (16, tile) and which of them are active."""
    for warp in range(_WARPS):
        first = warp * warp_step
        gates = acc[warp * _WARP_ROWS : (warp + 1) * _WARP_ROWS]
        shape = gates.shape
        there = (lax.broadcasted_iota(jnp.int32, shape, 0) + first < rows_left) & (
            lax.broadcasted_iota(jnp.int32, shape, 1) < columns_left
        )
        yield first, gates, ~(gates <= rule.last_inactive(dtype)) & there
