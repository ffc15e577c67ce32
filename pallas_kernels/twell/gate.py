"""The gate stage of TwELL and HybridELL: one of three implementations that give the same words."""

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.activations import Rule
from pallas_kernels.common import gate_stage
from pallas_kernels.common.gate_stage import GateStage
from pallas_kernels.formats import MAX_INDEX, TwELL
from pallas_kernels.twell.config import GatePackConfig, WordPackConfig
from pallas_kernels.twell.pallas_triton_gate import gate_pack, pack_words

Words = tuple[TwELL, jax.Array]
"""The packed gates, and neuron_hits (F,) int32."""


def stage(
    backend: str, *, tile: int, slots: int, fused: GatePackConfig, pack: WordPackConfig, rule: Rule
) -> GateStage[Words]:
    """The gate stage on a backend: the active gates of ``x Wg^T`` in words, for F up to 65,536.

    Args:
      tile, slots: T and S of the words.
      fused: of Triton's product that packs its own output.
      pack: of the packing kernel behind XLA's product.
    """

    def gate(x: jax.Array, w_gate: jax.Array) -> Words:
        match gate_stage.implementation(backend, x, w_gate, device.current()):
            case "mosaic_gpu":
                from pallas_kernels.twell import pallas_mosaic_gpu

                return pallas_mosaic_gpu.gate_pack(x, w_gate, tile=tile, slots=slots, rule=rule)
            case "triton":
                return gate_pack(x, w_gate, tile=tile, slots=slots, config=fused, rule=rule)
            case "xla":
                return pack_words(
                    gate_stage.xla_product(x, w_gate),
                    d_ff=w_gate.shape[0],
                    tile=tile,
                    slots=slots,
                    config=pack,
                    rule=rule,
                    interpret=backend == "interpret",
                )

    return gate


def in_pieces(stage: GateStage[Words]) -> GateStage[Words]:
    """A stage for any F from one for up to 65,536.

    A word names its neuron by the low 16 bits of the index; the tile that it stands in knows the others.
    """

    def whole(x: jax.Array, w_gate: jax.Array) -> Words:
        d_ff = w_gate.shape[0]
        if d_ff <= MAX_INDEX:
            return stage(x, w_gate)
        pieces = [stage(x, w_gate[start : start + MAX_INDEX]) for start in range(0, d_ff, MAX_INDEX)]
        packed, hits = zip(*pieces, strict=True)
        words = jnp.concatenate([piece.words for piece in packed], axis=1)
        values = [piece.values for piece in packed if piece.values is not None]
        joined = jnp.concatenate(values, axis=1) if values else None
        first = packed[0]
        return TwELL(words, joined, d_ff, first.tile, first.slots, first.dtype), jnp.concatenate(hits)

    return whole
