"""The learning-rate schedule, the decay mask and the optimizer's reach."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from train.config import OptimizerConfig
from train.state import build_optimizer, build_program, learning_rate_schedule, weight_decay_mask


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)]
)
def test_schedule_warms_up_then_follows_the_cosine(step, factor):
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=10, final_fraction=0.1)
    assert learning_rate_schedule(config, steps=110)(step) == pytest.approx(factor * 2e-3, rel=1e-6)


def test_schedule_without_warm_up_starts_at_the_peak():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), steps=10)
    assert schedule(0) == pytest.approx(1e-3)
    assert schedule(10) == pytest.approx(0)


def test_warm_up_longer_than_the_run_never_reaches_the_peak():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=100), steps=50)
    assert schedule(49) == pytest.approx(0.49e-3)


def test_only_matrices_decay():
    config = tiny_runs.tiny_config("none", "none", model=dataclasses.replace(tiny_runs.MODEL, qkv_bias=True))
    mask = weight_decay_mask(build_program(config).abstract_state().params)
    flat = {jax.tree_util.keystr(path): decays for path, decays in jax.tree_util.tree_leaves_with_path(mask)}
    kept = {name for name, decays in flat.items() if not decays}
    assert {name for name in flat if "norm" in name or "bias" in name} == kept
    assert len(kept) == 6  # two norms a block, the final one, and three biases
    assert len(flat) - len(kept) == 8  # embedding, four of attention, three of the feed-forward


def test_decay_shrinks_a_matrix_and_leaves_a_norm():
    config = OptimizerConfig(weight_decay=0.5)
    optimizer = build_optimizer(config, optax.constant_schedule(0.1))
    params = {"w": jnp.ones((2, 2)), "norm": {"scale": jnp.ones((2, 2))}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["w"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(new["norm"]["scale"], 1)


def test_gradients_are_clipped_by_their_global_norm():
    # A large eps makes Adam's first update nearly linear in the clipped gradient: m / (|g| + eps).
    config = OptimizerConfig(weight_decay=0, clip=1.0, eps=1e3)
    optimizer = build_optimizer(config, optax.constant_schedule(1.0))
    params = {"w": jnp.zeros((4,)), "v": jnp.zeros((4,))}
    updates, _ = optimizer.update(jax.tree.map(lambda p: p + 100.0, params), optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 1e-3, rtol=1e-3)


def test_seed_decides_the_first_state():
    first, other = (
        jax.jit(build_program(tiny_runs.tiny_config("none", "none", seed=seed)).init)() for seed in (1, 2)
    )
    assert (first.params["embedding"] != other.params["embedding"]).any()
    assert (first.rng != other.rng).any()
