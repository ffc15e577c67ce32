"""The backward stages of PanelELL in Pallas Triton: gradients of the hidden activations and of the weights.

The gradient of x is `panel_down` over the two gates' gradients.

**`panel_dh`**: as `panel_up` with Wd and dy for Wu and x: 2 M union D FLOPs, over the same list of chunks. Its epilogue
turns dh into the gradients of both projections while it is in registers.

**`panel_dw`**: the gradients of Wg and Wu share x, so one program sums both: 6 M live D FLOPs, where live are the
neurons that some token of the batch activates; the others' rows are written as zeros. A program owns a tile of live
neurons and of D, and walks all panels: what a panel has of its neurons is gathered by slot, P contiguous values a
neuron. No two programs write one value and none is added in memory: the same input gives the same bits.

**Numerics.** f32 accumulation over all tokens, rounded once to the type asked for; dh, dg and du are rounded to the
input type, as in the reference.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import axes
from pallas_kernels.panel.config import StageConfig, WeightsConfig
from pallas_kernels.panel.pallas_triton import OUT_OF_RANGE, Lists, hidden, over_chunks, product, programs
from pallas_kernels.reference import active

_MATRICES = (((1,), (0,)), ((), ()))


class Gradients(NamedTuple):
    """Of a gated layer over the lists' slots, each (n_slots, P): dg and du, and h again for the gradient of Wd.

    Without a gate ``gate`` is dh where active, ``up`` is None, and h is what was kept.
    """

    gate: jax.Array
    up: jax.Array | None
    h: jax.Array


def panel_dh(
    gate: jax.Array,
    up: jax.Array | None,
    lists: Lists,
    dy: jax.Array,
    w_down: jax.Array,
    dl1: jax.Array,
    *,
    config: StageConfig,
    interpret: bool = False,
) -> Gradients:
    """``dh = dy Wd^T + sign(h) dl1`` over the lists and from it dg and du.

    Args:
      gate, up: (n_slots, P) as kept by `panel_up`; without a gate, h and None.
      dy: (M, D).  w_down: (F, D).  dl1: (1,) f32, the cotangent of every |h|.
    """
    gated = up is not None
    shape = jax.ShapeDtypeStruct(gate.shape, gate.dtype, manual_axis_type=jax.typeof(gate).manual_axis_type)
    kept = (gate, up) if gated else (gate,)
    outputs = pl.pallas_call(
        partial(_dh_kernel, panel=gate.shape[1], config=config, gated=gated),
        out_shape=(shape,) * (3 if gated else 1),
        grid=(programs(lists.owner.shape[0], config),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="panel_dh",
    )(lists.neurons, lists.owner, lists.offsets, lists.counts, *kept, dy, w_down, dl1)
    return Gradients(*outputs) if gated else Gradients(outputs[0], None, gate)


def _dh_kernel(*refs, panel, config, gated):
    lists_refs, refs = refs[:4], refs[4:]
    kept = 2 if gated else 1
    kept_refs, (dy_ref, w_ref, dl1_ref), outputs = refs[:kept], refs[kept : kept + 3], refs[kept + 3 :]
    within = lax.iota(jnp.int32, panel)[None, :]

    def body(chunk, which, rows, slots, neurons, listed):
        place = (slots[:, None], within)
        dtype = kept_refs[0].dtype
        acc = product(w_ref, neurons, dy_ref, jnp.minimum(rows, dy_ref.shape[0] - 1), config.tile_k)
        gate, *up = (plt.load(ref.at[place]) for ref in kept_refs)
        h = hidden(gate, up[0]) if gated else gate
        # d|h|/dh = sign(h); both parts are rounded before and after they are added, as the reference does.
        wide = h.astype(jnp.float32)
        sign = (wide > 0).astype(jnp.float32) - (wide < 0).astype(jnp.float32)
        dh = (acc.astype(dtype).astype(jnp.float32) + sign * dl1_ref[0]).astype(dtype)
        dh = jnp.where(active(gate.astype(jnp.float32)), dh.astype(jnp.float32), 0.0)
        if gated:  # h = g u: dg = dh u, du = dh g
            dg = (dh * up[0].astype(jnp.float32)).astype(dtype)
            du = (dh * gate.astype(jnp.float32)).astype(dtype)
            # An inactive gate has no gradient, whatever u is.
            dg = jnp.where(active(gate.astype(jnp.float32)), dg, jnp.zeros_like(dg))
            du = jnp.where(active(gate.astype(jnp.float32)), du, jnp.zeros_like(du))
            results = [dg, du, h]
        else:
            results = [dh.astype(dtype)]
        for ref, value in zip(outputs, results, strict=True):
            plt.store(ref.at[place], value)

    over_chunks(lists_refs, panel, config.tile, body)


def panel_dw(
    gradients: Gradients,
    lists: Lists,
    x: jax.Array,
    dy: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    config: WeightsConfig,
    interpret: bool = False,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Gradients (F, D) of Wg, Wu and Wd in ``dtype``; without a gate, of None, Wu and Wd."""
    live = jnp.any(lists.slots >= 0, axis=0)
    order, n_live = _live_first(live)
    call = partial(
        _weight_gradients,
        order=order,
        n_live=n_live,
        slots=lists.slots,
        dtype=dtype,
        config=config,
        interpret=interpret,
    )
    (dw_down,) = call((gradients.h,), dy, name="panel_dw_down")
    if gradients.up is None:
        (dw_up,) = call((gradients.gate,), x, name="panel_dw_up")
        return None, dw_up, dw_down
    dw_gate, dw_up = call((gradients.gate, gradients.up), x, name="panel_dw_gate_up")
    return dw_gate, dw_up, dw_down


