"""The dense layer taken apart: a forward that keeps its projections, a backward from them,
and one from nothing.

The sparse layers go here where sparsity does not pay or does not fit, and so does the dense layer whose
weights are of a wider type than x. Numerics are the reference's; weight gradients are f32 sums, rounded
once to the type asked for.

    h = [active] g u    dh = [active] (dy Wd^T + sign(h) dl1 / M)    dg = dh u    du = dh g
    dx = dg Wg + du Wu    dWg = dg^T x    dWu = du^T x    dWd = h^T dy

Without a gate, g is h: dx = dh Wu and dWu = dh^T x.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import reference
from pallas_kernels.options import FFNOptions, FFNStats

_CONTRACT_FIRST = (((0,), (0,)), ((), ()))

Weights = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]
"""x (M, D), w_gate (F, D) or None, w_up and w_down (F, D); or their cotangents."""


def rounded(x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array) -> Weights:
    """The arguments as the layer computes with them: all in x's type."""
    return x, None if w_gate is None else w_gate.astype(x.dtype), w_up.astype(x.dtype), w_down.astype(x.dtype)


def ffn(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
) -> tuple[jax.Array, FFNStats]:
    """One dense feed-forward layer: `reference.ffn` for x (M, D) and weights (F, D), by XLA on any device.

    Differentiated by JAX itself, except where weights of a wider type than x's are rounded to it: JAX would
    round their gradients as well, as those of what multiplies x.
    """
    return (reference.ffn if w_up.dtype == x.dtype else _of_master_weights)(x, w_gate, w_up, w_down)


@jax.custom_vjp
def _of_master_weights(x, w_gate, w_up, w_down):
    return reference.ffn(*rounded(x, w_gate, w_up, w_down))


def _forward(x, w_gate, w_up, w_down):
    outputs, kept = forward(*rounded(x, w_gate, w_up, w_down))
    return outputs, ((x, w_gate, w_up, w_down), kept)


def _backward(saved, cotangents):
    (x, *weights), (gate, up) = saved
    dy, dstats = cotangents
    return backward(*rounded(x, *weights), gate, up, dy, dstats.l1, dtype=weights[-1].dtype)


_of_master_weights.defvjp(_forward, _backward)


def forward(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array
) -> tuple[tuple[jax.Array, FFNStats], tuple[jax.Array, jax.Array | None]]:
    """`reference.ffn`, and the projections (M, F) that `backward` takes:
    the gate's, and the up one's of a gated layer."""
    gate = reference.project(x, w_up if w_gate is None else w_gate)
    up = None if w_gate is None else reference.project(x, w_up)
    h, mask = _hidden(gate, up)
    return (reference.multiply(h, w_down), reference.statistics(h, mask)), (gate, up)


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    gate: jax.Array,
    up: jax.Array | None,
    dy: jax.Array,
    dl1: jax.Array,
    *,
    dtype: DTypeLike,
) -> Weights:
    """Cotangents of x and, in ``dtype``, the weights.

    From the kept projections, and the cotangents of y (M, D) and l1.
    """
    h, mask = _hidden(gate, up)
    dh = reference.project(dy, w_down) + jnp.sign(h) * (dl1 / x.shape[0]).astype(x.dtype)
    dh = jnp.where(mask, dh, jnp.zeros_like(dh))
    summed = partial(reference.multiply, dimensions=_CONTRACT_FIRST, dtype=dtype)
    if w_gate is None or up is None:
        return reference.multiply(dh, w_up), None, summed(dh, x), summed(h, dy)
    dg, du = jnp.where(mask, dh * up, jnp.zeros_like(dh)), dh * gate
    du = jnp.where(mask, du, jnp.zeros_like(du))
    dx = reference.multiply(dg, w_gate) + reference.multiply(du, w_up)
    return dx, summed(dg, x), summed(du, x), summed(h, dy)


def recompute_backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    dy: jax.Array,
    dl1: jax.Array,
    *,
    dtype: DTypeLike,
) -> Weights:
    """`backward` of a call of which nothing was kept."""
    gate = reference.project(x, w_up if w_gate is None else w_gate)
    up = None if w_gate is None else reference.project(x, w_up)
    return backward(x, w_gate, w_up, w_down, gate, up, dy, dl1, dtype=dtype)


def _hidden(gate: jax.Array, up: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    mask = reference.active(gate)
    product = gate if up is None else gate * up
    return jnp.where(mask, product, jnp.zeros_like(product)), mask
