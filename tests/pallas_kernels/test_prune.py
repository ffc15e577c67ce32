"""Pruning changes no result on the data it was counted on, and a check finds what it loses on other data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designed import CLASSES
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_layers import (
    DTYPES,
    KINDS,
    ON_PATHS,
    OPTIONS,
    D,
    F,
    M,
    assert_close,
    designed_layer,
    integer_layer,
    property_test,
    run,
)

from pallas_kernels.neurons import PruneCheck, Pruned, neuron_order, prune_silent, reorder

compiling_test = settings(property_test, max_examples=10)  # a new shape an example


@pytest.mark.parametrize("kind", KINDS)
@compiling_test
@given(seed=st.integers(0, 2**32 - 1), multiple=st.sampled_from([1, 5, 8]))
def test_pruning_gives_the_same_bits_on_the_calibration_data(kind, seed, multiple):
    x, weights = integer_layer(seed, kind)
    y, stats = run(x, weights)
    assume(stats.neuron_hits.any())
    pruned = prune_silent(weights, stats.neuron_hits, tokens=M, multiple=multiple)
    again, left = run(x, pruned.weights)
    np.testing.assert_array_equal(again, y)
    assert (left.l1, left.l0, left.max_nnz) == (stats.l1, stats.l0, stats.max_nnz)
    assert pruned.kept.dtype == jnp.int32
    np.testing.assert_array_equal(
        jnp.zeros(F, jnp.int32).at[pruned.kept].set(left.neuron_hits), stats.neuron_hits
    )
    assert pruned.verify(x) == PruneCheck(0, 0)
    assert len(pruned.kept) + len(pruned.dropped_gate) == F
    assert len(pruned.kept) % multiple == 0 or len(pruned.kept) == F


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("path", "dtype"), ON_PATHS)
def test_a_pruned_layer_gives_the_same_result_on_every_path(path, dtype, kind):
    x, weights, active = designed_layer("few", dtype=dtype, kind=kind)
    options = OPTIONS.get(path)
    y, stats = run(x, weights, options)
    pruned = prune_silent(weights, stats.neuron_hits)
    np.testing.assert_array_equal(pruned.kept, np.flatnonzero(active.any(axis=0)))
    assert 0 < len(pruned.kept) < len(weights["w_up"]) / 2
    again, left = run(x, pruned.weights, options)
    assert_close(again, y, dtype)
    assert_close(left.l1, stats.l1, dtype)
    np.testing.assert_array_equal(left.neuron_hits, stats.neuron_hits[pruned.kept])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_check_counts_what_a_batch_would_have_woken(dtype, kind):
    """Calibrated on the first of the tokens' classes; the batch holds all of them."""
    x, weights, active = designed_layer("uneven", dtype=dtype, kind=kind)
    calibration = np.arange(len(x)) % CLASSES < 4
    hits = active[calibration].sum(axis=0)
    pruned = prune_silent(weights, hits)
    dropped = active[:, hits == 0]
    assert dropped.any()

    for check in (pruned.verify(x), jax.jit(pruned.verify)(x), jax.jit(Pruned.verify)(pruned, x)):
        assert check.missed_activations.dtype == check.affected_tokens.dtype == jnp.int32
        assert check.missed_activations.shape == check.affected_tokens.shape == ()
        assert check == PruneCheck(dropped.sum(), dropped.any(axis=1).sum())
    assert pruned.verify(x[calibration]) == PruneCheck(0, 0)
    assert pruned.verify(x.reshape(4, 2, 3, -1)) == pruned.verify(x)
    assert pruned.verify(x[0]) == PruneCheck(0, 0)
    last = dropped[CLASSES - 1].sum()
    assert pruned.verify(x[CLASSES - 1]) == PruneCheck(last, 1)
    assert pruned.verify(x[:0]) == PruneCheck(0, 0)

    batches = [pruned.verify(half) for half in (x[:10], x[10:])]
    assert jax.tree.map(jnp.add, *batches) == pruned.verify(x)


def test_a_check_that_finds_nothing_means_an_unchanged_token():
    """Token by token: the results differ exactly where a check counts one as affected, or not at all."""
    x, weights, active = designed_layer("uneven")
    hits = active[:5].sum(axis=0)
    pruned = prune_silent(weights, hits)
    whole, left = run(x, weights)[0], run(x, pruned.weights)[0]
    affected = pruned.verify(x).affected_tokens
    assert 0 < affected < len(x)
    for token, before, after in zip(x, whole, left, strict=True):
        differs = not np.allclose(before, after, rtol=0, atol=1e-4)
        assert differs == bool(pruned.verify(token).affected_tokens)


