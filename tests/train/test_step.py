"""The pure step: its loss, its statistics, and accumulation that changes neither."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from sparse_lm import sparsity
from sparse_lm.sparsity import NeuronActivity
from train.state import build_program
from train.step import make_train_step

TOKENS_OF_A_STEP = 8 * 16
TOKENS = np.random.default_rng(1).integers(0, 257, (8, 17)).astype(np.int32)


def program_of(sparsity_options=None, **optimizer_options):
    config = tiny_runs.tiny_config("none", "none")
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0, **optimizer_options)
    sparse = dataclasses.replace(config.model.sparsity, **(sparsity_options or {}))
    model = dataclasses.replace(config.model, sparsity=sparse)
    return build_program(dataclasses.replace(config, optimizer=optimizer, model=model))


def one_step(accumulation: int):
    program = program_of(accumulation=accumulation)
    state = jax.jit(program.init)()
    return program, state, *jax.jit(make_train_step(program))(state, TOKENS)


@pytest.fixture(scope="module")
def whole():
    return one_step(accumulation=1)


@pytest.fixture(scope="module")
def accumulated():
    return one_step(accumulation=4)


def test_accumulation_gives_the_parameters_of_the_big_batch(whole, accumulated):
    # The same f32 sums in another order.
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6),
        tiny_runs.snapshot(accumulated[2]),
        tiny_runs.snapshot(whole[2]),
    )


def test_accumulation_gives_the_statistics_of_the_big_batch(whole, accumulated):
    assert whole[3].keys() == accumulated[3].keys()
    for name, expected in whole[3].items():
        np.testing.assert_allclose(accumulated[3][name], expected, rtol=1e-5, err_msg=name)


def test_step_moves_every_parameter(whole):
    _, before, after, _ = whole
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before.params, after.params)
    assert all(jax.tree.leaves(moved)), moved


def test_loss_is_cross_entropy_plus_the_weighted_l1(whole):
    program, _, _, metrics = whole
    coefficient = sparsity.l1_coefficient(0, program.config.model.sparsity)
    assert metrics["l1_coefficient"] == coefficient > 0
    np.testing.assert_allclose(metrics["loss"], metrics["ce"] + coefficient * metrics["l1"], rtol=1e-6)


def test_statistics_agree_with_each_other(whole):
    program, _, after, metrics = whole
    model = program.config.model
    assert metrics["l0_per_layer"].shape == (model.num_layers,)
    np.testing.assert_allclose(metrics["l0"], metrics["l0_per_layer"].mean(), rtol=1e-6)
    assert metrics["dead_per_layer"].tolist() == [0, 0]  # too few tokens to call any neuron dead
    assert set(np.unique(after.activity.silent_tokens)) <= {0, TOKENS_OF_A_STEP}
    assert metrics["l0"] < metrics["max_nnz"] <= model.d_ff
    assert after.step == 1


def test_step_that_is_not_finite_changes_nothing_but_the_count():
    program = program_of(accumulation=1, skip_nonfinite=1)
    step = jax.jit(make_train_step(program))
    good = jax.jit(program.init)()
    bad = dataclasses.replace(good, params=jax.tree.map(lambda leaf: leaf * 1e38, good.params))
    after, metrics = step(bad, TOKENS)
    assert not np.isfinite(metrics["grad_norm"])
    for name in ("params", "activity", "l1_coefficient", "rng"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(bad, name))
    counts = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim == 0]
    assert {int(count) for count in (after.step, *counts)} == {1}
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert moments
    assert not any(leaf.any() for leaf in moments)
    after, _ = step(good, TOKENS)
    assert (after.params["embedding"] != good.params["embedding"]).any()


@pytest.mark.parametrize("revive", ["reset", "keep"])
def test_dead_neurons_come_back_and_the_optimizer_forgets_them_if_asked(revive):
    """Half of the first layer's gates point away from every token, so that their neurons never fire."""
    program = program_of({"revive": revive, "dead_after": TOKENS_OF_A_STEP}, accumulation=1)
    start = jax.jit(program.init)()
    once_silent = NeuronActivity(jnp.ones_like(start.activity.silent_tokens))
    start = dataclasses.replace(start, activity=once_silent)
    shut = start.params["blocks"]["ffn"]["w_gate"].at[0, ::2].set(0.0)
    start.params["blocks"]["ffn"]["w_gate"] = shut
    moved = jax.tree.map(lambda leaf: leaf + 1e-3 if leaf.ndim else leaf, start.opt_state)
    state, metrics = jax.jit(make_train_step(program))(dataclasses.replace(start, opt_state=moved), TOKENS)
    dead = np.asarray(state.activity.silent_tokens) > TOKENS_OF_A_STEP
    assert dead[0, ::2].all()
    assert metrics["dead_per_layer"].tolist() == dead.sum(-1).tolist()

    gate = np.asarray(state.params["blocks"]["ffn"]["w_gate"])
    # Zero rows, moved by the optimizer's remembered moments alone, then mixed.
    update = gate[0, ::2].mean() / 0.9
    assert (gate[0, ::2] - 0.9 * update).std() == pytest.approx(0.1 * 0.02, rel=0.2)
    rows = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "w_gate" in jax.tree_util.keystr(path)
    }
    assert len(rows) == 2
    for leaf in rows.values():
        assert bool(leaf[dead].any()) is (revive == "keep")
        assert leaf[~dead].any()