def _live_first(live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All neurons, live ones first, and (1,) how many those are."""
    before = jnp.cumsum(live, dtype=jnp.int32)
    neuron = jnp.arange(live.shape[0], dtype=jnp.int32)
    place = jnp.where(live, before - 1, before[-1] + neuron - before)
    order = jnp.zeros_like(neuron).at[place].set(neuron, unique_indices=True)
    return order, before[-1:]


def _weight_gradients(zs, x, *, order, n_live, slots, dtype, config, interpret, name):
    """For each z (n_slots, P): ``dW[j] = sum over tokens of z[j] x`` for the neurons in order, (F, D)."""
    (d_ff,), d_model = order.shape, x.shape[1]
    shape = axes.output(zs[0], (d_ff, d_model), dtype)
    if len(zs) == 1:  # one sum instead of two: as many accumulators in a tile twice as high
        config = dataclasses.replace(config, tile=min(2 * config.tile, 128))
    return pl.pallas_call(
        partial(_dw_kernel, panel=zs[0].shape[1], count=len(zs), config=config),
        out_shape=(shape,) * len(zs),
        grid=(pl.cdiv(d_ff, config.tile) * pl.cdiv(d_model, config.tile_d),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name=name,
    )(order, n_live, slots, *zs, x)


def _dw_kernel(order_ref, n_live_ref, slots_ref, *refs, panel, count, config):
    z_refs, x_ref, outputs = refs[:count], refs[count], refs[count + 1 :]
    (tokens, d_model), (d_ff,) = x_ref.shape, order_ref.shape
    n_columns = pl.cdiv(d_model, config.tile_d)
    first = pl.program_id(0) // n_columns * config.tile
    nth = first + lax.iota(jnp.int32, config.tile)
    neurons = plt.load(order_ref.at[jnp.minimum(nth, d_ff - 1)])
    columns = (pl.program_id(0) % n_columns * config.tile_d + lax.iota(jnp.int32, config.tile_d))[None, :]
    live = nth < n_live_ref[0]
    slices = panel // config.tile_k

    def step(i, accs):
        which, within = i // slices, i % slices * config.tile_k + lax.iota(jnp.int32, config.tile_k)
        slot = plt.load(slots_ref.at[which, neurons])
        present = jnp.broadcast_to(((slot >= 0) & live)[:, None], (config.tile, config.tile_k))
        rows = (which * panel + within)[:, None]
        inside = jnp.broadcast_to((rows < tokens) & (columns < d_model), (config.tile_k, config.tile_d))
        x = plt.load(x_ref.at[rows, columns], mask=inside, other=0)
        place = (jnp.maximum(slot, 0)[:, None], within[None, :])
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return tuple(
            acc
            + lax.dot_general(
                plt.load(z_ref.at[place], mask=present, other=0),
                x,
                _MATRICES,
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            for acc, z_ref in zip(accs, z_refs, strict=True)
        )

    # A tile without a live neuron has nothing to add up.
    steps = jnp.where(first < n_live_ref[0], jnp.int32(slots_ref.shape[0] * slices), jnp.int32(0))
    zero = jnp.zeros((config.tile, config.tile_d), jnp.float32)
    accs = lax.fori_loop(jnp.int32(0), steps, step, (zero,) * count)
    mask = jnp.broadcast_to((nth < d_ff)[:, None] & (columns < d_model), zero.shape)
    target = jnp.where(nth < d_ff, neurons, OUT_OF_RANGE)[:, None]  # the interpreter rewrites masked lanes
    for acc, ref in zip(accs, outputs, strict=True):
        plt.store(ref.at[target, columns], acc.astype(ref.dtype), mask=mask)
