"""The gradient of PanelELL's hidden activations for Hopper: `hopper_gathered` of Wd, with the gradients of
both projections as its epilogue.

Bytes beside the product's: 4 M union read and 6 M union written, and 4 M union read again, from L2.

Numerics. As `panel_dh` on Triton: the two terms of dh are added in f32 and rounded once, then dg and du.

Limits. Those of `hopper_gathered`; gated layers; one scale for all tokens.
"""

from typing import Any

import jax

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.panel import hopper_gathered, ptx_dh
from pallas_kernels.panel.config import GATHERED_TILE
from pallas_kernels.panel.pallas_triton_backward import Gradients
from pallas_kernels.panel.pallas_triton_lists import NeuronLists


def panel_dh(
    gate: jax.Array,
    up: jax.Array,
    lists: NeuronLists,
    dy: jax.Array,
    w_down: jax.Array,
    scale: jax.Array | None,
    *,
    pad: int,
    rule: Rule = RELU,
    steps: hopper_gathered.Steps | None = None,
    interpret: Any = None,
) -> Gradients:
    """`pallas_triton_backward.panel_dh` for lists in tiles of `GATHERED_TILE`.

    Args:
      gate, up: (n_slots, P) as kept by a `panel_up`.
      dy: (M, D).  w_down: (F, D).
      scale: (1,) f32, the cotangent of every |h|, or None for none.
      pad: what a panel's slots of the results are written up to a multiple of; those behind mean nothing.
      steps: None for those of a GPU.
      interpret: what `plgpu.kernel` takes by this name.
    """
    assert scale is None or scale.shape == (1,)
    if steps is None:
        steps = ptx_dh.Steps(GATHERED_TILE, dy.dtype, dy.shape[1], rule, scaled=scale is not None)
    inputs = (gate, up) if scale is None else (gate, up, scale)
    slots = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    outputs = hopper_gathered.gathered_gemm(
        steps,
        lists,
        dy,
        w_down,
        inputs,
        out_type=(slots,) * 3,
        pad=pad,
        name="panel_dh",
        interpret=interpret,
    )
    return Gradients(*outputs)
