"""The L1 schedule and loss, the statistics per layer, and the dead-neuron counters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FFNStats
from sparse_lm import SparsityConfig
from sparse_lm.sparsity import NeuronActivity, l1_coefficient, layer_summary, training_loss

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
    ],
)
def test_l1_schedule(config, expected):
    coefficient = jax.jit(lambda step: l1_coefficient(step, config))
    for step, value in expected.items():
        got = coefficient(jnp.int32(step))
        assert got.dtype == jnp.float32
        assert got.shape == ()
        assert float(got) == pytest.approx(value, rel=1e-6)


def test_training_loss_is_ce_plus_the_mean_l1_of_the_layers():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ce = -np.mean([np.log(probabilities[b, s, targets[b, s]]) for b in range(2) for s in range(3)])
    loss, parts = training_loss(jnp.asarray(logits), jnp.asarray(targets), STATS, 0.5)
    assert float(loss) == pytest.approx(ce + 0.5 * 3.0, rel=1e-6)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {"ce": ce, "l1": 3.0, "l0": 1.5}, rel=1e-6
    )


def test_layer_summary():
    summary = layer_summary(STATS)
    assert {name: values.tolist() for name, values in summary.items()} == {
        "l1": [2.0, 4.0],
        "l0": [1.0, 2.0],
        "max_nnz": [1, 3],
        "overflow_rows": [0, 5],
        "dead_fraction": [0.75, 0.25],
    }


def test_dead_neurons_are_counted_since_they_last_fired():
    activity = NeuronActivity.start(num_layers=2, d_ff=4)
    assert activity.live_neurons().tolist() == [4, 4]
    update = jax.jit(lambda activity, hits: activity.update(hits))
    activity = update(activity, STATS.neuron_hits)
    assert activity.live_neurons().tolist() == [1, 3]
    activity = update(activity, jnp.array([[0, 1, 0, 0], [1, 1, 1, 1]], jnp.int32))
    assert activity.silent_steps.tolist() == [[1, 0, 2, 2], [0, 0, 0, 0]]
    assert activity.live_neurons().tolist() == [1, 4]
    assert activity.live_neurons(window=2).tolist() == [2, 4]
    assert activity.dead(window=2).tolist() == [[False, False, True, True], [False] * 4]
