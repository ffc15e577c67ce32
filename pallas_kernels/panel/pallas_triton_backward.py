"""The gradient of the hidden activations of PanelELL in Pallas Triton.

The gradient of x is `panel_down` over the two projections' gradients;
the weights' are `pallas_triton_weights`.

**`panel_dh`**: as `panel_up` with Wd and dy for Wu and x: 2 M union D FLOPs, over the same list of chunks.
Its epilogue turns dh into the gradients of both projections while it is in registers.

**Numerics.** f32 accumulation; the two terms of dh are added in f32 and rounded once to the input type, then
dg and du, as in the reference.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.activations import RELU, Rule, stored_active
from pallas_kernels.common import varying_axes
from pallas_kernels.panel.config import StageConfig
from pallas_kernels.panel.pallas_triton import gathered_product, hidden, over_chunks, programs, work_list
from pallas_kernels.panel.pallas_triton_lists import NeuronLists


class Gradients(NamedTuple):
    """Of a gated layer over the lists' slots, each (n_slots, P):
    dg and du, and h again for the gradient of Wd.

    Without a gate projection ``gate`` is the gradient of the one projection and ``up`` is None.
    """

    gate: jax.Array
    up: jax.Array | None
    h: jax.Array


def panel_dh(
    gate: jax.Array,
    up: jax.Array | None,
    lists: NeuronLists,
    dy: jax.Array,
    w_down: jax.Array,
    scale: jax.Array | None,
    *,
    config: StageConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> Gradients:
    """``dh = dy Wd^T + sign(h) scale`` over the lists and from it dg and du.

    Args:
      gate, up: (n_slots, P) as kept by `panel_up`; up is None without a gate projection.
      dy: (M, D).  w_down: (F, D).
      scale: f32, the cotangent of every |h|: (1,), or (M,) for that of each token; None for none.
    """
    gated = up is not None
    shape = varying_axes.output(gate, gate.shape, gate.dtype)
    kept = (gate,) if up is None else (gate, up)
    scales = () if scale is None else (scale,)
    outputs = pl.pallas_call(
        partial(
            _dh_kernel, panel=gate.shape[1], config=config, rule=rule, gated=gated, scaled=scale is not None
        ),
        out_shape=(shape,) * (3 if gated else 1 + rule.squared),
        grid=(programs(lists, config),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="panel_dh",
    )(*work_list(lists), *kept, dy, w_down, *scales)
    return Gradients(*outputs) if gated else Gradients(outputs[0], None, outputs[1] if rule.squared else gate)


def _dh_kernel(*refs, panel, config, rule, gated, scaled):
    work_refs, refs = refs[:5], refs[5:]
    kept = 2 if gated else 1
    kept_refs, (dy_ref, w_ref), refs = refs[:kept], refs[kept : kept + 2], refs[kept + 2 :]
    scale_ref, outputs = (refs[0], refs[1:]) if scaled else (None, refs)
    within = lax.iota(jnp.int32, panel)[None, :]

    def body(chunk, which, rows, slots, neurons):
        place = (slots[:, None], within)
        rows = jnp.minimum(rows, dy_ref.shape[0] - 1)
        dh = gathered_product(w_ref, neurons, dy_ref, rows, config.tile_k, jnp.float32)
        gate, *up = (plt.load(ref.at[place]) for ref in kept_refs)
        h = hidden(gate, up[0] if gated else None, rule)
        if scale_ref is not None:
            # d|h|/dh = sign(h), added before the one rounding: in 16 bits it would vanish by itself.
            wide = h.astype(jnp.float32)
            sign = (wide > 0).astype(jnp.float32) - (wide < 0).astype(jnp.float32)
            one = scale_ref.shape[0] == 1
            dh += sign * (scale_ref[0] if one else plt.load(scale_ref.at[rows])[None, :])
        gradients = projection_gradients(dh, gate, up[0] if gated else None, rule)
        results = [value for value in (*gradients, h) if value is not None]
        for ref, value in zip(outputs, results, strict=False):
            plt.store(ref.at[place], value)

    over_chunks(work_refs, panel, config.tile, body)


def projection_gradients(
    dh: jax.Array, gate: jax.Array, up: jax.Array | None, rule: Rule
) -> tuple[jax.Array, jax.Array | None]:
    """dg and du of h = a(g) b(u), in the type of stored gates, from dh in f32, whose one rounding is here.

    Without an up projection du is None.
    """
    dtype, gate = gate.dtype, gate.astype(jnp.float32)
    mask = stored_active(gate)
    dh = jnp.where(mask, dh, jnp.zeros_like(dh)).astype(dtype).astype(jnp.float32)

    def rounded(value):
        # An inactive gate has no gradient, whatever the other factors are.
        value = value.astype(dtype)
        return jnp.where(mask, value, jnp.zeros_like(value))

    if up is None:
        return rounded(dh * rule.slope(gate)), None
    up = up.astype(jnp.float32)
    value = rule.value(gate).astype(dtype).astype(jnp.float32)
    dg = rounded(dh * rule.up(up) * rule.slope(gate))
    return dg, rounded(dh * value * rule.up_slope(up))
