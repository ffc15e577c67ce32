"""The centroid nearest to the norm of each row, in Pallas Triton: one pass over the rows.

Why it exists. With ``n = r x scale``, r the inverse root of the mean square, the nearest centroid c has the
largest ``n c - |c|^2 / 2 = r (x (scale c)) - |c|^2 / 2``. So one pass over x gives both r and the products
with scaled centroids; XLA reads x for the norm, writes n, and reads it again. M rows of D in 16 bits are
2 M D bytes here and 6 M D there; the centroids stay in L2.

**Numerics.** f32 sums of products in x's type. The scaled centroids are rounded to it, and the norm is not.

**Limits.** An NVIDIA GPU of compute capability 8.0 or newer; up to ``MOST_CENTROIDS``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import device
from pallas_kernels.common import varying_axes
from pallas_kernels.common.products import CONTRACT_LAST, dot

MOST_CENTROIDS = 256
_TILE, _SLICE, _MOST_STAGES = 64, 64, 4
_LEAST_COLUMNS = 16
_SHARED_MEMORY_ROOM = 8 * 1024


def nearest_rows(
    x: jax.Array, centroids: jax.Array, half_squares: jax.Array, *, eps: float, interpret: bool = False
) -> jax.Array:
    """For each row of x (M, D), which of the centroids (K, D) is nearest to its norm: (M,) int32.

    Args:
      x: (M, D), 16 bits.
      centroids: (K, D) in x's type, each times the norm's scale.
      half_squares: (K,) f32, half of each centroid's squared length, without that scale.
      eps: of the norm.
      interpret: run the kernel on any device, slowly.
    """
    tokens, count = x.shape[0], centroids.shape[0]
    width = max(_LEAST_COLUMNS, pl.next_power_of_2(count))
    room = device.current().shared_memory - _SHARED_MEMORY_ROOM
    stages = room // ((_TILE + width) * _SLICE * x.dtype.itemsize)
    return pl.pallas_call(
        partial(_kernel, width=width, eps=eps),
        out_shape=varying_axes.output(x, (tokens,), jnp.int32),
        grid=(pl.cdiv(tokens, _TILE),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(
            num_warps=4 if width <= 128 else 8, num_stages=max(1, min(_MOST_STAGES, stages))
        ),
        name="nearest_rows",
    )(x, centroids, half_squares)


def _kernel(x_ref, centroids_ref, half_squares_ref, nearest_ref, *, width, eps):
    (tokens, d_model), count = x_ref.shape, centroids_ref.shape[0]
    rows = pl.program_id(0) * _TILE + lax.iota(jnp.int32, _TILE)
    row_here, names = rows < tokens, lax.iota(jnp.int32, width)
    named = names < count

    def step(nth, sums):
        products, squares = sums
        columns = nth * _SLICE + lax.iota(jnp.int32, _SLICE)
        inside = columns < d_model
        x = _tile(x_ref, rows, row_here, columns, inside)
        centroids = _tile(centroids_ref, names, named, columns, inside)
        wide = x.astype(jnp.float32)
        return products + dot(x, centroids, CONTRACT_LAST), squares + jnp.sum(wide * wide, axis=1)

    zeros = jnp.zeros((_TILE, width), jnp.float32), jnp.zeros((_TILE,), jnp.float32)
    products, squares = lax.fori_loop(0, pl.cdiv(d_model, _SLICE), step, zeros)
    root = lax.rsqrt(squares / d_model + eps)
    half_squares = plt.load(half_squares_ref.at[names], mask=named, other=0)
    closeness = jnp.where(named[None, :], products * root[:, None] - half_squares[None, :], -jnp.inf)
    best = jnp.max(closeness, axis=1)
    first = jnp.min(jnp.where(closeness == best[:, None], names[None, :], count - 1), axis=1)
    plt.store(nearest_ref.at[rows], first, mask=row_here)


def _tile(ref, rows, row_here, columns, column_here):
    mask = row_here[:, None] & column_here[None, :]
    return plt.load(ref.at[rows[:, None], columns[None, :]], mask=mask, other=0)
