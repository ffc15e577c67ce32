"""The gradient of the hidden activations of PanelELL in Pallas Triton.

The gradient of x is `panel_down` over the two projections' gradients;
the weights' are `pallas_triton_weights`.

**`panel_dh`**: as `panel_up` with Wd and dy for Wu and x: 2 M union D FLOPs, over the same list of chunks.
Its epilogue turns dh into the gradients of both projections while it is in registers.

**Numerics.** f32 accumulation; dh, dg and du are rounded to the input type, as in the reference.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import varying_axes
from pallas_kernels.panel.config import StageConfig
from pallas_kernels.panel.pallas_triton import gathered_product, hidden, over_chunks, programs, work_list
from pallas_kernels.panel.pallas_triton_lists import Lists
from pallas_kernels.reference import active


class Gradients(NamedTuple):
    """Of a gated layer over the lists' slots, each (n_slots, P):
    dg and du, and h again for the gradient of Wd.

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
    shape = varying_axes.output(gate, gate.shape, gate.dtype)
    kept = (gate, up) if gated else (gate,)
    outputs = pl.pallas_call(
        partial(_dh_kernel, panel=gate.shape[1], config=config, gated=gated),
        out_shape=(shape,) * (3 if gated else 1),
        grid=(programs(lists, config),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="panel_dh",
    )(*work_list(lists), *kept, dy, w_down, dl1)
    return Gradients(*outputs) if gated else Gradients(outputs[0], None, gate)


def _dh_kernel(*refs, panel, config, gated):
    work_refs, refs = refs[:5], refs[5:]
    kept = 2 if gated else 1
    kept_refs, (dy_ref, w_ref, dl1_ref), outputs = refs[:kept], refs[kept : kept + 3], refs[kept + 3 :]
    within = lax.iota(jnp.int32, panel)[None, :]

    def body(chunk, which, rows, slots, neurons):
        place = (slots[:, None], within)
        dtype = kept_refs[0].dtype
        from_y = gathered_product(
            w_ref, neurons, dy_ref, jnp.minimum(rows, dy_ref.shape[0] - 1), config.tile_k
        )
        gate, *up = (plt.load(ref.at[place]) for ref in kept_refs)
        h = hidden(gate, up[0]) if gated else gate
        # d|h|/dh = sign(h); both parts are rounded before and after they are added, as the reference does.
        wide = h.astype(jnp.float32)
        sign = (wide > 0).astype(jnp.float32) - (wide < 0).astype(jnp.float32)
        dh = (from_y.astype(jnp.float32) + sign * dl1_ref[0]).astype(dtype)
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

    over_chunks(work_refs, panel, config.tile, body)
