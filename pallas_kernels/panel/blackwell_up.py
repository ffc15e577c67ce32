"""The up projection of PanelELL for Blackwell: `blackwell_gathered` of Wu, with h as its epilogue.

Bytes beside the product's: 4 M union of gates and h, and 4 M union more where both projections are kept.

Numerics. As `panel_up` on Triton: f32 accumulation; the projection and h are rounded. l1 is summed in another
order, which is always the same.

Limits. Those of `blackwell_gathered`; gated layers, and one l1 for all tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.panel import blackwell_gathered, blackwell_roles
from pallas_kernels.panel.blackwell_gathered import LAYOUT, ROWS
from pallas_kernels.panel.blackwell_roles import CHUNK, PANEL
from pallas_kernels.panel.config import SEGMENT
from pallas_kernels.panel.pallas_triton import Hidden, hidden
from pallas_kernels.panel.pallas_triton_counts import GatePanel
from pallas_kernels.panel.pallas_triton_lists import NeuronLists


def panel_up(
    gate: GatePanel,
    lists: NeuronLists,
    x: jax.Array,
    w_up: jax.Array,
    *,
    rule: Rule = RELU,
    keep: bool = False,
    gather: blackwell_roles.Gather = blackwell_roles.gather,
    interpret: Any = None,
) -> Hidden:
    """`pallas_triton.panel_up` for panels of 128 tokens in segments of 16, and chunks of 128 slots: x (M, D),
    w_up (F, D), D a multiple of 64; in bf16 or f16.

    Args:
      keep: whether the gates and the up projection are wanted too.
      gather: another than the copy engine's, for an interpreter.
      interpret: what `plgpu.kernel` takes by this name.
    """
    sums = jax.ShapeDtypeStruct((blackwell_gathered.programs(lists) * CHUNK,), jnp.float32)
    h, *kept, l1 = blackwell_gathered.gathered_gemm(
        _Epilogue(rule, keep, gate.values.shape[1], gather),
        lists,
        x,
        w_up,
        (lists.segments, gate.values.reshape(-1, PANEL)),
        others=(sums,),
        name="panel_up",
        gather=gather,
        interpret=interpret,
    )
    return Hidden(h, jnp.sum(l1), *(kept or (None, None)))


@dataclasses.dataclass(frozen=True)
class _Epilogue:
    """``h = a(g) b(x Wu^T)``: inputs are the segments of the lists and the gates, results h and, where they
    are kept, the gates and the projection. The other output is each slot's part of l1, program by program.

    Attributes:
      width: F' of the gates (n_panels * F', P).
    """

    rule: Rule
    keep: bool
    width: int
    gather: blackwell_roles.Gather
    staged = 1

    @property
    def results(self):
        return 3 if self.keep else 1

    def ask(self, inputs, neurons, piece, to, barrier):
        rows = blackwell_roles.look_up(neurons, piece.slot, CHUNK)
        rows += (piece.panel * self.width).astype(jnp.uint32)
        self.gather(inputs[1], rows, piece.tokens, to[0], barrier)

    def prepare(self, inputs, piece):
        """A bit for each segment of a slot that has gates; the others' were never written."""
        return blackwell_roles.load_vector(inputs[0], piece.slot, CHUNK, ROWS).astype(jnp.int32)

    def nothing(self):
        return plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), ROWS)

    def pack(self, product, staged, bits, inputs, piece, sums):
        (gate,) = staged
        token = plgpu.broadcasted_iota(jnp.int32, gate.shape, 1, layout=LAYOUT) + piece.token
        segment = lax.shift_right_logical(token, SEGMENT.bit_length() - 1)
        written = lax.shift_right_logical(lax.broadcast_in_dim(bits, gate.shape, (0,)), segment) & 1 > 0
        gate, up = jnp.where(written, gate, jnp.zeros_like(gate)), product.astype(gate.dtype)
        h = hidden(gate, up, self.rule)
        sums += jnp.sum(jnp.abs(h.astype(jnp.float32)), axis=1)
        return (h, gate, up)[: self.results], sums

    def finish(self, sums, others, program):
        others[0][pl.ds(program * CHUNK, CHUNK)] = sums
