"""The executable specification: plain jnp, differentiable, and what every kernel is judged against.

Dimensions: M tokens, D model width, F hidden neurons. All weights are neuron-major, (F, D).

    gated       g = round(x Wg^T)    u = round(x Wu^T)    h = round([not g <= 0] g u)    y = round(h Wd)
    non-gated   g = round(x Wu^T)                         h = round([not g <= 0] g)      y = round(h Wd)

``round`` is to the input type and marks every place where a rounding happens; sums accumulate in f32, and f32
inputs multiply as f32, not as the shorter TF32 that XLA would take on a GPU: a gate's sign is part of the
result. The bracket is 1 where the condition holds: a neuron is *active* unless its rounded gate is at or
under zero, so a NaN gate is active and reaches the output. An inactive neuron contributes nothing, also where
its up projection is infinite: that is what lets a kernel skip it, and it is the one difference from
``relu(g) * u`` evaluated in IEEE arithmetic. Weights are taken to be finite.

    l1 = (1/M) sum_ij |h_ij|        l0 = (1/M) sum_ij active_ij        neuron_hits_j = sum_i active_ij
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.options import FFNStats

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_MATRICES = (((1,), (0,)), ((), ()))


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``round(x W^T)``: x (M, D) and weight (F, D) to (M, F), in the input type, accumulated in f32.

    The output type is asked of the product itself, so that the products of its gradient also take their
    operands in the input type (an f32 product cast afterwards makes them mixed, and half as fast).
    """
    return multiply(x, weight, _CONTRACT_LAST)


def multiply(
    a: jax.Array,
    b: jax.Array,
    dimensions: lax.DotDimensionNumbers = _MATRICES,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """``round(a b)`` of arrays of one type, by default (M, F) and (F, D), to that type or to ``dtype``.

    XLA turns the product of a single row on a GPU into an elementwise product in the output type and a sum:
    there the output type is f32 and the rounding comes after it, so that terms are not rounded one by one.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dtype = a.dtype if dtype is None else dtype
    output = jnp.float32 if a.shape[0] == 1 else dtype
    product = lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=output)
    return product.astype(dtype)


def active(gate: jax.Array) -> jax.Array:
    """Which neurons a rounded gate leaves active; NaN counts as active."""
    return ~(gate <= 0)


def hidden(x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hidden activations (M, F) in the input type, and the (M, F) bool mask of active neurons."""
    gate = project(x, w_up if w_gate is None else w_gate)
    mask = active(gate)
    product = gate if w_gate is None else gate * project(x, w_up)
    return jnp.where(mask, product, jnp.zeros_like(product)), mask


def ffn(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array
) -> tuple[jax.Array, FFNStats]:
    """The whole layer: x (M, D) to y (M, D) and its statistics; ``w_gate=None`` is the non-gated layer.

    Gradients by JAX's own differentiation, through y and through ``stats.l1``; the counters have none.
    """
    h, mask = hidden(x, w_gate, w_up)
    return multiply(h, w_down), statistics(h, mask)


def statistics(h: jax.Array, mask: jax.Array) -> FFNStats:
    """Of a call's hidden activations (M, F) and active neurons (M, F)."""
    tokens = max(h.shape[0], 1)
    hits = jnp.sum(mask, axis=0, dtype=jnp.int32)
    return FFNStats(
        l1=jnp.sum(jnp.abs(h), dtype=jnp.float32) / tokens,
        l0=jnp.sum(hits, dtype=jnp.float32) / tokens,
        neuron_hits=hits,
        max_nnz=jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32), initial=0),
        overflow_rows=jnp.zeros((), jnp.int32),
    )
