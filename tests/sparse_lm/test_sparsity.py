"""The L1 schedule and loss, the statistics per layer, and the dead-neuron counters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FFNStats
from sparse_lm import SparsityConfig, sparsity
from sparse_lm.sparsity import NeuronActivity, l1_coefficient, layer_summary

STATS = FFNStats(
    l1=jnp.array([2.0, 4.0]),
    l0=jnp.array([1.0, 2.0]),
    neuron_hits=jnp.array([[3, 0, 0, 0], [1, 2, 3, 0]], jnp.int32),
    max_nnz=jnp.array([1, 3], jnp.int32),
    overflow_rows=jnp.array([0, 5], jnp.int32),
    pairs=jnp.array([4, 6], jnp.int32),
    dense_tokens=jnp.array([0, 5], jnp.int32),
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SparsityConfig(l1=2e-5), {0: 2e-5, 10_000: 2e-5}),
        (
            SparsityConfig(l1=3e-4, schedule="linear", off_steps=5000, ramp_steps=5000),
            {0: 0.0, 4999: 0.0, 5000: 0.0, 6000: 6e-5, 7500: 1.5e-4, 10_000: 3e-4, 30_000: 3e-4},
        ),
        (SparsityConfig(l1=1.0, schedule="linear", off_steps=3), {0: 0.0, 2: 0.0, 3: 1.0, 4: 1.0}),
        (SparsityConfig(l1=1.0, schedule="linear", ramp_steps=4), {0: 0.0, 1: 0.25, 4: 1.0}),
        (
            SparsityConfig(l1=0.5, schedule="staged", stage_steps=(3, 7), stage_l1=(0.25, 2.0)),
            {0: 0.5, 2: 0.5, 3: 0.25, 6: 0.25, 7: 2.0, 100: 2.0},
        ),
        (SparsityConfig(l1=0.5, schedule="target", target_l0=8, off_steps=3), {2: 0.0, 3: 0.5, 100: 0.5}),
    ],
)
def test_l1_schedule(config, expected):
    coefficient = jax.jit(lambda step: l1_coefficient(step, config))
    for step, value in expected.items():
        got = coefficient(jnp.int32(step))
        assert got.dtype == jnp.float32
        assert got.shape == ()
        assert float(got) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("l0", "factor"), [(8.0, 1.0), (16.0, 1.1), (4.0, 1 / 1.1), (32.0, 1.21), (1000.0, 1.21), (0.0, 1 / 1.21)]
)
def test_steered_coefficient_moves_towards_the_wanted_l0(l0, factor):
    config = SparsityConfig(l1=0.5, schedule="target", target_l0=8, off_steps=3, steer_rate=0.1)
    steer = jax.jit(lambda step: sparsity.steer_l1(jnp.float32(0.5), jnp.float32(l0), step, config))
    assert float(steer(2)) == 0.5
    assert float(steer(3)) == pytest.approx(0.5 * factor, rel=1e-6)
    assert float(l1_coefficient(3, config, steer(3))) == float(steer(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_steps": 5}, "off-steps needs schedule=linear or target; got constant"),
        ({"schedule": "staged", "ramp_steps": 5}, "ramp-steps needs schedule=linear; got staged"),
        ({"target_l0": 5.0}, "target-l0 needs schedule=target; got constant"),
        ({"schedule": "target"}, "target-l0 must be a finite positive number for schedule=target; got 0.0"),
        ({"schedule": "staged", "stage_steps": (5, 5), "stage_l1": (1, 2)}, "stage-steps must be at least 1"),
        ({"schedule": "staged", "stage_steps": (5,)}, "stage-l1 must have a value for each of the 1"),
        ({"dead_after": 0}, "dead-after must be from 1 to 1073741823 tokens; got 0"),
    ],
)
def test_sparsity_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**options)


def test_layer_summary():
    summary = layer_summary(STATS)
    assert {name: values.tolist() for name, values in summary.items()} == {
        "l1": [2.0, 4.0],
        "l0": [1.0, 2.0],
        "max_nnz": [1, 3],
        "overflow_rows": [0, 5],
        "silent_fraction": [0.75, 0.25],
    }


def test_a_neuron_is_dead_after_so_many_tokens_of_silence():
    config = SparsityConfig(dead_after=200)
    activity = NeuronActivity.start(num_layers=2, d_ff=4)
    assert not activity.dead(config).any()
    update = jax.jit(lambda activity, hits: activity.update(hits, 100))
    activity = update(activity, STATS.neuron_hits)
    assert activity.silent_tokens.tolist() == [[0, 100, 100, 100], [0, 0, 0, 100]]
    assert not activity.dead(config).any()
    activity = update(activity, jnp.array([[0, 1, 0, 0], [1, 1, 1, 0]], jnp.int32))
    assert activity.dead(config).tolist() == [[False, False, True, True], [False, False, False, True]]
    activity = update(activity, jnp.array([[0, 0, 1, 0], [0, 0, 0, 0]], jnp.int32))
    assert activity.silent_tokens.tolist() == [[200, 100, 0, 300], [100, 100, 100, 300]]


def test_silence_is_counted_without_overflow():
    activity = NeuronActivity.start(num_layers=1, d_ff=1)
    for _ in range(3):
        activity = activity.update(jnp.zeros((1, 1), jnp.int32), 2**31)
    assert activity.silent_tokens.tolist() == [[2**30 - 1]]


def test_dead_rows_are_mixed_with_noise_and_others_stay():
    config = SparsityConfig(revive="keep", revive_mix=0.25, revive_std=0.5)
    gate = jnp.full((2, 40, 50), 4.0)
    dead = jnp.zeros((2, 40), bool).at[1, 3:].set(True)
    revive = jax.jit(lambda gate, dead, key: sparsity.revive(gate, dead, key, config))
    mixed = np.asarray(revive(gate, dead, jax.random.key(1)))
    np.testing.assert_array_equal(mixed[~np.asarray(dead)], 4.0)
    noise = (mixed[1, 3:] - 0.75 * 4.0) / 0.25
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(0.5, rel=0.05)
    np.testing.assert_array_equal(revive(gate, jnp.zeros_like(dead), jax.random.key(1)), gate)
