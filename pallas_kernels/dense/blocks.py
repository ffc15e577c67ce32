"""The dense layer over blocks of tokens, for calls that a compact format has no room for.

A program that may have to take this path reserves the memory of it: over all tokens at once, the dense
layer's intermediates would cost in every call what the compact format saves. Over a block they are
(block, F), and weight gradients are summed over blocks in f32, as the dense layer sums them over tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import dense, reference
from pallas_kernels.activations import Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.common.products import multiply
from pallas_kernels.reference import Weights

BLOCK = 4096
"""Most tokens of a block: enough for a GEMM to run at its full rate."""


def forward(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """y (M, D) and each token's sum of ``|h|``, (M,) f32, for x (M, D) and weights (F, D)."""

    def one(x):
        h, _ = reference.hidden(*reference.projections(x, w_gate, w_up), rule)
        return multiply(h, w_down), jnp.sum(jnp.abs(h), axis=1, dtype=jnp.float32)

    return jax.tree.map(partial(_join, tokens=x.shape[0]), lax.map(one, _split(x)))


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    dy: jax.Array,
    scale: jax.Array | None,
    *,
    rule: Rule,
    dtype: DTypeLike,
) -> Weights:
    """`dense.recompute_backward`: cotangents of x and, in ``dtype``, the weights, from those of y (M, D) and,
    ``scale``, of every |h|."""
    tokens, weights = x.shape[0], (w_gate, w_up, w_down)
    own_scale = None if scale is None or scale.shape[0] != tokens else _split(scale)
    blocks = _split(x), _split(dy), own_scale

    def one(sums, block):
        x, dy, own = block
        dx, *gradients = dense.recompute_backward(
            x, *weights, dy, scale if own is None else own, rule=rule, dtype=jnp.float32
        )
        return jax.tree.map(jnp.add, sums, gradients), dx

    zeros = jax.tree.map(partial(_zeros_like, x), list(weights))
    sums, dx = lax.scan(one, zeros, blocks)
    dw_gate, dw_up, dw_down = jax.tree.map(lambda total: total.astype(dtype), sums)
    return _join(dx, tokens), dw_gate, dw_up, dw_down


def _zeros_like(x, weight):
    return varying_axes.vary_with(x, jnp.zeros(weight.shape, jnp.float32))


def _split(rows: jax.Array) -> jax.Array:
    """(n, block, ...): rows (M, ...) in equal blocks, the last one filled up with zeros,
    which no gate is active for."""
    tokens = rows.shape[0]
    count = -(-tokens // BLOCK)
    block = -(-tokens // count)
    padding = ((0, count * block - tokens),) + ((0, 0),) * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(count, block, *rows.shape[1:])


def _join(blocks: jax.Array, tokens: int) -> jax.Array:
    return blocks.reshape(-1, *blocks.shape[2:])[:tokens]
