"""An order is a stable permutation by activity, and a layer in any order gives the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_layers import (
    KINDS,
    ON_PATHS,
    OPTIONS,
    F,
    assert_close,
    designed_layer,
    integer_layer,
    property_test,
    run,
)

from pallas_kernels.neurons import inverse_order, neuron_order, prune_silent, reorder

counts = st.lists(st.integers(0, 9), min_size=1, max_size=40)


# Orders


@property_test
@given(counts)
@example([5] * 9)
@example([0])
def test_an_order_is_the_stable_permutation_by_falling_activity(hits):
    order = neuron_order(jnp.asarray(hits, jnp.int32))
    assert order.dtype == jnp.int32
    assert order.tolist() == sorted(range(len(hits)), key=lambda neuron: (-hits[neuron], neuron))
    assert order.tolist() == neuron_order(np.asarray(hits)).tolist()


@property_test
@given(st.sampled_from([1, 2, 7, 32, 40]).flatmap(lambda n: st.permutations(range(n))))
def test_an_inverse_order_undoes_the_order(permutation):
    order = jnp.asarray(permutation, jnp.int32)
    inverse = inverse_order(order)
    assert inverse.dtype == jnp.int32
    assert order[inverse].tolist() == inverse[order].tolist() == list(range(len(permutation)))
    assert inverse_order(inverse).tolist() == permutation


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32", "int64", "uint64"])
def test_counts_of_every_integer_type(dtype):
    """Also at the end of the type's range, where a negated count would wrap."""
    hits = np.array([3, 0, np.iinfo(dtype).max, 3], dtype)
    assert neuron_order(hits).tolist() == [2, 0, 3, 1]
    if hits.itemsize < 8:
        assert neuron_order(jnp.asarray(hits)).tolist() == [2, 0, 3, 1]


def test_counts_beyond_32_bits_are_not_cut_off():
    hits = np.array([1, 2**32, 0], np.int64)
    assert neuron_order(hits).tolist() == [1, 0, 2]
    weights = integer_layer(0, "gated")[1]
    hits = np.zeros(F, np.int64)
    hits[3] = 2**32
    assert prune_silent(weights, hits).kept.tolist() == [3]


# Reordering


@pytest.mark.parametrize("kind", KINDS)
@property_test
@given(seed=st.integers(0, 2**32 - 1), permutation=st.permutations(range(F)))
def test_any_order_gives_the_same_bits_where_sums_are_exact(kind, seed, permutation):
    x, weights = integer_layer(seed, kind, bias=0)
    order = jnp.asarray(permutation, jnp.int32)
    y, stats = run(x, weights)
    again, permuted = run(x, reorder(weights, order))
    np.testing.assert_array_equal(again, y)
    assert permuted.l1 == stats.l1
    assert permuted.l0 == stats.l0
    assert permuted.max_nnz == stats.max_nnz
    np.testing.assert_array_equal(permuted.neuron_hits, stats.neuron_hits[order])
    np.testing.assert_array_equal(permuted.neuron_hits[inverse_order(order)], stats.neuron_hits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("path", "dtype"), ON_PATHS)
@pytest.mark.parametrize("pattern", ["one-row-hot", "uneven"])
def test_a_reordered_layer_gives_the_same_result_on_every_path(path, pattern, dtype, kind):
    x, weights, active = designed_layer(pattern, dtype=dtype, kind=kind)
    options = OPTIONS.get(path)
    y, stats = run(x, weights, options)
    order = neuron_order(stats.neuron_hits)
    reordered = reorder(weights, order)
    again, permuted = run(x, reordered, options)
    assert_close(again, y, dtype)
    assert_close(permuted.l1, stats.l1, dtype)
    assert permuted.l0 == stats.l0
    np.testing.assert_array_equal(permuted.neuron_hits, -np.sort(-active.sum(axis=0)))
    assert {name: w.dtype for name, w in reordered.items()} == {name: w.dtype for name, w in weights.items()}


def test_the_hot_neurons_share_tiles():
    """The purpose: fewer (panel, tile) pairs hold anything."""
    rng = np.random.default_rng(0)
    active = rng.random((64, 256)) < np.where(rng.random(256) < 0.1, 0.5, 0)[None]
    order = neuron_order(active.sum(axis=0))

    def tiles(mask):
        return mask.reshape(64, 8, 32).any(axis=(0, 2)).sum()

    assert tiles(active) >= 7
    assert tiles(active[:, order]) == 1


def test_reordering_is_traceable_and_differentiable():
    x, weights = integer_layer(1, "gated", bias=0)
    hits = run(x, weights)[1].neuron_hits

    @jax.jit
    def loss(weights):
        return jnp.sum(run(x, reorder(weights, neuron_order(hits)))[0])

    got, want = jax.grad(loss)(weights), jax.grad(lambda w: jnp.sum(run(x, w)[0]))(weights)
    assert jax.tree.map(lambda a, b: bool((a == b).all()), got, want) == dict.fromkeys(weights, True)


def test_a_stack_of_layers_is_reordered_by_vmap():
    layers = [integer_layer(seed, "gated", bias=0) for seed in range(3)]
    hits = jnp.stack([run(x, weights)[1].neuron_hits for x, weights in layers])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[weights for _, weights in layers])
    orders = jax.vmap(neuron_order)(hits)
    got = jax.vmap(reorder)(stacked, orders)
    for index, (_, weights) in enumerate(layers):
        for name, want in reorder(weights, orders[index]).items():
            np.testing.assert_array_equal(got[name][index], want)
    assert jax.vmap(inverse_order)(orders).shape == orders.shape


def test_a_traced_order_out_of_range_is_not_silent():
    weights = integer_layer(0, "gated")[1]
    got = jax.jit(reorder)(weights, jnp.arange(F, dtype=jnp.int32).at[2].set(F))
    assert np.isnan(got["w_up"][2]).all()
    assert np.isfinite(np.delete(got["w_up"], 2, axis=0)).all()
