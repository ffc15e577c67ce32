"""One optimizer step as a pure function of state and tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pallas_kernels import FFNStats
from sparse_lm import sparsity
from train.loss import training_loss
from train.revive import revive_dead
from train.state import Params, Program, TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_train_step(program: Program, axis_name: str | None = None) -> TrainStep:
    """The step ``(state, tokens (B, S + 1) int32) -> (state, metrics)``, ready for ``jit`` or ``pmap``.

    The loss is ``CE + λ(step) · mean over layers of l1`` (`training_loss`). B is the batch that this call
    sees; with ``axis_name`` the gradients and statistics are reduced over that mapped axis.

    Metrics are f32 scalars ``loss, ce, l1, l0, grad_norm, lr, l1_coefficient``, int32 scalars
    ``max_nnz, overflow_rows``, and per layer (L,) ``l0_per_layer`` f32 and ``dead_per_layer`` int32.
    """
    config = program.config

    def loss_and_statistics(
        params: Params, buffers: Params, tokens: jax.Array, coefficient: jax.Array
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(program.graphdef, params | buffers)
        return training_loss(model, tokens, coefficient, z_loss=config.optimizer.z_loss)

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        sparse = config.model.sparsity
        coefficient = sparsity.l1_coefficient(state.step, sparse, state.l1_coefficient)
        gradient = jax.grad(loss_and_statistics, has_aux=True)
        grads, (terms, stats) = accumulated_gradient(
            lambda params, micro: gradient(params, state.buffers, micro, coefficient),
            state.params,
            tokens,
            config.optimizer.accumulation,
        )
        if axis_name is not None:
            grads, terms = jax.lax.pmean((grads, terms), axis_name)
            stats = stats.all_reduce(axis_name)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            params=optax.apply_updates(state.params, updates),
            buffers=state.buffers,
            opt_state=opt_state,
            rng=state.rng,
            step=state.step + 1,
            activity=state.activity.update(stats.neuron_hits, _tokens(tokens, axis_name)),
            l1_coefficient=sparsity.steer_l1(state.l1_coefficient, terms["l0"], state.step, sparse),
        )
        new_state = revive_dead(new_state, config.model)
        norm = optax.tree.norm(grads)
        if config.optimizer.skip_nonfinite:
            new_state = _only_if(jnp.isfinite(terms["loss"]) & jnp.isfinite(norm), new_state, state)
        metrics = {
            **terms,
            "l0_per_layer": stats.l0,
            "dead_per_layer": jnp.sum(new_state.activity.dead(sparse), axis=-1, dtype=jnp.int32),
            "max_nnz": jnp.max(stats.max_nnz),
            "overflow_rows": jnp.sum(stats.overflow_rows),
            "grad_norm": norm,
            "lr": jnp.asarray(program.schedule(state.step), jnp.float32),
            "l1_coefficient": coefficient,
        }
        return new_state, metrics

    return train_step


def make_order_refresh(
    program: Program, axis_name: str | None = None
) -> Callable[[TrainState, Any], TrainState]:
    """``(state, tokens (B, S + 1) int32) -> state`` whose token order has followed the weights and the text.

    It reads one micro-batch. ``axis_name`` is a mapped axis that the batch is split over.
    """
    accumulation = program.config.optimizer.accumulation

    def refresh(state: TrainState, tokens: jax.Array) -> TrainState:
        model = nnx.merge(program.graphdef, state.variables)
        model.refresh_token_order(tokens[::accumulation, :-1], axis_name=axis_name)
        buffers = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        return dataclasses.replace(state, buffers=buffers)

    return refresh


def _tokens(tokens: jax.Array, axis_name: str | None) -> int:
    """Tokens of a step over all devices, from the (B, S + 1) that this call sees."""
    return tokens.shape[0] * (tokens.shape[1] - 1) * (jax.lax.axis_size(axis_name) if axis_name else 1)


def _only_if(finite: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    """``after`` a good step; after a bad one ``before``, but with the step counted, here and by the
    optimizer."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        is_count = new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer)
        return new if is_count else jnp.where(finite, new, old)

    return jax.tree.map(choose, after, before)


def accumulated_gradient(
    gradient: Callable[[Params, jax.Array], tuple[Params, Any]],
    params: Params,
    tokens: jax.Array,
    accumulation: int,
) -> tuple[Params, tuple[Metrics, FFNStats]]:
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
    # Micro-batch a takes rows a, a + A, a + 2A, ...: each device then cuts its own rows and none moves.
    micro_batches = tokens.reshape(-1, accumulation, tokens.shape[-1]).swapaxes(0, 1)

    def add(total: Params, micro: jax.Array) -> tuple[Params, Any]:
        grads, aux = gradient(params, micro)
        return jax.tree.map(jnp.add, total, grads), aux

    total, (terms, stats) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro_batches)
    grads = jax.tree.map(lambda g: g / accumulation, total)
    return grads, (jax.tree.map(lambda term: term.mean(0), terms), FFNStats.merged(stats))
