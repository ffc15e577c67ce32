"""The pure step: its loss, its statistics, and accumulation that changes neither."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_runs

from sparse_lm import sparsity
from train.state import build_program
from train.step import make_train_step

TOKENS = np.random.default_rng(1).integers(0, 257, (8, 17)).astype(np.int32)


def one_step(accumulation: int):
    config = tiny_runs.tiny_config("none", "none")
    optimizer = dataclasses.replace(config.optimizer, accumulation=accumulation, warmup_steps=0)
    program = build_program(dataclasses.replace(config, optimizer=optimizer))
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
    assert metrics["live_neurons"] == (after.activity.silent_steps == 0).sum()
    assert 0 < metrics["live_neurons"] <= model.num_layers * model.d_ff
    assert metrics["l0"] < metrics["max_nnz"] <= model.d_ff
    assert after.step == 1
