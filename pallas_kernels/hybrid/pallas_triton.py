"""The forward kernels of HybridELL in Pallas Triton: TwELL's packing gate, and one pass from it to all else.

**`gate_pack`** is TwELL's, with slots enough that a tile overflows only in a row of more than W non-zeros.
Why it exists, FLOPs and bytes: there. Its words are read by the next kernel and then gone: they are no
residual.

**`up_down`**. Why it exists: autodiff of the dense layer keeps g, u and h, 6 F bytes a token in bf16 (33 KB
at F 5632). Here a token keeps its W (index, gate, up) triples, 6 W bytes (768 at W 128), and its count. The
kernel that walks the non-zeros has all three in registers. Work: 4 n D FLOPs a token, n its non-zeros. Bytes:
4 n D gathered, nearly all from L2, which bounds it; beside it x, y, the sectors of words that hold something,
and 6 W written.

One program owns one token: x and the running y stay in registers. The tiles' counts become offsets of one
flat list of non-zeros, walked ``entries`` at a time: that many rows of Wu and of Wd are in flight at once,
and the next packed words are fetched a step ahead, because the address of a weight row depends on them. The
place in that list is also the place in the token's ELL row: this is where tiles become rows. A row with more
than W non-zeros is skipped: the dense backup computes it.

**Numerics.** f32 accumulation; g, u, h and y are rounded to the input type, where the reference rounds them.
f32 inputs multiply as IEEE f32. The order of a row's entries is fixed by their columns: same input, same
bits.

**Limits.** Block sizes are powers of two, and a program holds D, padded to one; an NVIDIA GPU of compute
capability 8.0 or newer.
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
from pallas_kernels.formats import MAX_INDEX, TwELL
from pallas_kernels.hybrid.config import HybridConfig, RowsConfig
from pallas_kernels.twell import pallas_triton as twell

_OUT_OF_RANGE = 1 << 30


class Ell(NamedTuple):
    """The non-zeros of every token: `HybridELL` with two values an index, and no dense rows.

    Row i holds ``nnz[i]`` entries if they are at most W, and nothing otherwise. Unused entries are zero.

    Attributes:
      indices: (M, W) uint16, or int32 where F > 65,536.
      gate: (M, W) in x's type, the rounded gates.
      up: (M, W) in x's type; None for a non-gated layer.
      nnz: (M,) int32, always true.
    """

    indices: jax.Array
    gate: jax.Array
    up: jax.Array | None
    nnz: jax.Array

    @property
    def width(self) -> int:
        return self.indices.shape[1]

    @property
    def overflows(self) -> jax.Array:
        """(M,) bool, rows with more than W non-zeros."""
        return self.nnz > self.width


class Rows(NamedTuple):
    """What `up_down` gives of each token.

    Attributes:
      y: (M, D) in x's type, zero for a row that overflows.
      l1: (M,) f32, sum_j |h_j|, zero for a row that overflows.
      nnz: (M,) int32, active gates, true also for a row that overflows.
      ell: what the backward needs, or None if nobody asked.
    """

    y: jax.Array
    l1: jax.Array
    nnz: jax.Array
    ell: Ell | None


def gate_pack(
    x: jax.Array, w_gate: jax.Array, *, config: HybridConfig, rule: Rule = RELU, interpret: bool = False
) -> tuple[TwELL, jax.Array]:
    """The active gates of ``x Wg^T`` in words that `up_down` reads: x (M, D), w_gate (F, D) of one type.

    A word names its neuron by the low 16 bits of the index; the tile that it stands in knows the others. So
    an F over 65,536 is packed in pieces of that many.

    Returns:
      The packed gates, and neuron_hits (F,) int32.
    """
    d_ff = w_gate.shape[0]
    pack = partial(
        twell.gate_pack,
        tile=config.tile,
        slots=config.slots,
        config=config.gate_pack,
        rule=rule,
        interpret=interpret,
    )
    pieces = [pack(x, w_gate[start : start + MAX_INDEX]) for start in range(0, d_ff, MAX_INDEX)]
    if len(pieces) == 1:
        return pieces[0]
    packed, hits = zip(*pieces, strict=True)
    words = jnp.concatenate([piece.words for piece in packed], axis=1)
    values = [piece.values for piece in packed if piece.values is not None]
    joined = jnp.concatenate(values, axis=1) if values else None
    return TwELL(words, joined, d_ff, config.tile, config.slots, x.dtype), jnp.concatenate(hits)


def up_down(
    packed: TwELL,
    x: jax.Array,
    w_up: jax.Array | None,
    w_down: jax.Array,
    *,
    width: int,
    keep: bool,
    config: RowsConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> Rows:
    """``y = h Wd`` with ``h = a(g) b(x Wu^T)``, or ``h = a(g)`` without w_up: x (M, D), weights (F, D).

    Args:
      width: W; a row with more non-zeros comes out as zero.
      keep: whether to write what the backward needs.
    """
    (tokens, d_model), d_ff = x.shape, w_down.shape[0]
    stored = [packed.words] if packed.values is None else [packed.words, packed.values]
    operands = [w_down] if w_up is None else [x, w_up, w_down]
    index_type = jnp.uint16 if d_ff <= MAX_INDEX else jnp.int32
    kept = [index_type, x.dtype] + [x.dtype] * (w_up is not None) if keep else []
    output = partial(varying_axes.output, packed.words)
    geometry = {"tile": packed.tile, "slots": packed.slots, "n_tiles": packed.n_tiles}
    static = {"gated": w_up is not None, "width": width, "keep": keep, "rule": rule, "config": config}
    y, l1, nnz, *ell = pl.pallas_call(
        partial(_rows_kernel, **geometry, **static),
        out_shape=(
            output((tokens, d_model), x.dtype),
            output((tokens,), jnp.float32),
            output((tokens,), jnp.int32),
            *[output((tokens, width), dtype) for dtype in kept],
        ),
        grid=(tokens,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="hybrid_down" if w_up is None else "hybrid_up_down",
    )(*stored, *operands)
    if not keep:
        return Rows(y, l1, nnz, None)
    indices, gate, *up = ell
    return Rows(y, l1, nnz, Ell(indices, gate, up[0] if up else None, nnz))


def _rows_kernel(words_ref, *refs, tile, slots, n_tiles, gated, width, keep, rule, config):
    dtype = refs[0].dtype  # that of x or a weight, or f32 where that is the values' type
    values_ref, refs = (refs[0], refs[1:]) if dtype == jnp.float32 else (None, refs)
    operands, (y_ref, l1_ref, nnz_ref, *ell_refs) = (refs[:3], refs[3:]) if gated else (refs[:1], refs[1:])
    down_ref = operands[-1]
    row, entries = pl.program_id(0), config.entries
    d_ff, d_model = down_ref.shape
    column = lax.iota(jnp.int32, pl.next_power_of_2(d_model))
    in_row = column < d_model

    start, nnz = _offsets(words_ref, row, n_tiles, slots)
    total = jnp.where(nnz > width, 0, nnz)
    if gated:
        x_ref, up_ref, _ = operands
        x = plt.load(x_ref.at[row, column], mask=in_row, other=0).astype(jnp.float32)
    if keep:
        # Before the entries, and where they do not come: no two stores meet.
        unused = lax.iota(jnp.int32, pl.next_power_of_2(width))
        for ref in ell_refs:
            store(ref, row, unused, jnp.zeros(unused.shape, ref.dtype), (unused >= total) & (unused < width))

    def fetch(step):
        """Neuron and gate of each entry of a step, 0 past the end."""
        nth = step * entries + lax.iota(jnp.int32, entries)
        before = start[None, :] <= nth[:, None]
        tile_id = jnp.sum(before.astype(jnp.int32), axis=1) - 1
        first = jnp.max(jnp.where(before, start[None, :], 0), axis=1)
        slot = jnp.where(nth < total, tile_id * slots + 1 + nth - first, 0)
        word = plt.load(words_ref.at[row, slot], mask=nth < total, other=0)
        neuron = (word & 0xFFFF).astype(jnp.int32)
        if d_ff > MAX_INDEX:
            neuron += jnp.where(nth < total, tile_id * tile // MAX_INDEX * MAX_INDEX, 0)
        if values_ref is None:
            return neuron, lax.bitcast_convert_type((word >> 16).astype(jnp.uint16), dtype)
        return neuron, plt.load(values_ref.at[row, slot], mask=nth < total, other=0)

    def body(step, carry):
        y, l1, neuron, gate = carry
        nth = step * entries + lax.iota(jnp.int32, entries)
        used = nth < total
        mask = used[:, None] & in_row[None, :]
        following = fetch(step + 1)
        h = gate.astype(jnp.float32)
        if rule.squared:
            h = rule.value(h).astype(dtype).astype(jnp.float32)
        kept = [neuron, gate]
        if gated:
            up = jnp.sum(gather(up_ref, neuron, column, mask) * x[None, :], axis=1).astype(dtype)
            h = (h * rule.up(up.astype(jnp.float32))).astype(dtype).astype(jnp.float32)
            kept.append(up)
        h = jnp.where(used, h, 0)  # past the end, 0 times an infinite x is not 0
        y = y + jnp.sum(h[:, None] * gather(down_ref, neuron, column, mask), axis=0)
        for ref, value in zip(ell_refs, kept, strict=False):
            store(ref, row, nth, value.astype(ref.dtype), used)
        return y, l1 + jnp.sum(jnp.abs(h)), *following

    steps = (total + entries - 1) // entries
    carry = (jnp.zeros(column.shape, jnp.float32), jnp.float32(0), *fetch(jnp.int32(0)))
    y, l1, _, _ = lax.fori_loop(jnp.int32(0), steps, body, carry)
    plt.store(y_ref.at[row, column], y.astype(y_ref.dtype), mask=in_row)
    l1_ref[row] = l1
    nnz_ref[row] = nnz


def _offsets(words_ref, row, n_tiles, slots):
    """Where each tile's non-zeros start in the row's flat list, and how many there are."""
    tile_id = lax.iota(jnp.int32, pl.next_power_of_2(n_tiles))  # those past the last are empty
    head = jnp.where(tile_id < n_tiles, tile_id, 0) * slots
    counts = plt.load(words_ref.at[row, head], mask=tile_id < n_tiles, other=0).astype(jnp.int32)
    return jnp.cumsum(counts) - counts, jnp.sum(counts)


def gather(ref, rows, columns, mask):
    """(rows, columns) of an array in f32, 0 where masked."""
    return plt.load(ref.at[rows[:, None], columns[None, :]], mask=mask, other=0).astype(jnp.float32)


def store(ref, row, place, value, mask):
    """Stores into one row. The interpreter would rewrite masked lanes: they go out of range."""
    plt.store(ref.at[row, jnp.where(mask, place, _OUT_OF_RANGE)], value, mask=mask)
