"""One optimizer step as a pure function of state and tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_lm import sparsity
from train.gradient import Gradient, make_gradient
from train.revive import revive_dead
from train.state import Params, Program, TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_train_step(
    program: Program,
    gradient: Gradient | None = None,
    *,
    axis_name: str | None = None,
    as_moments: Callable[[Params], Params] = lambda params: params,
) -> TrainStep:
    """The step ``(state, tokens (B, S + 1) int32) -> (state, metrics)``, ready for ``jit`` or ``pmap``.

    The loss is ``CE + λ(step) · mean over layers of l1`` (`training_loss`). B is the batch that this call
    sees.

    Metrics are f32 scalars ``loss, ce, l1, l0, grad_norm, lr, l1_coefficient``, int32 scalars
    ``max_nnz, overflow_rows``, and per layer (L,) ``l0_per_layer`` f32 and ``dead_per_layer, pairs_per_layer,
    dense_tokens_per_layer`` int32.

    Args:
      program: the run.
      gradient: of the batch, over whatever devices there are; by default that of one device.
      axis_name: the mapped axis under ``pmap``.
      as_moments: places parameters where the optimizer's moments of them are.
    """
    config = program.config
    gradient = gradient or make_gradient(program)

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        sparse = config.model.sparsity
        coefficient = sparsity.l1_coefficient(state.step, sparse, state.l1_coefficient)
        grads, (terms, stats) = gradient(state.params, state.buffers, tokens, coefficient)
        params = as_moments(state.params)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, params)
        new_state = TrainState(
            params=optax.apply_updates(params, updates),
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
            "pairs_per_layer": stats.pairs,
            "dense_tokens_per_layer": stats.dense_tokens,
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
