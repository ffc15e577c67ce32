"""The dense layer over blocks of tokens: where a compact format has no room or does not pay.

A program that may have to take this path reserves the memory of it: over all tokens at once, the dense
layer's intermediates would cost in every call what the compact format saves. Over a block they are
(block, F), and weight gradients are summed over blocks in f32, as the dense layer sums them over tokens.

The blocks stand in a straight line, written by kernels. This path is a branch of a conditional, and XLA (JAX
0.11.2) records no conditional in a CUDA graph that holds a loop or an asynchronous copy: the host would wait
for the decision in every call.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

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
"""Most tokens of a block in up to `MOST_BLOCKS` of them: enough for a GEMM to run at its full rate."""

MOST_BLOCKS = 16
"""Most blocks of a call that is differentiated: the program has each of them. From 65,536 tokens on the
blocks grow instead, at no cost in memory: a sixteenth of what the dense layer takes for all tokens is less
than the gates, which the forward in a compact format writes for all of them."""

_ARRAYS = 3
"""(tokens, F) arrays of the dense layer: the gate, the up projection and h."""


def forward(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """y (M, D) and each token's sum of ``|h|``, (M,) f32, for x (M, D) and weights (F, D)."""

    def one(_, x):
        h, _ = reference.hidden(*reference.projections(x, w_gate, w_up), rule)
        return None, (multiply(h, w_down), jnp.sum(jnp.abs(h), axis=1, dtype=jnp.float32))

    return _in_turn(one, None, (x,), _split(x.shape[0]))[1]


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

    def one(parts, x):
        within = None if groups is None or size > most else x.shape[0] // size
        y, stats = dense.infer(x, w_gate, w_up, w_down, options, "xla", within)
        return [*parts, stats], y

    parts, y = _in_turn(one, [], (x,), blocks)
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
    own_scale = None if scale is None or scale.shape[0] != tokens else scale

    def one(sums, x, dy, own):
        dx, *gradients = dense.recompute_backward(
            x, *weights, dy, scale if own is None else own, rule=rule, dtype=jnp.float32
        )
        # XLA places the sums between the block's (block, F) arrays otherwise, where they leave gaps.
        gradients = lax.optimization_barrier(gradients)
        return gradients if sums is None else jax.tree.map(jnp.add, sums, gradients), dx

    sums, dx = _in_turn(one, None, (x, dy, own_scale), _split(tokens))
    dw_gate, dw_up, dw_down = jax.tree.map(lambda total: total.astype(dtype), sums)
    return dx, dw_gate, dw_up, dw_down


def _split(tokens: int) -> list[token_blocks.Block]:
    """The blocks of a call that is differentiated."""
    return token_blocks.split(tokens, max(BLOCK, -(-tokens // MOST_BLOCKS)))


def _in_turn(
    one: Callable[..., tuple[Any, Any]],
    carry: Any,
    arrays: tuple[jax.Array | None, ...],
    blocks: list[token_blocks.Block],
) -> tuple[Any, Any]:
    """`lax.scan` over blocks of tokens in a straight line, in the memory of one block.

    Args:
      one: ``carry, outputs = one(carry, *rows)``, with a block's rows of ``arrays`` and outputs for each of
        them. A carry may be of another structure than the one before.
      arrays: (M, ...), or None, which is passed on.
      blocks: all of the M tokens in order.

    Returns:
      The last carry, and the outputs of all tokens.
    """
    tokens, whole = sum(block.tokens for block in blocks), None
    for start, count in blocks:
        rows = [None if array is None else lax.slice_in_dim(array, start, start + count) for array in arrays]
        carry, outputs = one(carry, *rows)
        if whole is None:
            whole = jax.tree.map(partial(_room_for, tokens=tokens), outputs)
        whole = jax.tree.map(partial(_write, start=start), whole, outputs)
        # The next block waits for this one: together they would hold the intermediates of both.
        arrays, carry, whole = lax.optimization_barrier((arrays, carry, whole))
    return carry, whole


def _room_for(rows: jax.Array, tokens: int) -> jax.Array:
    """An array for ``tokens`` rows like these."""
    return varying_axes.vary_with(rows, lax.empty((tokens, *rows.shape[1:]), rows.dtype))


def _write(whole: jax.Array, rows: jax.Array, start: int) -> jax.Array:
    """``whole`` with these rows from ``start`` on.

    XLA writes to a place that it knows by an asynchronous copy, so it must not know this one.
    """
    place = lax.optimization_barrier(jnp.int32(start))
    return lax.dynamic_update_slice_in_dim(whole, rows, place, axis=0)
