"""Matrix products as the layer needs them: f32 sums, one rounding, f32 inputs multiplied as f32."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

CONTRACT_LAST = (((1,), (1,)), ((), ()))
CONTRACT_FIRST = (((0,), (0,)), ((), ()))
MATRICES = (((1,), (0,)), ((), ()))


def dot(a: jax.Array, b: jax.Array, dimensions: lax.DotDimensionNumbers = MATRICES) -> jax.Array:
    """The product in f32, also inside kernels; f32 inputs are not shortened to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``round(x W^T)``: x (M, D) and weight (F, D) to (M, F), in the input type, accumulated in f32."""
    return multiply(x, weight, CONTRACT_LAST)


def multiply(
    a: jax.Array,
    b: jax.Array,
    dimensions: lax.DotDimensionNumbers = MATRICES,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """``round(a b)`` of arrays of one type, by default (M, F) and (F, D), to that type or to ``dtype``.

    XLA turns the product of a single row on a GPU into an elementwise product in the output type and a sum,
    which reads a weight at two thirds of the bandwidth. For CUDA the row stands there twice, and is a product
    like those of more rows; elsewhere the output type is f32 and the rounding comes after it, so that terms
    are not rounded one by one.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dtype = a.dtype if dtype is None else dtype

    def product(a, b, dtype):
        return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)

    def of_twice_the_row(a, b):
        return product(jnp.concatenate([a, a]), b, dtype)[:1]

    def rounded_once(a, b):
        return product(a, b, jnp.float32).astype(dtype)

    ((contracted,), _), _ = dimensions
    if a.shape[0] != 1 or contracted == 0:
        return product(a, b, dtype)
    return lax.platform_dependent(a, b, cuda=of_twice_the_row, default=rounded_once)
