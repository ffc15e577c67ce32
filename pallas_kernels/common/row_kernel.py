"""From packed gates to y in one pass over each token's non-zeros, in Pallas Triton: TwELL and HybridELL.

Why it exists (paper section 3.2): at n non-zeros a token, the other projections touch n rows of Wu and Wd
instead of F. Work: 4 n D FLOPs a token. Bytes: 4 n D gathered a token in 16 bits, nearly all from L2, plus x,
y and the sectors of words that hold something. L2 bandwidth bounds it: at n 30, D 2048 a token reads 246 KB.

One program owns one token: x and the running y stay in registers. The tiles' counts become offsets of one
flat list of non-zeros, walked ``entries`` at a time: that many rows of Wu and of Wd are in flight at once.
The next packed words are fetched a step ahead, because the address of a weight row depends on them.

With ``keep`` the walk also writes what a backward needs. Autodiff of the dense layer keeps g, u and h, 6 F
bytes a token in bf16 (33 KB at F 5632); here a token keeps up to W (index, gate, up) triples, 6 W bytes (768
at W 128), and its count. An entry's place in the flat list is its place in the token's row.

**Numerics.** f32 accumulation; g, u, h and y are rounded to the input type, where the reference rounds them,
so a row gives the same here and in the dense backup. f32 inputs multiply as IEEE f32. The order of a row's
entries is fixed by their columns: same input, same bits.

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
from pallas_kernels.common.row_config import RowsConfig
from pallas_kernels.common.triton_tiles import scatter_index
from pallas_kernels.formats import MAX_INDEX, TwELL


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


class RowOutputs(NamedTuple):
    """What `up_down` gives of each token.

    Attributes:
      y: (M, D) in x's type, zero for a row that overflows.
      l1: (M,) f32, sum_j |h_j|, zero for a row that overflows.
      nnz: (M,) int32, active gates, true also for a row that overflows.
      overflows: (M,) bool, whether a tile of the row holds more than S - 1 active gates, or the row more than
        the width asked for.
      ell: what a backward needs, or None if nobody asked.
    """

    y: jax.Array
    l1: jax.Array
    nnz: jax.Array
    overflows: jax.Array
    ell: Ell | None


def up_down(
    packed: TwELL,
    x: jax.Array,
    w_up: jax.Array | None,
    w_down: jax.Array,
    *,
    config: RowsConfig,
    name: str,
    rule: Rule = RELU,
    width: int | None = None,
    keep: bool = False,
    interpret: bool = False,
) -> RowOutputs:
    """``y = h Wd`` with ``h = a(g) b(x Wu^T)``, or ``h = a(g)`` without w_up: x (M, D), weights (F, D).

    Args:
      packed: the gates. Tiles of more than 65,536 neurons in all are numbered from 0 again every 65,536.
      name: of the kernel, in profiles.
      width: W; a row with more non-zeros overflows. By default a row may have any number.
      keep: whether to write what a backward needs, at most ``width`` entries a row.
    """
    (tokens, d_model), d_ff = x.shape, w_down.shape[0]
    stored = [packed.words] if packed.values is None else [packed.words, packed.values]
    operands = [w_down] if w_up is None else [x, w_up, w_down]
    kept: list[tuple[tuple[int, int], jax.typing.DTypeLike]] = []
    if keep:
        assert width is not None, "a row of entries has a width"
        index_type = jnp.uint16 if d_ff <= MAX_INDEX else jnp.int32
        types = [index_type, x.dtype] + [x.dtype] * (w_up is not None)
        kept = [((tokens, width), dtype) for dtype in types]
    output = partial(varying_axes.output, packed.words)
    geometry = {"tile": packed.tile, "slots": packed.slots, "n_tiles": packed.n_tiles, "dtype": x.dtype}
    y, l1, nnz, overflows, *ell = pl.pallas_call(
        partial(_kernel, **geometry, gated=w_up is not None, width=width, rule=rule, config=config),
        out_shape=(
            output((tokens, d_model), x.dtype),
            output((tokens,), jnp.float32),
            output((tokens,), jnp.int32),
            output((tokens,), jnp.int32),
            *[output(*shape_and_type) for shape_and_type in kept],
        ),
        grid=(tokens,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name=name,
    )(*stored, *operands)
    if not keep:
        return RowOutputs(y, l1, nnz, overflows > 0, None)
    indices, gate, *up = ell
    return RowOutputs(y, l1, nnz, overflows > 0, Ell(indices, gate, up[0] if up else None, nnz))


def _kernel(words_ref, *refs, tile, slots, n_tiles, dtype, gated, width, rule, config):
    values_ref, refs = (refs[0], refs[1:]) if dtype == jnp.float32 else (None, refs)
    operands, refs = (refs[:3], refs[3:]) if gated else (refs[:1], refs[1:])
    (y_ref, l1_ref, nnz_ref, overflows_ref, *ell_refs), down_ref = refs, operands[-1]
    row, entries = pl.program_id(0), config.entries
    d_ff, d_model = down_ref.shape
    column = lax.iota(jnp.int32, pl.next_power_of_2(d_model))
    in_row = column < d_model

    start, nnz, overflows = _offsets(words_ref, row, n_tiles, slots)
    if width is not None:
        overflows |= nnz > width
    total = jnp.where(overflows, 0, nnz)
    if gated:
        x_ref, up_ref, _ = operands
        x = plt.load(x_ref.at[row, column], mask=in_row, other=0).astype(jnp.float32)
    if ell_refs:
        # Before the entries, and where they do not come: no two stores meet.
        unused = lax.iota(jnp.int32, pl.next_power_of_2(width))
        for ref in ell_refs:
            zero = jnp.zeros(unused.shape, ref.dtype)
            store_in_row(ref, row, unused, zero, (unused >= total) & (unused < width))

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
        # Both weights' rows are asked for before the first is waited for: the compiler need not move loads
        # over the sum's barriers.
        weights = [up_ref, down_ref] if gated else [down_ref]
        *up_rows, down_rows = (gather_rows(ref, neuron, column, mask) for ref in weights)
        h, kept = gate, [neuron, gate]
        if rule.squared:
            h = rule.value(h.astype(jnp.float32)).astype(dtype)
        if gated:
            up = jnp.sum(up_rows[0].astype(jnp.float32) * x[None, :], axis=1).astype(dtype)
            h = (h.astype(jnp.float32) * rule.up(up.astype(jnp.float32))).astype(dtype)
            kept.append(up)
        h = jnp.where(used, h.astype(jnp.float32), 0)  # past the end, 0 times an infinite x is not 0
        y = y + jnp.sum(h[:, None] * down_rows.astype(jnp.float32), axis=0)
        for ref, value in zip(ell_refs, kept, strict=False):
            store_in_row(ref, row, nth, value.astype(ref.dtype), used)
        return y, l1 + jnp.sum(jnp.abs(h)), *following

    steps = (total + entries - 1) // entries
    carry = (jnp.zeros(column.shape, jnp.float32), jnp.float32(0), *fetch(jnp.int32(0)))
    y, l1, _, _ = lax.fori_loop(jnp.int32(0), steps, body, carry)
    plt.store(y_ref.at[row, column], y.astype(y_ref.dtype), mask=in_row)
    l1_ref[row] = l1
    nnz_ref[row] = nnz
    overflows_ref[row] = overflows.astype(jnp.int32)


def _offsets(words_ref, row, n_tiles, slots):
    """Where each tile's non-zeros start in the row's flat list, how many there are,
    and whether a tile overflows."""
    tile_id = lax.iota(jnp.int32, pl.next_power_of_2(n_tiles))  # those past the last are empty
    head = jnp.where(tile_id < n_tiles, tile_id, 0) * slots
    counts = plt.load(words_ref.at[row, head], mask=tile_id < n_tiles, other=0).astype(jnp.int32)
    return jnp.cumsum(counts) - counts, jnp.sum(counts), jnp.max(counts) >= slots


def gather_rows(ref, rows: jax.Array, columns: jax.Array, mask: jax.Array) -> jax.Array:
    """(rows, columns) of an array, 0 where masked."""
    return plt.load(ref.at[rows[:, None], columns[None, :]], mask=mask, other=0)


def store_in_row(ref, row: jax.Array, place: jax.Array, value: jax.Array, mask: jax.Array) -> None:
    """Stores a vector's masked elements at places of one row."""
    plt.store(ref.at[row, scatter_index(place, mask)], value, mask=mask)
