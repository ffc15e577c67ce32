"""The two TwELL kernels in Pallas Triton: the gate GEMM that packs its own output,
and up and down in one pass.

**`gate_pack`** (paper section 3.1). Why it exists: XLA writes the (M, F) gate and reads it again to compress
it; at M 65,536 and F 5632 that is 0.74 GB written and 0.74 GB read, a third of the GEMM's own time. Here the
tile that a program holds in registers leaves it as packed words. Work: 2 M F D FLOPs. Bytes: 2 (M D + F D)
read, 4 M F / C reserved, of which only the 32-byte sectors that hold a count or a non-zero are written.

A program owns ``tile_m`` rows of one TwELL tile. The tensor cores leave each lane of a warp two neighbouring
columns out of every eight, four lanes to a row. Slot order inside a tile is free, so a lane's own columns
come first: a lane counts its non-zeros, learns from the other three of its row where its slots start, and
then walks its columns with a running slot and one predicated store each. The mask, four columns to a word as
bytes, is summed twice: along a row it gives the counts, along a column the neurons' hits.

**`up_down`, `down`** (paper section 3.2). Why they exist: at n non-zeros a token, the other projections touch
n rows of Wu and Wd instead of F. Work: 4 n D FLOPs a token. Bytes: 4 n D gathered a token, nearly all from
L2, plus x, y and the packed words. L2 bandwidth bounds it: at n 30, D 2048 a token reads 246 KB.

One program owns one token: x and the running y stay in registers. The tiles' counts become offsets of one
flat list of non-zeros, walked ``entries`` at a time: that many rows of Wu and of Wd are in flight at once,
and the next packed words are fetched a step ahead, because the address of a weight row depends on them.

**Numerics.** f32 accumulation; the gate is rounded to the input type before its sign is read, as in the
reference; u and h are rounded where the reference rounds them, so that no result depends on which rows fit;
y is rounded once. f32 inputs multiply as IEEE f32.

**Limits.** Block sizes are powers of two, and `up_down` holds D, padded to one, in a program; an NVIDIA GPU
of compute capability 8.0 or newer.
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
from pallas_kernels.formats import TwELL
from pallas_kernels.twell.config import GatePackConfig, UpDownConfig

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_OUT_OF_RANGE = 1 << 30
_EACH_BYTE = 0x01010101


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
    return packed, _neuron_hits(byte_counts, tile, d_ff)


def _gate_kernel(x_ref, w_ref, hits_ref, words_ref, *values_ref, tile, slots, config, rule, interpret):
    tokens, d_model = x_ref.shape
    n_blocks, n_tiles = pl.cdiv(tokens, config.tile_m), pl.cdiv(w_ref.shape[0], tile)
    row_block, tile_id = _grouped_order(pl.program_id(0), n_blocks, n_tiles, config.group_m)
    product = partial(_product, x_ref, w_ref, row_block * config.tile_m, tile_id * tile, config.tile_m, tile)
    zero = jnp.zeros((config.tile_m, tile), jnp.float32)
    whole = d_model // config.tile_k
    acc = lax.fori_loop(0, whole, lambda i, acc: acc + product(i * config.tile_k, config.tile_k, False), zero)
    if d_model % config.tile_k:
        acc += product(whole * config.tile_k, config.tile_k, True)
    outputs = (hits_ref, words_ref, *values_ref)
    _pack(acc, row_block, tile_id, tokens, w_ref.shape[0], x_ref.dtype, slots, outputs, rule, interpret)


def _product(x_ref, w_ref, row, column, tile_m, tile, k, tile_k, masked):
    """x[row : row + tile_m, k : k + tile_k] times the same columns of w[column : column + tile], in f32.

    Rows past the end repeat the last one: their results are masked later, their addresses must be valid.
    """
    depth = (k + lax.iota(jnp.int32, tile_k))[None, :]

    def load(ref, start, height):
        rows = (start + lax.iota(jnp.int32, height))[:, None]
        if ref.shape[0] % height:
            rows = jnp.minimum(rows, ref.shape[0] - 1)
        if not masked:
            return plt.load(ref.at[rows, depth])
        inside = jnp.broadcast_to(depth < ref.shape[1], (height, tile_k))
        return plt.load(ref.at[rows, depth], mask=inside, other=0)

    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    a, b = load(x_ref, row, tile_m), load(w_ref, column, tile)
    return lax.dot_general(a, b, _CONTRACT_LAST, precision=precision, preferred_element_type=jnp.float32)


def _pack(acc, row_block, tile_id, tokens, d_ff, dtype, slots, outputs, rule, interpret):
    """Writes one tile (rows, T) of f32 gates: its words, its counts and its neurons' hit counts."""
    hits_ref, words_ref, *values_ref = outputs
    tile_m, tile = acc.shape
    gate = _as_fragments(acc)
    half, warp, low_row, lane = (lax.broadcasted_iota(jnp.int32, gate.shape[1:], axis) for axis in range(4))
    row = row_block * tile_m + warp * 16 + half * 8 + low_row
    first_column = tile_id * tile + 2 * lane

    def is_stored(value, nth):
        mask = ~(value <= rule.last_inactive(dtype))
        leading = (None,) * (value.ndim - row.ndim)
        if d_ff % tile:
            mask &= first_column[leading] + (nth // 2 * 8 + nth % 2) < d_ff
        return mask & (row < tokens)[leading] if tokens % tile_m else mask

    quads = _quads(is_stored(gate, lax.broadcasted_iota(jnp.int32, gate.shape, 0)))
    start, count = _slot_starts(quads)
    head = jnp.full(count.shape, tile_id * slots)
    head_row = jnp.max(row, axis=3)
    plt.store(words_ref.at[head_row, head], count, mask=head_row < tokens)
    byte_counts = jnp.sum(jnp.sum(jnp.sum(quads, axis=1), axis=2), axis=1).reshape(tile // 4)
    hits_ref[row_block, pl.ds(tile_id * (tile // 4), tile // 4)] = byte_counts

    # A row that overflows writes all it has to its first slot: nobody reads it, and no store needs a bound.
    step = (count < slots).astype(jnp.int32)[..., None]
    slot = tile_id * slots + 1 + start.astype(jnp.int32) * step
    step = jnp.broadcast_to(step, slot.shape)
    for nth, value in enumerate(lax.split(gate, (1,) * gate.shape[0], axis=0)):
        value = value.reshape(gate.shape[1:])
        mask = is_stored(value, nth)
        # The interpreter's masked scatter also rewrites masked lanes: send those out of range.
        place = (row, jnp.where(mask, slot, _OUT_OF_RANGE) if interpret else slot)
        word = (first_column + (nth // 2 * 8 + nth % 2)).astype(jnp.uint32)
        if values_ref:
            plt.store(values_ref[0].at[place], value, mask=mask)
        else:
            word += lax.bitcast_convert_type(value.astype(dtype), jnp.uint16).astype(jnp.uint32) << 16
        plt.store(words_ref.at[place], word, mask=mask)
        slot += jnp.where(mask, step, 0)


def _grouped_order(
    program: jax.Array, n_rows: int, n_columns: int, group: int
) -> tuple[jax.Array, jax.Array]:
    """Programs in bands of ``group`` row blocks, so that those running at one time share operands in L2."""
    band = program // (group * n_columns)
    height = jnp.minimum(n_rows - band * group, group)
    within = program % (group * n_columns)
    return band * group + within % height, within // height


def _as_fragments(acc: jax.Array) -> jax.Array:
    """(rows, T) to (T / 4, 2, rows / 16, 8, 4): how the tensor cores leave a tile in registers.

    The last two axes are the lane of a warp (four lanes share a row), axis 2 the warp, axes 0 and 1 a lane's
    own registers. In this order of axes the layout that Triton picks for scattered stores is the one that the
    values already have; in any other, values, addresses and masks take a trip through shared memory.
    """
    rows, tile = acc.shape
    lanes = acc.reshape(rows // 16, 2, 8, tile // 8, 4, 2).transpose(3, 5, 1, 0, 2, 4)
    return lanes.reshape(tile // 4, 2, rows // 16, 8, 4)


def _quads(mask: jax.Array) -> jax.Array:
    """The mask with four of a lane's columns to a uint32, a byte each: (T / 4, ...) to (T / 16, ...)."""
    fours = mask.reshape(mask.shape[0] // 4, 4, *mask.shape[1:])
    shift = 8 * lax.broadcasted_iota(jnp.uint32, fours.shape, 1)
    return jnp.sum(fours.astype(jnp.uint32) << shift, axis=1)


def _slot_starts(quads: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Active gates of a row in the lanes before each lane (2, rows / 16, 8, 4), and in all (2, rows / 16, 8).

    One multiplication by 0x01010101 turns the bytes of a word into their running sums, without a scan across
    lanes. Only the last sum may pass 255, and it is not used.
    """
    count = jnp.sum((quads * _EACH_BYTE) >> 24, axis=0)
    shift = 8 * lax.broadcasted_iota(jnp.uint32, count.shape, 3)
    lanes = jnp.sum(count << shift, axis=3, keepdims=True)
    return (((lanes * _EACH_BYTE) << 8) >> shift) & 0xFF, jnp.sum(count, axis=3)


def _neuron_hits(byte_counts: jax.Array, tile: int, d_ff: int) -> jax.Array:
    """(F,) int32 from the programs' byte counts: one byte a column, regrouped, one row a program."""
    each = lax.bitcast_convert_type(byte_counts, jnp.uint8).reshape(byte_counts.shape[0], -1)
    counts = jnp.sum(each, axis=0, dtype=jnp.int32)
    columns = counts.reshape(-1, tile // 16, 4, 2, 2).transpose(0, 1, 3, 2, 4)
    return columns.reshape(-1)[:d_ff]


class Rows(NamedTuple):
    """What `up_down` and `down` give of each token.

    Attributes:
      y: (M, D) in x's type, zero for a row that overflows.
      l1: (M,) f32, sum_j |h_j|, zero for a row that overflows.
      nnz: (M,) int32, active gates, true also for a row that overflows.
      overflows: (M,) bool, whether a tile of the row holds more than S - 1 active gates.
    """

    y: jax.Array
    l1: jax.Array
    nnz: jax.Array
    overflows: jax.Array


def up_down(
    packed: TwELL,
    x: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    config: UpDownConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> Rows:
    """``y = h Wd`` with ``h = a(g) b(x Wu^T)`` over packed gates: x (M, D), weights (F, D) of one type."""
    return _over_rows(packed, (x, w_up, w_down), config, rule, interpret, "twell_up_down")


def down(
    packed: TwELL,
    w_down: jax.Array,
    *,
    config: UpDownConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> Rows:
    """``y = a(g) Wd`` over the packed gates (non-gated layer)."""
    return _over_rows(packed, (w_down,), config, rule, interpret, "twell_down")


def _over_rows(packed, operands, config, rule, interpret, name):
    tokens, d_model = packed.words.shape[0], operands[-1].shape[1]
    stored = [packed.words] if packed.values is None else [packed.words, packed.values]
    output = partial(varying_axes.output, packed.words)
    geometry = {"n_tiles": packed.n_tiles, "slots": packed.slots, "dtype": packed.dtype}
    y, l1, nnz, overflows = pl.pallas_call(
        partial(_rows_kernel, **geometry, gated=len(operands) == 3, rule=rule, config=config),
        out_shape=(
            output((tokens, d_model), operands[-1].dtype),
            output((tokens,), jnp.float32),
            output((tokens,), jnp.int32),
            output((tokens,), jnp.int32),
        ),
        grid=(tokens,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name=name,
    )(*stored, *operands)
    return Rows(y, l1, nnz, overflows > 0)


def _rows_kernel(words_ref, *refs, n_tiles, slots, dtype, gated, rule, config):
    *inputs, y_ref, l1_ref, nnz_ref, overflows_ref = refs
    down_ref = inputs.pop()
    values_ref = inputs[0] if dtype == jnp.float32 else None
    row = pl.program_id(0)
    d_model = down_ref.shape[1]
    width = pl.next_power_of_2(d_model)
    column = lax.iota(jnp.int32, width)
    in_row = column < d_model
    entries = config.entries

    start, nnz, overflows = _offsets(words_ref, row, n_tiles, slots)
    total = jnp.where(overflows, 0, nnz)
    if gated:
        x_ref, up_ref = inputs[-2:]
        x = plt.load(x_ref.at[row, column], mask=in_row, other=0).astype(jnp.float32)

    def fetch(step):
        """The packed words of one step: neuron and gate value of each entry, 0 past the end."""
        nth = step * entries + lax.iota(jnp.int32, entries)
        before = start[None, :] <= nth[:, None]
        tile = jnp.sum(before.astype(jnp.int32), axis=1) - 1
        first = jnp.max(jnp.where(before, start[None, :], 0), axis=1)
        slot = tile * slots + 1 + nth - first
        slot = jnp.where(nth < total, slot, 0)
        word = plt.load(words_ref.at[row, slot], mask=nth < total, other=0)
        if values_ref is None:
            bits = (word >> 16).astype(jnp.uint16)
            value = lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)
        else:
            value = plt.load(values_ref.at[row, slot], mask=nth < total, other=0)
        return (word & 0xFFFF).astype(jnp.int32), value

    def gather(weight_ref, neuron, mask):
        rows = weight_ref.at[neuron[:, None], column[None, :]]
        return plt.load(rows, mask=mask, other=0).astype(jnp.float32)

    def rounded(values):
        return values.astype(dtype).astype(jnp.float32)

    def body(step, carry):
        y, l1, neuron, value = carry
        used = (step * entries + lax.iota(jnp.int32, entries)) < total
        mask = used[:, None] & in_row[None, :]
        following = fetch(step + 1)
        h = rounded(rule.value(value)) if rule.squared else value
        if gated:
            up = rounded(jnp.sum(gather(up_ref, neuron, mask) * x[None, :], axis=1))
            h = jnp.where(used, rounded(h * rule.up(up)), 0)  # past the end, 0 times an infinite x is not 0
        y = y + jnp.sum(h[:, None] * gather(down_ref, neuron, mask), axis=0)
        return y, l1 + jnp.sum(jnp.abs(h)), *following

    steps = (total + entries - 1) // entries
    carry = (jnp.zeros((width,), jnp.float32), jnp.float32(0), *fetch(jnp.int32(0)))
    y, l1, _, _ = lax.fori_loop(jnp.int32(0), steps, body, carry)
    plt.store(y_ref.at[row, column], y.astype(y_ref.dtype), mask=in_row)
    l1_ref[row] = l1
    nnz_ref[row] = nnz
    overflows_ref[row] = overflows.astype(jnp.int32)


def _offsets(words_ref, row, n_tiles, slots):
    """Where each tile's non-zeros start in the row's flat list, how many there are,
    and whether a tile overflows."""
    tile = lax.iota(jnp.int32, pl.next_power_of_2(n_tiles))  # those past the last are empty
    head = jnp.where(tile < n_tiles, tile, 0) * slots
    counts = plt.load(words_ref.at[row, head], mask=tile < n_tiles, other=0).astype(jnp.int32)
    return jnp.cumsum(counts) - counts, jnp.sum(counts), jnp.max(counts) >= slots
