"""The small layers of a Llama-style block: RMSNorm and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), statistics and scaling in f32.

    Parameter: ``scale`` (D,) f32, ones at first.
    """

    def __init__(self, d_model: int, *, eps: float, dtype: DTypeLike) -> None:
        """``d_model`` is D; ``eps`` is added to the mean square; ``dtype`` is the type of the result."""
        self.scale = nnx.Param(jnp.ones((d_model,), jnp.float32))
        self.eps = eps
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis: (..., D) to (..., D) in ``dtype``."""
        return rms_norm(x, self.scale[...], eps=self.eps, dtype=self.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, dtype: DTypeLike) -> jax.Array:
    """`RMSNorm` of x (..., D) with a scale (D,), in ``dtype``."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    scale = jax.lax.expand_dims(scale, range(x.ndim - 1))  # ranks alike, for who forbids promotion
    return (x * jax.lax.rsqrt(mean_square + eps) * scale).astype(dtype)


def rotary(x: jax.Array, positions: jax.Array, frequencies: np.ndarray, amplitude: float = 1.0) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), first half of a head paired with its second
    (as in Llama).

    Args:
      x: (B, S, N, H) queries or keys, H even.
      positions: (B or 1, S) int32, positions in the sequence.
      frequencies: (H / 2,) f32, from ``rope.frequencies``.
      amplitude: factor of the rotated vectors.

    Returns:
      (B, S, N, H) in x's type; angles and rotation are f32.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """``factor * x`` in x's type, computed in f32, so that the factor itself is not rounded to 16 bits."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)
