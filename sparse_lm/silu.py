"""The dense baseline: the feed-forward layer of today's Llamas, whose SiLU is never exactly zero.

No sparse layer can run it, so it is plain JAX that XLA compiles and splits over devices, with the parameters
of `SparseFFN`: a checkpoint of one is weights for the other.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels import FFNStats
from pallas_kernels.reference import multiply, projections


class SiluFFN(nnx.Module):
    """``y = (silu(x Wg^T) * (x Wu^T)) Wd`` if gated, ``y = silu(x Wu^T) Wd`` if not.

    Parameters as `SparseFFN` has them and from the same draws: ``w_gate`` (gated only), ``w_up`` and
    ``w_down``, (F, D) f32. Its backward keeps the projections alone, as that of the dense sparse layer does.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, rngs: nnx.Rngs, gated: bool, dtype: DTypeLike, init_std: float
    ) -> None:
        """``d_model`` is D, ``d_ff`` F; weights are drawn with standard deviation ``init_std`` from
        ``rngs.params()`` and rounded to ``dtype`` in the call."""
        init = nnx.initializers.normal(init_std)

        def draw() -> nnx.Param:
            return nnx.Param(init(rngs.params(), (d_ff, d_model), jnp.float32))

        self.w_gate = draw() if gated else None
        self.w_up = draw()
        self.w_down = draw()
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, FFNStats]:
        """(..., D) to (..., D) in ``dtype``, and the statistics of a layer whose neurons are all active."""
        gate = None if self.w_gate is None else self.w_gate[...].astype(self.dtype)
        return silu_ffn(x, gate, self.w_up[...].astype(self.dtype), self.w_down[...].astype(self.dtype))


def silu_ffn(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array
) -> tuple[jax.Array, FFNStats]:
    """`SiluFFN` of x (..., D) and weights (F, D), all cast to the weights' type.

    Rounds where `pallas_kernels.reference` does. In the statistics every neuron is active for every token:
    ``l0`` and ``max_nnz`` are F.
    """
    tokens = x.reshape(-1, x.shape[-1]).astype(w_up.dtype)
    y, stats = _from_projections(*projections(tokens, w_gate, w_up), w_down)
    return y.reshape(x.shape), stats


@jax.checkpoint
def _from_projections(gate: jax.Array, up: jax.Array | None, w_down: jax.Array) -> tuple[jax.Array, FFNStats]:
    value = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype)
    h = value if up is None else value * up
    return multiply(h, w_down), FFNStats.of_dense(h, jnp.ones(h.shape, bool))
