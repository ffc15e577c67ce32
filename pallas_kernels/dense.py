"""The dense layer taken apart: a forward that keeps its projections, a backward from them, and one from nothing.

The sparse layers go here where sparsity does not pay or does not fit. Numerics are the reference's.

    h = [active] g u    dh = [active] (dy Wd^T + sign(h) dl1 / M)    dg = dh u    du = dh g
    dx = dg Wg + du Wu    dWg = dg^T x    dWu = du^T x    dWd = h^T dy

Without a gate, g is h: dx = dh Wu and dWu = dh^T x.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.options import FFNStats

_CONTRACT_FIRST = (((0,), (0,)), ((), ()))

Weights = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]
"""x (M, D), w_gate (F, D) or None, w_up and w_down (F, D); or their cotangents."""


def forward(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array
) -> tuple[tuple[jax.Array, FFNStats], tuple[jax.Array, jax.Array | None]]:
    """`reference.ffn`, and the projections (M, F) that `backward` takes: the gate's, and the up one's of a gated layer."""
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
) -> Weights:
    """Cotangents of x and the weights from the kept projections and the cotangents of y (M, D) and l1."""
    h, mask = _hidden(gate, up)
    dh = reference.project(dy, w_down) + jnp.sign(h) * (dl1 / x.shape[0]).astype(x.dtype)
    dh = jnp.where(mask, dh, jnp.zeros_like(dh))
    dw_down = reference.multiply(h, dy, _CONTRACT_FIRST)
    if w_gate is None or up is None:
        return reference.multiply(dh, w_up), None, reference.multiply(dh, x, _CONTRACT_FIRST), dw_down
    dg, du = jnp.where(mask, dh * up, jnp.zeros_like(dh)), dh * gate
    du = jnp.where(mask, du, jnp.zeros_like(du))
    dx = reference.multiply(dg, w_gate) + reference.multiply(du, w_up)
    return dx, reference.multiply(dg, x, _CONTRACT_FIRST), reference.multiply(du, x, _CONTRACT_FIRST), dw_down


def recompute_backward(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array, dy: jax.Array, dl1: jax.Array
) -> Weights:
    """`backward` of a call of which nothing was kept."""
    gate = reference.project(x, w_up if w_gate is None else w_gate)
    up = None if w_gate is None else reference.project(x, w_up)
    return backward(x, w_gate, w_up, w_down, gate, up, dy, dl1)


def _hidden(gate: jax.Array, up: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    mask = reference.active(gate)
    product = gate if up is None else gate * up
    return jnp.where(mask, product, jnp.zeros_like(product)), mask
