"""Causal grouped-query attention."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import device
from sparse_lm.config import ModelConfig
from sparse_lm.layers import rotary
from sparse_lm.rope import frequencies


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions (arXiv 2305.13245).

    Parameters: ``query``, ``key``, ``value`` (D to N or K heads of H; biases with ``qkv_bias``) and
    ``output`` (back to D), each an ``nnx.Linear`` with f32 master weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Draws the weights from ``rngs``, normal with standard deviation ``config.init_std``."""

        def linear(d_in: int, d_out: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                d_in,
                d_out,
                use_bias=bias,
                dtype=config.dtype,
                param_dtype=jnp.float32,
                kernel_init=nnx.initializers.normal(config.init_std),
                rngs=rngs,
            )

        kv_width = config.num_kv_heads * config.head_dim
        self.query = linear(config.d_model, config.d_model, config.qkv_bias)
        self.key = linear(config.d_model, kv_width, config.qkv_bias)
        self.value = linear(config.d_model, kv_width, config.qkv_bias)
        self.output = linear(config.d_model, config.d_model, False)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends from each token to itself and what stands before it: (B, S, D) to (B, S, D), in the compute
        type."""
        batch, steps, d_model = x.shape
        heads = (batch, steps, -1, self.config.head_dim)
        positions = jnp.arange(steps, dtype=jnp.int32)[None]
        scaling = self.config.rope_scaling
        turns = frequencies(self.config.head_dim, self.config.rope_theta, scaling)
        query = rotary(self.query(x).reshape(heads), positions, turns, scaling.amplitude)
        key = rotary(self.key(x).reshape(heads), positions, turns, scaling.amplitude)
        y = attend(query, key, self.value(x).reshape(heads))
        return self.output(y.reshape(batch, steps, d_model))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """Softmax attention, by cuDNN's flash attention where it runs.

    Args:
      query: (B, S, N, H).
      key, value: (B, C, K, H), K dividing N.
      visible: (B, S, C) bool, the keys that each query sees; ``None`` means causal, with C = S.

    Returns:
      (B, S, N, H) in query's type.
    """
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if visible is None else visible[:, None],
        is_causal=visible is None,
        implementation=_implementation(query, key),
    )


def _implementation(query: jax.Array, key: jax.Array) -> Literal["cudnn"] | None:
    """``"cudnn"`` if flash attention takes these queries on the device in use, else JAX's default."""
    chip = device.current()
    head_dim = query.shape[3]
    supported = (
        chip.is_nvidia
        and chip.capability >= 80
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim <= 128
        and head_dim % 8 == 0
        # JAX refuses the gradient of odd lengths. A single query, odd too, has no score matrix to save.
        and query.shape[1] % 2 == 0
        and key.shape[1] % 2 == 0
    )
    return "cudnn" if supported else None
