"""The small layers of a Llama-style block: RMSNorm and rotary positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from pallas_kernels.common import varying_axes


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
    """`RMSNorm` of x (..., D) with a scale (D,), in ``dtype``; differentiable in both, in reverse mode.

    The backward keeps x as it came, which the model keeps anyway, and one f32 value a token. Derived by
    autodiff, it would keep three f32 arrays of x's shape, twice in each layer.
    """
    # Out here, so that the transposes of these casts sum the scale's gradient over the axes and place it as
    # the scale is.
    return _rms_norm(eps, jnp.dtype(dtype), *varying_axes.vary_alike(x, _split_as_width(x, scale)))


def _split_as_width(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The scale (D,) split over mesh axes of type Explicit as x (..., D) is."""
    mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.sharding.reshard(scale, PartitionSpec(spec[x.ndim - 1])) if explicit else scale


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rms_norm(eps: float, dtype: DTypeLike, x: jax.Array, scale: jax.Array) -> jax.Array:
    return _rms_norm_forward(eps, dtype, x, scale)[0]


def _rms_norm_forward(eps, dtype, x, scale):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * _like(scale, x)).astype(dtype), (x, inverse, scale)


def _rms_norm_backward(eps, dtype, kept, dy):
    """With ``n = x r``, r the inverse, and ``g = scale dy``: ``dx = r (g - n mean(g n))``."""
    x, inverse, scale = kept
    dy = dy.astype(jnp.float32)
    normed, along = x.astype(jnp.float32) * inverse, dy * _like(scale, x)
    dx = inverse * (along - normed * jnp.mean(along * normed, axis=-1, keepdims=True))
    dscale = jnp.sum(dy * normed, axis=range(x.ndim - 1))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _like(scale: jax.Array, x: jax.Array) -> jax.Array:
    # Of equal ranks, since jax_numpy_rank_promotion may forbid others.
    return jax.lax.expand_dims(scale, range(x.ndim - 1))


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
