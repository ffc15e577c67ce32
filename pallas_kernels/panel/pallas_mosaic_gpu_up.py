"""The up projection of PanelELL for Hopper: `hopper_gathered` of Wu, with h as its epilogue.

Bytes beside the product's: 4 M union of gates and h, and 4 M union more where both projections are kept.

Numerics. As `panel_up` on Triton: f32 accumulation; the projection and h are rounded.

Limits. Those of `hopper_gathered`; gated layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common.hopper_gemm import TILE_M
from pallas_kernels.panel import hopper_gathered, ptx_up
from pallas_kernels.panel.config import GATHERED_TILE
from pallas_kernels.panel.pallas_triton import Hidden
from pallas_kernels.panel.pallas_triton_counts import GatePanel
from pallas_kernels.panel.pallas_triton_lists import NeuronLists


def panel_up(
    gate: GatePanel,
    lists: NeuronLists,
    x: jax.Array,
    w_up: jax.Array,
    *,
    pad: int,
    rule: Rule = RELU,
    keep: bool = False,
    steps: hopper_gathered.Steps | None = None,
    interpret: Any = None,
) -> Hidden:
    """`pallas_triton.panel_up` for gates of `pallas_mosaic_gpu` and lists in tiles of `GATHERED_TILE`:
    x (M, D), w_up (F, D).

    Args:
      pad: what a panel's slots of the results are written up to a multiple of; those behind mean nothing.
      keep: whether the gates and the up projection are wanted too.
      steps: None for those of a GPU.
      interpret: what `plgpu.kernel` takes by this name.
    """
    if steps is None:
        steps = ptx_up.Steps(GATHERED_TILE, x.dtype, x.shape[1], rule, gate.values.shape[1])
    slots = jax.ShapeDtypeStruct((lists.neurons.shape[0], TILE_M), x.dtype)
    sums = jax.ShapeDtypeStruct((4 * hopper_gathered.programs(lists),), jnp.float32)
    h, l1, *kept = hopper_gathered.gathered_gemm(
        steps,
        lists,
        x,
        w_up,
        (lists.segments, gate.values),
        out_type=(slots, sums, *[slots] * (2 * keep)),
        pad=pad,
        name="panel_up",
        interpret=interpret,
    )
    return Hidden(h, jnp.sum(l1), *(kept or (None, None)))
