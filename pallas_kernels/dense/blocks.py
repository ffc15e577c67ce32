"""The dense layer over blocks of tokens: where a compact format has no room or does not pay.

A program that may have to take this path reserves the memory of it: over all tokens at once, the dense
layer's intermediates would cost in every call what the compact format saves. Over a block they are
(block, F), and weight gradients are summed over blocks in f32, as the dense layer sums them over tokens.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import dense, reference
from pallas_kernels.activations import Rule
from pallas_kernels.common import token_blocks, varying_axes
from pallas_kernels.common.groups import Groups, group_size
from pallas_kernels.common.products import multiply
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.reference import Weights

BLOCK = 4096
"""Most tokens of a block: enough for a GEMM to run at its full rate."""

_ARRAYS = 3
"""(tokens, F) arrays of the dense layer: the gate, the up projection and h."""


def forward(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """y (M, D) and each token's sum of ``|h|``, (M,) f32, for x (M, D) and weights (F, D)."""

    def one(x):
        h, _ = reference.hidden(*reference.projections(x, w_gate, w_up), rule)
        return multiply(h, w_down), jnp.sum(jnp.abs(h), axis=1, dtype=jnp.float32)

    return jax.tree.map(partial(_join, tokens=x.shape[0]), lax.map(one, _split(x)))


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    groups: Groups = None,
    *,
    block_tokens: int | None,
) -> tuple[jax.Array, FFNStats]:
    """`dense.infer`: the same y and integer statistics, l1 summed in another order.

    The (tokens, F) arrays of a block, of which there are ``_ARRAYS``, take the room of one of
    ``block_tokens``; None is `dense.infer` itself.
    """
    tokens = x.shape[0]
    if block_tokens is None or tokens <= block_tokens:
        return dense.infer(x, w_gate, w_up, w_down, options, "xla", groups)
    multiple = token_blocks.MULTIPLE
    most = max(1, block_tokens // (_ARRAYS * multiple)) * multiple
    size = group_size(tokens, groups)
    if groups is None:
        blocks = token_blocks.split(tokens, most)
    elif size <= most:  # whole groups in a block
        length = most // size * size
        starts = range(0, tokens, length)
        blocks = [token_blocks.Block(start, min(length, tokens - start)) for start in starts]
    else:  # several blocks in a group
        blocks = [
            token_blocks.Block(start + block.start, block.tokens)
            for start in range(0, tokens, size)
            for block in token_blocks.split(size, most)
        ]
    y, parts = varying_axes.vary_with(x, lax.empty(x.shape, x.dtype)), []
    for start, count in blocks:
        within = None if groups is None or size > most else count // size
        rows = lax.slice_in_dim(x, start, start + count)
        outputs = dense.infer(rows, w_gate, w_up, w_down, options, "xla", within)
        # The next block waits for this one: together they would hold the intermediates of both.
        x, (of_block, stats) = lax.optimization_barrier((x, outputs))
        y = lax.dynamic_update_slice_in_dim(y, of_block, start, axis=0)
        parts.append(stats)
    counts = [block.tokens for block in blocks]
    if groups is None:
        return y, _whole(parts, counts)
    if size <= most:
        return y, jax.tree.map(lambda *of_groups: jnp.concatenate(of_groups), *parts)
    each = len(blocks) // groups
    whole = [_whole(parts[n : n + each], counts[n : n + each]) for n in range(0, len(parts), each)]
    return y, jax.tree.map(lambda *of_groups: jnp.stack(of_groups), *whole)


def _whole(parts: list[FFNStats], counts: list[int]) -> FFNStats:
    """The statistics of blocks of ``counts`` tokens together."""
    tokens = sum(counts)
    stacked = jax.tree.map(lambda *of_blocks: jnp.stack(of_blocks), *parts)
    merged = FFNStats.merged(stacked)  # its means are of equal parts, which blocks are not
    return dataclasses.replace(
        merged,
        l1=jnp.sum(stacked.l1 * jnp.asarray(counts, jnp.float32)) / tokens,
        l0=jnp.sum(merged.neuron_hits, dtype=jnp.float32) / tokens,
    )


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
