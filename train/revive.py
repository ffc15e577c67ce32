"""Brings dead neurons back after a step: their gate rows, and what the optimizer remembers of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm import ModelConfig, sparsity
from train.state import TrainState


def revive_dead(state: TrainState, config: ModelConfig) -> TrainState:
    """``state`` with the rows of dead neurons mixed with noise, as ``config.sparsity.revive`` asks.

    The noise follows from ``state.rng`` and ``state.step``, so that a resumed run draws the same.
    """
    sparse = config.sparsity
    if sparse.revive == "off":
        return state
    gate = ("blocks", "ffn", "w_gate" if config.gated else "w_up")
    dead = state.activity.dead(sparse)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def mixed(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return sparsity.revive(leaf, dead, key, sparse) if _ends_with(path, gate) else leaf

    def forgotten(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jnp.where(dead[..., None], 0, leaf) if _ends_with(path, gate) else leaf

    opt_state = state.opt_state
    if sparse.revive == "reset":
        opt_state = jax.tree_util.tree_map_with_path(forgotten, opt_state)
    params = jax.tree_util.tree_map_with_path(mixed, state.params)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def _ends_with(path: tuple[Any, ...], names: tuple[str, ...]) -> bool:
    """Whether a leaf's last keys are ``names``: moments stand under the names of their parameters."""
    return jax.tree_util.keystr(path[-len(names) :], simple=True, separator=".") == ".".join(names)