def test_the_gate_of_a_check_is_rounded_as_in_the_layer():
    """A gate that rounds to zero is inactive, and so is no miss."""
    weights = dict.fromkeys(("w_gate", "w_up", "w_down"), jnp.ones((2, 2), jnp.float16))
    weights["w_gate"] = jnp.array([[1, 0], [2.0**-12, 0]], jnp.float16)
    pruned = prune_silent(weights, np.array([1, 0]))
    x = jnp.full((1, 2), 2.0**-14, jnp.float16)
    assert pruned.verify(x) == PruneCheck(0, 0)
    assert pruned.verify(4 * x) == PruneCheck(1, 1)


def test_nan_wakes_every_dropped_neuron():
    x, weights = integer_layer(0, "gated")
    pruned = prune_silent(weights, (np.arange(F) < 10).astype(int))
    assert pruned.verify(x.at[:].set(-1).at[2, 1].set(jnp.nan)[2]) == PruneCheck(F - 10, 1)


@pytest.mark.parametrize(
    ("fired", "multiple", "kept"),
    [
        ([7], 1, [7]),
        ([7], 4, [0, 1, 2, 7]),
        ([0, 1, 2, 7], 4, [0, 1, 2, 7]),
        ([0, 9], 8, [0, 1, 2, 3, 4, 5, 6, 9]),
        (range(17), 8, range(F)),
        (range(3), 7, range(7)),
        (range(22), 7, range(F)),  # 28 are more than there are
        (range(F), 5, range(F)),
        ([5], 128, range(F)),
    ],
    ids=str,
)
def test_silent_neurons_fill_a_multiple(fired, multiple, kept):
    weights = integer_layer(0, "gated")[1]
    hits = np.zeros(F, np.int32)
    hits[list(fired)] = 3
    pruned = prune_silent(weights, hits, multiple=multiple)
    assert pruned.kept.tolist() == list(kept)
    dropped = np.setdiff1d(np.arange(F), kept)
    np.testing.assert_array_equal(pruned.dropped_gate, weights["w_gate"][dropped])
    for name, weight in pruned.weights.items():
        np.testing.assert_array_equal(weight, weights[name][np.asarray(kept)])


def test_a_layer_with_nothing_to_drop_is_checked_too():
    x, weights = integer_layer(0, "non-gated")
    pruned = prune_silent(weights, np.ones(F, np.int32))
    assert pruned.dropped_gate.shape == (0, D)
    assert pruned.verify(x) == PruneCheck(0, 0)


def test_without_a_gate_the_up_projection_decides():
    weights = integer_layer(0, "non-gated")[1]
    pruned = prune_silent(weights, np.arange(F))
    assert list(pruned.weights) == ["w_up", "w_down"]
    np.testing.assert_array_equal(pruned.dropped_gate, weights["w_up"][:1])


def test_pruning_after_reordering_keeps_the_hot_neurons_in_front():
    x, weights = integer_layer(3, "gated")
    y, stats = run(x, weights)
    order = neuron_order(stats.neuron_hits)
    pruned = prune_silent(reorder(weights, order), stats.neuron_hits[order])
    again, left = run(x, pruned.weights)
    np.testing.assert_array_equal(again, y)
    assert (np.diff(left.neuron_hits) <= 0).all()
    assert left.neuron_hits.all()


def test_misses_are_estimated_from_the_neurons_that_fired_once():
    """Good and Turing's estimate against the misses on as much data again, for independent tokens."""
    rng = np.random.default_rng(0)
    rates = np.exp(2 * rng.standard_normal(4000) - 8)
    tokens = 2000
    hits, fresh = rng.binomial(tokens, rates), rng.binomial(tokens, rates)
    weights = dict.fromkeys(("w_up", "w_down"), jnp.ones((4000, 1)))
    pruned = prune_silent(weights, hits, tokens=tokens)
    assert pruned.expected_misses == (hits == 1).sum() / tokens
    np.testing.assert_allclose(pruned.expected_misses, fresh[hits == 0].sum() / tokens, rtol=0.15)
    assert prune_silent(weights, hits).expected_misses is None
