"""The gate stage of TwELL and HybridELL in Pallas Triton: a product that packs its own output, and a kernel
that packs the output of XLA's product.

**`gate_pack`** (paper section 3.1) multiplies and packs in one kernel. Why it exists: XLA writes the (M, F)
gate and reads it again to compress it; at M 65,536 and F 5632 that is 0.74 GB written and 0.74 GB read, a
third of the GEMM's own time. Here the tile that a program holds in registers leaves it as packed words. Work:
2 M F D FLOPs. Bytes: 2 (M D + F D) read, 4 M F / C reserved, of which only the 32-byte sectors that hold a
count or a non-zero are written.

**`pack_words`** packs gates (M, F) that are there, for devices on which Triton's product is the slower one by
more than those bytes (`gate_stage`). Bytes: 2 M F read, the same words written, and M F / tile_m of hit
counts.

In both, four lanes of a warp hold a row of a tile. The tensor cores leave each lane two neighbouring columns
out of every eight; loads of 16 bytes give it as many neighbouring columns as fit them. Slot order inside a
tile is free, so a lane's own columns come first: a lane counts its non-zeros, learns from the other three of
its row where its slots start, and then walks its columns with a running slot and one predicated store each.
The mask, four columns to a word as bytes, is summed twice: along a row it gives the counts, along a column
the neurons' hits.

**Numerics.** f32 accumulation; the gate is rounded to the input type before it is compared, as in the
reference. f32 inputs multiply as IEEE f32.

**Limits.** Block sizes are powers of two; an NVIDIA GPU of compute capability 8.0 or newer.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.common.triton_tiles import grouped_order, product, scatter_index
from pallas_kernels.formats import TwELL
from pallas_kernels.twell.config import GatePackConfig, WordPackConfig

_EACH_BYTE = 0x01010101
_LANES = 4
"""Lanes of a warp that share a row."""
_FRAGMENT_RUN = 2
"""Neighbouring columns that the tensor cores leave in a lane."""


def gate_pack(
    x: jax.Array,
    w_gate: jax.Array,
    *,
    tile: int,
    slots: int,
    config: GatePackConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> tuple[TwELL, jax.Array]:
    """The active gates of ``x Wg^T`` in TwELL: x (M, D), w_gate (F, D) of one type.

    Returns:
      The packed gates, and neuron_hits (F,) int32.
    """
    tokens, d_ff = x.shape[0], w_gate.shape[0]
    n_tiles, n_blocks = pl.cdiv(d_ff, tile), pl.cdiv(tokens, config.tile_m)
    shape = (tokens, n_tiles * slots)
    wide = x.dtype.itemsize == 4
    out_shape = [
        varying_axes.output(x, (n_blocks, n_tiles * tile // 4), jnp.uint32),
        varying_axes.output(x, shape, jnp.uint32),
    ] + [varying_axes.output(x, shape, jnp.float32)] * wide
    kernel = partial(_gate_kernel, tile=tile, slots=slots, config=config, rule=rule, interpret=interpret)
    byte_counts, words, *values = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(n_blocks * n_tiles,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="twell_gate_pack",
    )(x, w_gate)
    packed = TwELL(words, values[0] if wide else None, d_ff, tile, slots, x.dtype)
    return packed, _neuron_hits(byte_counts, tile, d_ff, _FRAGMENT_RUN)


def _gate_kernel(x_ref, w_ref, hits_ref, words_ref, *values_ref, tile, slots, config, rule, interpret):
    tokens, d_ff, tile_m = x_ref.shape[0], w_ref.shape[0], config.tile_m
    n_blocks, n_tiles = pl.cdiv(tokens, tile_m), pl.cdiv(d_ff, tile)
    row_block, tile_id = grouped_order(pl.program_id(0), n_blocks, n_tiles, config.group_m)

    def rows_of(ref, block, height):
        """Rows past the end repeat the last one: their results are masked, their addresses must be valid."""
        rows = block * height + lax.iota(jnp.int32, height)
        return jnp.minimum(rows, ref.shape[0] - 1) if ref.shape[0] % height else rows

    rows, columns = rows_of(x_ref, row_block, tile_m), rows_of(w_ref, tile_id, tile)
    gate = _as_fragments(product(x_ref, rows, w_ref, columns, config.tile_k, jnp.float32))
    half, warp, low_row, lane = (lax.broadcasted_iota(jnp.int32, gate.shape[1:], axis) for axis in range(4))
    row = row_block * tile_m + warp * 16 + half * 8 + low_row
    _pack(
        _Tile(gate, row, lane, row_block, tile_id),
        (hits_ref, words_ref, *values_ref),
        run=_FRAGMENT_RUN,
        tokens=tokens,
        d_ff=d_ff,
        tile_m=tile_m,
        dtype=x_ref.dtype,
        slots=slots,
        rule=rule,
        interpret=interpret,
    )


def _as_fragments(acc: jax.Array) -> jax.Array:
    """(rows, T) to (T / 4, 2, rows / 16, 8, 4): how the tensor cores leave a tile in registers.

    The last two axes are the lane of a warp (four lanes share a row), axis 2 the warp, axes 0 and 1 a lane's
    own registers. In this order of axes the layout that Triton picks for scattered stores is the one that the
    values already have; in any other, values, addresses and masks take a trip through shared memory.
    """
    rows, tile = acc.shape
    lanes = acc.reshape(rows // 16, 2, 8, tile // 8, 4, 2).transpose(3, 5, 1, 0, 2, 4)
    return lanes.reshape(tile // 4, 2, rows // 16, 8, 4)


def pack_words(
    gate: jax.Array,
    *,
    d_ff: int,
    tile: int,
    slots: int,
    config: WordPackConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> tuple[TwELL, jax.Array]:
    """The active ones of rounded gates (M, F' >= F) in TwELL; columns past F = ``d_ff`` are ignored.

    Returns:
      The packed gates, and neuron_hits (F,) int32.
    """
    tokens = gate.shape[0]
    n_tiles, n_blocks = pl.cdiv(d_ff, tile), pl.cdiv(tokens, config.tile_m)
    shape = (tokens, n_tiles * slots)
    wide = gate.dtype.itemsize == 4
    run = min(16 // gate.dtype.itemsize, tile // _LANES)
    byte_counts, words, *values = pl.pallas_call(
        partial(
            _pack_kernel,
            d_ff=d_ff,
            tile=tile,
            slots=slots,
            run=run,
            config=config,
            rule=rule,
            interpret=interpret,
        ),
        out_shape=[
            varying_axes.output(gate, (n_blocks, n_tiles * tile // 4), jnp.uint32),
            varying_axes.output(gate, shape, jnp.uint32),
            *[varying_axes.output(gate, shape, jnp.float32)] * wide,
        ],
        grid=(n_blocks * n_tiles,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="twell_pack",
    )(gate)
    packed = TwELL(words, values[0] if wide else None, d_ff, tile, slots, gate.dtype)
    return packed, _neuron_hits(byte_counts, tile, d_ff, run)


def _pack_kernel(gate_ref, hits_ref, words_ref, *values_ref, d_ff, tile, slots, run, config, rule, interpret):
    (tokens, width), tile_m, n_tiles = gate_ref.shape, config.tile_m, pl.cdiv(d_ff, tile)
    row_block, tile_id = pl.program_id(0) // n_tiles, pl.program_id(0) % n_tiles
    # Triton deals the columns of the last axis out to the lanes first, 16 bytes each, then the rows: four
    # lanes a row and eight rows a warp, with all of the first axis in a lane's registers.
    chunk = _LANES * run
    column = lax.iota(jnp.int32, tile // chunk)[:, None] * chunk + lax.iota(jnp.int32, chunk)[None, :]
    column += tile_id * tile
    rows = row_block * tile_m + lax.iota(jnp.int32, tile_m)
    place = gate_ref.at[rows[None, :, None], column[:, None, :]]
    if tokens % tile_m or width % tile:
        inside = (rows < tokens)[None, :, None] & (column < width)[:, None, :]
        gate = plt.load(place, mask=inside, other=0)
    else:
        gate = plt.load(place)
    gate = gate.astype(jnp.float32).reshape(tile // chunk, tile_m, _LANES, run).transpose(0, 3, 1, 2)
    gate = gate.reshape(tile // _LANES, tile_m, _LANES)
    row, lane = (lax.broadcasted_iota(jnp.int32, gate.shape[1:], axis) for axis in range(2))
    _pack(
        _Tile(gate, row_block * tile_m + row, lane, row_block, tile_id),
        (hits_ref, words_ref, *values_ref),
        run=run,
        tokens=tokens,
        d_ff=d_ff,
        tile_m=tile_m,
        dtype=gate_ref.dtype,
        slots=slots,
        rule=rule,
        interpret=interpret,
    )


class _Tile(NamedTuple):
    """A tile of gates as the lanes hold it.

    Attributes:
      gate: (T / 4, ..., 4) f32, what each lane holds of a row.
      row, lane: (..., 4), the row of x and the lane among the four of a row.
      row_block, tile_id: which tile it is.
    """

    gate: jax.Array
    row: jax.Array
    lane: jax.Array
    row_block: jax.Array
    tile_id: jax.Array


def _pack(tile_of_gates: _Tile, outputs, *, run, tokens, d_ff, tile_m, dtype, slots, rule, interpret):
    """Writes a tile's words, its counts and its neurons' hit counts.

    A lane has ``run`` neighbouring columns of every ``4 run``.
    """
    gate, row, lane, row_block, tile_id = tile_of_gates
    hits_ref, words_ref, *values_ref = outputs
    tile = _LANES * gate.shape[0]
    first_column = tile_id * tile + run * lane

    def offset(nth):
        return nth // run * (_LANES * run) + nth % run

    def is_stored(value, nth):
        mask = ~(value <= rule.last_inactive(dtype))
        leading = (None,) * (value.ndim - row.ndim)
        if d_ff % tile:
            mask &= first_column[leading] + offset(nth) < d_ff
        return mask & (row < tokens)[leading] if tokens % tile_m else mask

    quads = _quads(is_stored(gate, lax.broadcasted_iota(jnp.int32, gate.shape, 0)))
    start, count = _slot_starts(quads)
    head = jnp.full(count.shape, tile_id * slots)
    head_row = jnp.max(row, axis=-1)
    plt.store(words_ref.at[head_row, head], count, mask=head_row < tokens)
    byte_counts = _sum_rows(quads).reshape(tile // 4)
    hits_ref[row_block, pl.ds(tile_id * (tile // 4), tile // 4)] = byte_counts

    # A row that overflows writes all it has to its first slot: nobody reads it, and no store needs a bound.
    step = (count < slots).astype(jnp.int32)[..., None]
    slot = tile_id * slots + 1 + start.astype(jnp.int32) * step
    step = jnp.broadcast_to(step, slot.shape)
    for nth, value in enumerate(lax.split(gate, (1,) * gate.shape[0], axis=0)):
        value = value.reshape(gate.shape[1:])
        mask = is_stored(value, nth)
        place = (row, scatter_index(slot, mask) if interpret else slot)
        word = (first_column + offset(nth)).astype(jnp.uint32)
        if values_ref:
            plt.store(values_ref[0].at[place], value, mask=mask)
        else:
            word += lax.bitcast_convert_type(value.astype(dtype), jnp.uint16).astype(jnp.uint32) << 16
        plt.store(words_ref.at[place], word, mask=mask)
        slot += jnp.where(mask, step, 0)


def _sum_rows(quads: jax.Array) -> jax.Array:
    """(T / 16, ..., 4) summed over the rows: those of a lane's own registers, then lanes, then warps."""
    if quads.ndim == 3:
        return jnp.sum(quads, axis=1)
    return jnp.sum(jnp.sum(jnp.sum(quads, axis=1), axis=2), axis=1)


def _quads(mask: jax.Array) -> jax.Array:
    """The mask with four of a lane's columns to a uint32, a byte each: (T / 4, ...) to (T / 16, ...)."""
    fours = mask.reshape(mask.shape[0] // 4, 4, *mask.shape[1:])
    shift = 8 * lax.broadcasted_iota(jnp.uint32, fours.shape, 1)
    return jnp.sum(fours.astype(jnp.uint32) << shift, axis=1)


def _slot_starts(quads: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Active gates of a row in the lanes before each lane (..., 4), and in all (...).

    One multiplication by 0x01010101 turns the bytes of a word into their running sums, without a scan across
    lanes. Only the last sum may pass 255, and it is not used.
    """
    count = jnp.sum((quads * _EACH_BYTE) >> 24, axis=0)
    shift = 8 * lax.broadcasted_iota(jnp.uint32, count.shape, count.ndim - 1)
    lanes = jnp.sum(count << shift, axis=-1, keepdims=True)
    return (((lanes * _EACH_BYTE) << 8) >> shift) & 0xFF, jnp.sum(count, axis=-1)


def _neuron_hits(byte_counts: jax.Array, tile: int, d_ff: int, run: int) -> jax.Array:
    """(F,) int32 from the programs' byte counts: one row a program, a tile's columns as lanes hold them."""
    each = lax.bitcast_convert_type(byte_counts, jnp.uint8).reshape(byte_counts.shape[0], -1)
    counts = jnp.sum(each, axis=0, dtype=jnp.int32).reshape(-1, tile)
    # A lane's columns, in the order in which it counts them, are runs of neighbours.
    of_lane = counts.reshape(-1, tile // 16, _LANES, 4).swapaxes(2, 3)
    runs = of_lane.reshape(-1, tile // (_LANES * run), run, _LANES).swapaxes(2, 3)
    return runs.reshape(-1)[:d_ff]
