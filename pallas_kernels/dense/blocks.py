"""The dense layer over blocks of tokens, for calls that a compact format has no room for.

A program that may have to take this path reserves the memory of it: over all tokens at once, the dense
layer's intermediates would cost in every call what the compact format saves. Over a block they are
(block, F), and weight gradients are summed over blocks in f32, as the dense layer sums them over tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dense, reference
from pallas_kernels.common import varying_axes

BLOCK = 4096
"""Most tokens of a block: enough for a GEMM to run at its full rate."""


def forward(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y (M, D) and the () f32 sum of ``|h|`` of `reference.ffn`, for x (M, D) and weights (F, D)."""

    def one(x):
        y, stats = reference.ffn(x, w_gate, w_up, w_down)
        return y, stats.l1 * x.shape[0]

    y, l1 = lax.map(one, _split(x))
    return _join(y, x.shape[0]), jnp.sum(l1)


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    dy: jax.Array,
    dl1: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> dense.Weights:
    """`dense.recompute_backward`: cotangents of x and, in ``dtype``, the weights from
    those of y (M, D) and l1."""
    tokens, weights = x.shape[0], (w_gate, w_up, w_down)
    blocks = _split(x), _split(dy)
    share = dl1 * (blocks[0].shape[1] / tokens)  # the cotangent of a block's own mean

    def one(sums, block):
        dx, *gradients = dense.recompute_backward(block[0], *weights, block[1], share, dtype=jnp.float32)
        return jax.tree.map(jnp.add, sums, gradients), dx

    zeros = jax.tree.map(partial(_zeros_like, x), list(weights))
    sums, dx = lax.scan(one, zeros, blocks)
    dw_gate, dw_up, dw_down = jax.tree.map(lambda total: total.astype(dtype), sums)
    return _join(dx, tokens), dw_gate, dw_up, dw_down


def _zeros_like(x, weight):
    return varying_axes.vary_with(x, jnp.zeros(weight.shape, jnp.float32))


def _split(rows: jax.Array) -> jax.Array:
    """(n, block, D): rows (M, D) in equal blocks, the last one filled up with zeros,
    which no gate is active for."""
    tokens = rows.shape[0]
    count = -(-tokens // BLOCK)
    block = -(-tokens // count)
    return jnp.pad(rows, ((0, count * block - tokens), (0, 0))).reshape(count, block, -1)


def _join(blocks: jax.Array, tokens: int) -> jax.Array:
    return blocks.reshape(-1, blocks.shape[-1])[:tokens]
