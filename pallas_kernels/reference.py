"""The executable specification: plain jnp, and what every kernel is judged against.

Dimensions: M tokens, D model width, F hidden neurons. All weights are neuron-major, (F, D).

    gated      g = round(x Wg^T)   u = round(x Wu^T)   h = [active] round(round(a(g)) b(u))   y = round(h Wd)
    non-gated  g = round(x Wu^T)                       h = [active] round(a(g))               y = round(h Wd)

``a`` and ``b`` are the activation's `Rule.value` and `Rule.up`: a(g) = g, or g² for relu2; b(u) = u, or
max(u, 0) for drelu. A neuron is *active* unless its rounded gate is at or under the rounded threshold, so a
NaN gate is active and reaches the output. An inactive neuron contributes nothing, also where its up
projection is infinite: that is what lets a kernel skip it, and it is the one difference from
``a(relu(g)) * u`` in IEEE arithmetic. Weights are taken to be finite.

    l1 = (1/M) sum_ij |h_ij|        l0 = (1/M) sum_ij active_ij        neuron_hits_j = sum_i active_ij

Backward, from dy and the cotangent dl1 of l1; everything is zero where a neuron is inactive:

    dh = round(dy Wd^T + sign(h) dl1 / M)     dg = round(dh b(u) a'(g))     du = round(dh round(a(g)) b'(u))
    dx = round(round(dg Wg) + round(du Wu))   dWg = dg^T x   dWu = du^T x   dWd = h^T dy

The two terms of dh are added in f32 and rounded once: alone, dl1 / M vanishes in 16 bits. Without a gate
dg = round(dh a'(g)), dx = round(dg Wu) and dWu = dg^T x.

``round`` is to the input type and marks every place where a rounding happens; sums accumulate in f32, and f32
inputs multiply as f32, not as the shorter TF32 that XLA would take on a GPU.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common.products import CONTRACT_FIRST, CONTRACT_LAST, multiply, project
from pallas_kernels.options import FFNStats

Weights = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]
"""x (M, D), w_gate (F, D) or None, w_up and w_down (F, D); or their cotangents."""


def projections(
    x: Float[Array, "M D"], w_gate: Float[Array, "F D"] | None, w_up: Float[Array, "F D"]
) -> tuple[Float[Array, "M F"], Float[Array, "M F"] | None]:
    """g and u (M, F); u is None without a gate."""
    return (project(x, w_up), None) if w_gate is None else (project(x, w_gate), project(x, w_up))


def hidden(
    gate: Float[Array, "M F"], up: Float[Array, "M F"] | None, rule: Rule = RELU
) -> tuple[Float[Array, "M F"], Bool[Array, "M F"]]:
    """h (M, F) in the input type, and the (M, F) bool mask of active neurons, from the projections."""
    mask, value = rule.active(gate), rule.value(gate)
    product = value if up is None else value * rule.up(up)
    return jnp.where(mask, product, jnp.zeros_like(product)), mask


def ffn(
    x: Float[Array, "M D"], w_gate: Float[Array, "F D"] | None,
    w_up: Float[Array, "F D"], w_down: Float[Array, "F D"], rule: Rule = RELU,
) -> tuple[Float[Array, "M D"], FFNStats]:  # fmt: skip
    """The whole layer: x (M, D) to y (M, D) and its statistics; ``w_gate=None`` is the non-gated layer."""
    h, mask = hidden(*projections(x, w_gate, w_up), rule)
    return multiply(h, w_down), FFNStats.of_dense(h, mask)


def backward(
    x: Float[Array, "M D"], w_gate: Float[Array, "F D"] | None,
    w_up: Float[Array, "F D"], w_down: Float[Array, "F D"],
    gate: Float[Array, "M F"], up: Float[Array, "M F"] | None,
    dy: Float[Array, "M D"], scale: Float[Array, " _"] | None,
    *, rule: Rule = RELU, dtype: DTypeLike,
) -> Weights:  # fmt: skip
    """Cotangents of x and, in ``dtype``, the weights, from the projections (M, F) and the cotangents dy
    (M, D) and ``scale``, that of every |h|: (1,) or (M,) f32, dl1 / M; None where nothing depends on l1."""
    h, mask = hidden(gate, up, rule)
    dh = hidden_gradient(dy, w_down, h, scale)
    dg, du = pull_back(gate, up, dh, mask, rule)
    inner = [(dg, w_up)] if w_gate is None or du is None else [(dg, w_gate), (du, w_up)]
    dx = sum(multiply(z, weight) for z, weight in inner)
    *dw_gate, dw_up = (multiply(z, x, CONTRACT_FIRST, dtype=dtype) for z, _ in inner)
    dw_down = multiply(h, dy, CONTRACT_FIRST, dtype=dtype)
    return jnp.asarray(dx), dw_gate[0] if dw_gate else None, dw_up, dw_down


def hidden_gradient(
    dy: Float[Array, "M D"], w_down: Float[Array, "F D"], h: Float[Array, "M F"], scale: jax.Array | None
) -> Float[Array, "M F"]:
    """dh (M, F) in the input type, where neurons are active."""
    if scale is None:
        return project(dy, w_down)
    from_y = multiply(dy, w_down, CONTRACT_LAST, dtype=jnp.float32)
    return (from_y + jnp.sign(h).astype(jnp.float32) * scale[:, None]).astype(h.dtype)


def pull_back(gate, up, dh, mask, rule):
    """dg and du (M, F), du None without a gate, in the input type."""
    g, wide = gate.astype(jnp.float32), dh.astype(jnp.float32)

    def rounded(value):
        return jnp.where(mask, value, 0).astype(gate.dtype)

    if up is None:
        return rounded(wide * rule.slope(g)), None
    u, value = up.astype(jnp.float32), rule.value(gate).astype(jnp.float32)
    return rounded(wide * rule.up(u) * rule.slope(g)), rounded(wide * value * rule.up_slope(u))
