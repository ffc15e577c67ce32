"""The backward kernels of HybridELL in Pallas Triton: along each token's non-zeros, and along each neuron's.

**`pull_rows`**, one program a token. Why it exists: dh, dg and du are wanted at the non-zeros only, and once
a weight row's address is known the rows of all three weights can be in flight together. Work: 6 n D FLOPs a
token. Bytes: 6 n D gathered a token, nearly all from L2, which bounds it; beside it dy, dx and the triples,
read and written.

**`by_neuron`** transposes the structure: a radix sort of (neuron, place) pairs, in XLA. Stable, so a neuron's
tokens ascend. 2 M W slots are sorted with the unused ones, which go last: at M 16,384 and W 128, 2 million
pairs.

**`pull_weights`**, one program a neuron and a slice of D. Why it exists: a dense weight gradient is 2 M F D
FLOPs; here it is 2 n M D, without the (M, F) operand. It walks the neuron's tokens, gathers rows of x and dy,
and holds all three gradients of the neuron in registers: 4 n M D bytes gathered for 6 n M D FLOPs. Programs
run slice by slice, so that a slice of x and dy stays in L2, and in a slice the longest lists first, so that
no long one is left last. No two programs write one value and none is added in memory: the same input gives
the same bits.

A few neurons hold most non-zeros (the top 5 % hold 34 to 100 % of them: MEASURED.md), and a neuron active for
every token would be one long program. So the ``hot`` most active ones take another way: their columns of dg,
du and h as dense (M, hot) matrices, and 6 M hot D FLOPs on tensor cores (`hot_gradients`).

**Numerics.** f32 accumulation over all tokens, one rounding at the end, to the type asked for; the two terms
of dh are added in f32 and rounded once to the input type, then dg and du, as in the reference; dx is rounded
once, where the reference rounds each of its two terms.

**Limits.** As the forward; M W under 2^31.
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
from pallas_kernels.common.row_kernel import Ell, gather_rows, store_in_row
from pallas_kernels.hybrid.config import NeuronSumConfig

MAX_ENTRIES = (1 << 31) - 1
"""Slots M W that `by_neuron` can number."""


class Pulled(NamedTuple):
    """The gradients at the non-zeros, and what they give to x.

    Attributes:
      dx: (M, D) in x's type, zero for a row that overflows.
      d_gate: (M, W) dg; meaningless past a row's entries, as the next two.
      d_up: (M, W) du; None for a non-gated layer.
      h: (M, W).
    """

    dx: jax.Array
    d_gate: jax.Array
    d_up: jax.Array | None
    h: jax.Array


def pull_rows(
    ell: Ell,
    dy: jax.Array,
    scale: jax.Array | None,
    w_gate: jax.Array,
    w_up: jax.Array | None,
    w_down: jax.Array,
    *,
    config: RowsConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> Pulled:
    """``dh = dy Wd^T + sign(h) scale`` at the non-zeros, from it dg and du, and ``dx = dg Wg + du Wu``.

    Args:
      dy: (M, D).
      scale: f32, the cotangent of every |h|: (1,), or (M,) for that of each token; None for none.
      w_gate, w_up, w_down: (F, D); the gate's weight and None for a non-gated layer.
    """
    gated = w_up is not None
    stored = [ell.nnz, ell.indices, ell.gate] + [ell.up] * gated
    weights = [w_gate] + [w_up] * gated + [w_down]
    scales = [] if scale is None else [scale]
    terms = 3 if gated else 1 + rule.squared
    output = partial(varying_axes.output, dy)
    dx, d_gate, *rest = pl.pallas_call(
        partial(_pull_rows_kernel, gated=gated, scaled=scale is not None, rule=rule, config=config),
        out_shape=(output(dy.shape, dy.dtype), *[output(ell.gate.shape, dy.dtype)] * terms),
        grid=(dy.shape[0],),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="hybrid_dx",
    )(*stored, dy, *scales, *weights)
    return Pulled(dx, d_gate, *rest) if gated else Pulled(dx, d_gate, None, rest[0] if rest else ell.gate)


def _wide_rows(ref, rows, columns, mask):
    """`gather_rows` in f32."""
    return gather_rows(ref, rows, columns, mask).astype(jnp.float32)


def _pull_rows_kernel(nnz_ref, indices_ref, *refs, gated, scaled, rule, config):
    kept_refs, refs = (refs[:2], refs[2:]) if gated else (refs[:1], refs[1:])
    dy_ref, refs = refs[0], refs[1:]
    scale_ref, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    (*inner_refs, down_ref), (dx_ref, *out_refs) = (refs[:3], refs[3:]) if gated else (refs[:2], refs[2:])
    row, entries, dtype = pl.program_id(0), config.entries, dy_ref.dtype
    d_model, width = dy_ref.shape[1], indices_ref.shape[1]
    column = lax.iota(jnp.int32, pl.next_power_of_2(d_model))
    in_row = column < d_model
    nnz = nnz_ref[row]
    total = jnp.where(nnz > width, 0, nnz)
    dy = plt.load(dy_ref.at[row, column], mask=in_row, other=0).astype(jnp.float32)
    if scale_ref is not None:
        scale = scale_ref[0 if scale_ref.shape[0] == 1 else row]

    def rounded(value):
        return value.astype(dtype).astype(jnp.float32)

    def fetch(step):
        nth = step * entries + lax.iota(jnp.int32, entries)
        place, used = jnp.minimum(nth, width - 1), nth < total
        neuron, *kept = (
            plt.load(ref.at[row, place], mask=used, other=0) for ref in (indices_ref, *kept_refs)
        )
        return neuron.astype(jnp.int32), *[value.astype(jnp.float32) for value in kept]

    def body(step, carry):
        dx, neuron, gate, *up = carry
        nth = step * entries + lax.iota(jnp.int32, entries)
        used = nth < total
        mask = used[:, None] & in_row[None, :]
        following = fetch(step + 1)
        value = rounded(rule.value(gate)) if rule.squared else gate
        h = rounded(value * rule.up(up[0])) if gated else value
        dh = jnp.sum(_wide_rows(down_ref, neuron, column, mask) * dy[None, :], axis=1)
        if scale_ref is not None:
            # d|h|/dh = sign(h), added before the one rounding: in 16 bits it would vanish by itself.
            dh += ((h > 0).astype(jnp.float32) - (h < 0).astype(jnp.float32)) * scale
        dh = jnp.where(used, rounded(dh), 0)
        if gated:  # h = a(g) b(u)
            dg = rounded(dh * rule.up(up[0]) * rule.slope(gate))
            gradients = [dg, rounded(dh * value * rule.up_slope(up[0]))]
        else:
            gradients = [rounded(dh * rule.slope(gate))]
        for gradient, weight_ref in zip(gradients, inner_refs, strict=True):
            dx = dx + jnp.sum(gradient[:, None] * _wide_rows(weight_ref, neuron, column, mask), axis=0)
        for ref, value in zip(out_refs, [*gradients, h], strict=False):
            store_in_row(ref, row, nth, value.astype(dtype), used)
        return dx, *following

    steps = (total + entries - 1) // entries
    carry = (jnp.zeros(column.shape, jnp.float32), *fetch(jnp.int32(0)))
    dx, *_ = lax.fori_loop(jnp.int32(0), steps, body, carry)
    plt.store(dx_ref.at[row, column], dx.astype(dtype), mask=in_row)


# -- transposition -------------------------------------------------------------------------------------------


class NeuronEntries(NamedTuple):
    """For every neuron, where its non-zeros stand.

    Attributes:
      places: (M W,) int32, row W + slot of every non-zero, neuron after neuron, a neuron's in ascending order
        of its tokens; then the unused slots.
      starts: (F,) int32, of each neuron's list.
      counts: (F,) int32, its length.
      order: (F,) int32, the neurons, longest list first.
    """

    places: jax.Array
    starts: jax.Array
    counts: jax.Array
    order: jax.Array


def by_neuron(ell: Ell, d_ff: int) -> NeuronEntries:
    """The transposed structure of ``ell``."""
    tokens, width = ell.indices.shape
    # Unsigned keys, and pairs of a key and one value: what XLA gives to the radix sort of the GPU's library.
    key_type = jnp.uint16 if d_ff < 1 << 16 else jnp.uint32
    neurons = jnp.where(_used(ell), ell.indices.astype(jnp.int32), d_ff).astype(key_type).reshape(-1)
    places = varying_axes.vary_with(neurons, lax.iota(jnp.int32, tokens * width))
    neurons, places = lax.sort((neurons, places), num_keys=1, is_stable=True)
    bounds = jnp.searchsorted(neurons, jnp.arange(d_ff + 1, dtype=key_type), method="scan_unrolled")
    starts, counts = bounds[:-1], jnp.diff(bounds)
    return NeuronEntries(places, starts, counts, jnp.argsort(-counts, stable=True).astype(jnp.int32))


def _used(ell: Ell) -> jax.Array:
    """(M, W) bool, slots that hold an entry."""
    slot = lax.broadcasted_iota(jnp.int32, ell.indices.shape, 1)
    return (slot < ell.nnz[:, None]) & ~ell.overflows[:, None]


# -- weights -------------------------------------------------------------------------------------------------


def hot_gradients(
    pulled: Pulled, ell: Ell, lists: NeuronEntries, x: jax.Array, dy: jax.Array, *, config: NeuronSumConfig
) -> tuple[jax.Array, list[jax.Array]]:
    """Weight gradients of the first neurons of ``lists.order``, on tensor cores.

    Returns:
      The (K,) neurons, and their (K, D) f32 gradients: of Wg and Wu, or of the non-gated Wu, and of Wd.
    """
    hot = min(config.hot, lists.order.shape[0])
    neurons = lists.order[:hot]
    rank = jnp.full(lists.order.shape, hot, jnp.int32).at[neurons].set(jnp.arange(hot, dtype=jnp.int32))
    column = jnp.where(_used(ell), rank[ell.indices.astype(jnp.int32)], hot)
    row = lax.broadcasted_iota(jnp.int32, column.shape, 0)

    def gradient(coefficients, values):
        dense = jnp.zeros((values.shape[0], hot), values.dtype)
        dense = dense.at[row, column].set(coefficients, mode="drop", unique_indices=True)
        return outer(dense, values)

    inner = [pulled.d_gate] if pulled.d_up is None else [pulled.d_gate, pulled.d_up]
    return neurons, [*[gradient(z, x) for z in inner], gradient(pulled.h, dy)]


def outer(z: jax.Array, values: jax.Array) -> jax.Array:
    """``z^T values`` in f32: the sum over tokens of z (M, K) times values (M, D)."""
    precision = lax.Precision.HIGHEST if z.dtype == jnp.float32 else None
    contract_first = (((0,), (0,)), ((), ()))
    return lax.dot_general(z, values, contract_first, precision=precision, preferred_element_type=jnp.float32)


def pull_weights(
    pulled: Pulled,
    ell: Ell,
    lists: NeuronEntries,
    x: jax.Array,
    dy: jax.Array,
    dense: list[jax.Array],
    *,
    dtype: jax.typing.DTypeLike,
    config: NeuronSumConfig,
    interpret: bool = False,
) -> list[jax.Array]:
    """Gradients (F, D) of Wg and Wu, or of the non-gated Wu, and of Wd, in ``dtype``.

    Args:
      dense: (F, D) f32, what other tokens or other ways add to each, before the rounding.
    """
    inner = [pulled.d_gate] if pulled.d_up is None else [pulled.d_gate, pulled.d_up]
    (d_ff, d_model), starts, counts = dense[0].shape, lists.starts, lists.counts
    if config.hot:
        neurons, gradients = hot_gradients(pulled, ell, lists, x, dy, config=config)
        dense = [a.at[neurons].add(b, unique_indices=True) for a, b in zip(dense, gradients, strict=True)]
        counts = counts.at[neurons].set(0, unique_indices=True)
    begin = starts[lists.order]
    end = begin + counts[lists.order]
    shape = varying_axes.output(x, (d_ff, d_model), dtype)
    return pl.pallas_call(
        partial(_weights_kernel, width=ell.width, config=config),
        out_shape=(shape,) * len(dense),
        grid=(d_ff * pl.cdiv(d_model, config.slice_d),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="hybrid_dw",
    )(lists.order, begin, end, lists.places, *inner, pulled.h, x, dy, *dense)


def _weights_kernel(order_ref, begin_ref, end_ref, places_ref, *refs, width, config):
    count = (len(refs) - 2) // 3
    z_refs, (x_ref, dy_ref), refs = refs[:count], refs[count : count + 2], refs[count + 2 :]
    dense_refs, outputs = refs[:count], refs[count:]
    d_ff, d_model = dense_refs[0].shape
    nth, entries = pl.program_id(0) % d_ff, config.entries
    column = pl.program_id(0) // d_ff * config.slice_d + lax.iota(jnp.int32, config.slice_d)
    inside = column < d_model
    neuron, begin, end = order_ref[nth], begin_ref[nth], end_ref[nth]

    def fetch(step):
        """Token and coefficients of each entry of a step, 0 past the end."""
        at = begin + step * entries + lax.iota(jnp.int32, entries)
        used = at < end
        place = plt.load(places_ref.at[jnp.where(used, at, 0)], mask=used, other=0)
        row, slot = place // width, place % width
        return row, *[plt.load(ref.at[row, slot], mask=used, other=0).astype(jnp.float32) for ref in z_refs]

    def body(step, carry):
        accs, row, zs = carry[:count], carry[count], carry[count + 1 :]
        used = begin + step * entries + lax.iota(jnp.int32, entries) < end
        mask = used[:, None] & inside[None, :]
        following = fetch(step + 1)
        x, dy = (_wide_rows(ref, row, column, mask) for ref in (x_ref, dy_ref))
        values = [x] * (count - 1) + [dy]
        accs = [
            acc + jnp.sum(z[:, None] * value, axis=0) for acc, z, value in zip(accs, zs, values, strict=True)
        ]
        return *accs, *following

    steps = (end - begin + entries - 1) // entries
    zero = jnp.zeros(column.shape, jnp.float32)
    accs = lax.fori_loop(jnp.int32(0), steps, body, ((zero,) * count) + fetch(jnp.int32(0)))[:count]
    for acc, dense_ref, ref in zip(accs, dense_refs, outputs, strict=True):
        acc += plt.load(dense_ref.at[neuron, column], mask=inside, other=0)
        plt.store(ref.at[neuron, column], acc.astype(ref.dtype), mask=inside)
