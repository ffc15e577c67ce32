"""Causal grouped-query attention and the key/value cache that generation decodes with."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import device
from sparse_lm.config import ModelConfig
from sparse_lm.layers import rotary
from sparse_lm.rope import frequencies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions seen so far, of a fixed capacity C so that decoding never recompiles.

    Rows may be of different lengths: each row's next token goes to position ``lengths[row]``, and whatever
    lies at or behind that position is ignored.

    Attributes:
      keys, values: (L, B, C, K, H), K key/value heads of H, in the model's compute type.
      lengths: (B,) int32, positions filled in each row.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int | None = None) -> "KVCache":
        """A cache of ``batch`` rows and ``capacity`` positions (default and bound: the context length).

        Raises:
          ValueError: ``capacity`` is under 1 or beyond the context length.
        """
        capacity = config.context_length if capacity is None else capacity
        if not 1 <= capacity <= config.context_length:
            raise ValueError(
                f"a cache holds between 1 and context_length={config.context_length} positions; "
                f"got {capacity}"
            )
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        return cls(
            jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros(batch, jnp.int32)
        )

    @property
    def capacity(self) -> int:
        """C, positions that fit a row."""
        return self.keys.shape[2]

    def positions(self, steps: int) -> jax.Array:
        """(B, steps) int32, where the next tokens of each row go."""
        return self.lengths[:, None] + jnp.arange(steps, dtype=jnp.int32)

    def write(self, layer: jax.Array | int, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Puts one layer's (B, S, K, H) keys and values behind each row;
        ``lengths`` stays for the other layers."""
        rows = jnp.arange(keys.shape[0])[:, None]
        positions = self.positions(keys.shape[1])
        return dataclasses.replace(
            self,
            keys=self.keys.at[layer, rows, positions].set(keys),
            values=self.values.at[layer, rows, positions].set(values),
        )


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

    def __call__(
        self, x: jax.Array, *, cache: KVCache | None = None, layer: jax.Array | int = 0
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends from each token to itself and what stands before it.

        Args:
          x: (B, S, D) in the compute type.
          cache: what stands before; ``None`` means nothing does.
          layer: () int32, this layer's place in the cache.

        Returns:
          (B, S, D) in the compute type, and the cache with this layer's keys and values written.
        """
        batch, steps, d_model = x.shape
        heads = (batch, steps, -1, self.config.head_dim)
        positions = jnp.arange(steps, dtype=jnp.int32)[None] if cache is None else cache.positions(steps)
        scaling = self.config.rope_scaling
        turns = frequencies(self.config.head_dim, self.config.rope_theta, scaling)
        query = rotary(self.query(x).reshape(heads), positions, turns, scaling.amplitude)
        key = rotary(self.key(x).reshape(heads), positions, turns, scaling.amplitude)
        value = self.value(x).reshape(heads)
        if cache is None:
            y = attend(query, key, value)
        else:
            cache = cache.write(layer, key, value)
            visible = jnp.arange(cache.capacity) <= positions[..., None]
            y = attend(query, cache.keys[layer], cache.values[layer], visible)
        return self.output(y.reshape(batch, steps, d_model)), cache


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
