"""The gradient of PanelELL's hidden activations for Blackwell: `blackwell_gathered` of Wd, with the gradients
of both projections as its epilogue.

Bytes beside the product's: 4 M union read and 6 M union written.

Numerics. As `panel_dh` on Triton: the two terms of dh are added in f32 and rounded once, then dg and du.

Limits. Those of `blackwell_gathered`; gated layers; one scale for all tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.panel import blackwell_gathered, blackwell_roles
from pallas_kernels.panel.pallas_triton import hidden
from pallas_kernels.panel.pallas_triton_backward import Gradients, projection_gradients
from pallas_kernels.panel.pallas_triton_lists import NeuronLists


def panel_dh(
    gate: jax.Array,
    up: jax.Array,
    lists: NeuronLists,
    dy: jax.Array,
    w_down: jax.Array,
    scale: jax.Array | None,
    *,
    rule: Rule = RELU,
    gather: blackwell_roles.Gather = blackwell_roles.gather,
    interpret: Any = None,
) -> Gradients:
    """`pallas_triton_backward.panel_dh` for panels of 128 tokens and chunks of 128 slots.

    Args:
      gate, up: (n_slots, P) as kept by a `panel_up`.
      dy: (M, D).  w_down: (F, D).
      scale: (1,) f32, the cotangent of every |h|, or None for none.
      gather: another than the copy engine's, for an interpreter.
      interpret: what `plgpu.kernel` takes by this name.
    """
    assert scale is None or scale.shape == (1,)
    outputs = blackwell_gathered.gathered_gemm(
        _Epilogue(rule, scaled=scale is not None),
        lists,
        dy,
        w_down,
        (gate, up) if scale is None else (gate, up, scale),
        name="panel_dh",
        gather=gather,
        interpret=interpret,
    )
    return Gradients(*outputs)


@dataclasses.dataclass(frozen=True)
class _Epilogue:
    """dg, du and h of ``dh = dy Wd^T + sign(h) scale``: inputs are the gates, the projection and, where there
    is one, the scale."""

    rule: Rule
    scaled: bool
    staged = 2
    results = 3

    def ask(self, inputs, neurons, piece, to, barrier):
        for ref, buffer in zip(inputs[:2], to, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[piece.slots, piece.tokens], buffer, barrier)

    def prepare(self, inputs, piece):
        pass

    def nothing(self):
        pass

    def pack(self, product, staged, prepared, inputs, piece, carry):
        gate, up = staged
        h = hidden(gate, up, self.rule)
        if self.scaled:
            # d|h|/dh = sign(h), added before the one rounding: in 16 bits it would vanish by itself.
            wide = h.astype(jnp.float32)
            sign = (wide > 0).astype(jnp.float32) - (wide < 0).astype(jnp.float32)
            product += sign * inputs[2][0]
        return (*projection_gradients(product, gate, up, self.rule), h), carry

    def finish(self, carry, others, program):
        pass
