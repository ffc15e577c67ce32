"""The gradient of a step: of one micro-batch after the other, and over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import FFNStats
from train.exchange import Exchange
from train.loss import Terms, training_loss
from train.state import Params, Program

Gradient = Callable[[Params, Params, jax.Array, jax.Array | float], tuple[Params, tuple[Terms, FFNStats]]]
"""(parameters, buffers, tokens (B, S + 1) int32, λ) -> (gradient of the mean loss, (terms, statistics))."""


def make_gradient(program: Program, exchange: Exchange | None = None) -> Gradient:
    """The gradient and statistics of a batch, as `Gradient`.

    Args:
      program: the run.
      exchange: for the body of a ``shard_map`` or ``pmap``: the function then takes one device's tokens and
        parameters as that device stores them, and its results are of the whole batch.
    """
    optimizer = program.config.optimizer

    def gradient(params, buffers, tokens, coefficient):
        devices = 1 if exchange is None else lax.axis_size(exchange.axis)

        def loss(parts: Params, micro: jax.Array) -> tuple[jax.Array, Any]:
            weights, of_layers = (parts, None) if exchange is None else exchange.weights(parts, params)
            model = nnx.merge(program.graphdef, weights | buffers)
            loss, statistics = training_loss(
                model, micro, coefficient, z_loss=optimizer.z_loss, layer_weights=of_layers
            )
            return loss / devices, statistics  # the sum over devices is the mean

        grads, (terms, stats) = accumulated_gradient(
            jax.grad(loss, has_aux=True),
            params if exchange is None else exchange.parts(params),
            tokens,
            optimizer.accumulation,
        )
        if exchange is not None:
            grads, terms = exchange.finish(grads), lax.pmean(terms, exchange.axis)
            stats = stats.all_reduce(exchange.axis)
        return grads, (terms, stats)

    return gradient


def accumulated_gradient(
    gradient: Callable[[Params, jax.Array], tuple[Params, Any]],
    params: Params,
    tokens: jax.Array,
    accumulation: int,
) -> tuple[Params, tuple[Terms, FFNStats]]:
    """Gradient and statistics of the whole batch from ``accumulation`` equal micro-batches,
    one in memory at a time.

    Args:
      gradient: (params, tokens (B / accumulation, S + 1)) -> (gradient of the mean loss, (terms, stats)).
      params: what to differentiate.
      tokens: (B, S + 1) int32.
      accumulation: how many micro-batches; divides B.

    Returns:
      What ``gradient(params, tokens)`` returns, up to the order of f32 sums.
    """
    if accumulation == 1:
        return gradient(params, tokens)
    # Micro-batch a takes rows a, a + A, a + 2A, ... of each device's own.
    micro_batches = tokens.reshape(-1, accumulation, tokens.shape[-1]).swapaxes(0, 1)

    def add(total: Params, micro: jax.Array) -> tuple[Params, Any]:
        grads, aux = gradient(params, micro)
        return jax.tree.map(jnp.add, total, grads), aux

    total, (terms, stats) = lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro_batches)
    grads = jax.tree.map(lambda g: g / accumulation, total)
    return grads, (jax.tree.map(lambda term: term.mean(0), terms), FFNStats.merged(stats))
