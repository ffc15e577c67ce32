"""Reordering changes no result, pruning none on the data it was counted on, and a check finds what it loses.

Where weights and tokens are small integers in f32, every product and every sum is exact in any order: there a
reordered or pruned layer must give the very same bits, and its hits the same counts.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designed import CLASSES, layer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pallas_kernels import FFNOptions, reference, sparse_ffn, sparse_mlp
from pallas_kernels.reorder import PruneCheck, Pruned, inverse_order, neuron_order, prune_silent, reorder

M, D, F = 6, 5, 24
KINDS = ("gated", "non-gated")
DTYPES = ("bfloat16", "float16", "float32")
OPTIONS = {
    "dense": FFNOptions(format="dense"),
    "panel": FFNOptions(format="panel", backend="interpret", panel=16, capacity=1.0),
}
ON_PATHS = [(path, dtype) for path in ("reference", "dense") for dtype in DTYPES] + [("panel", "bfloat16")]

property_test = settings(max_examples=30, deadline=None, derandomize=True)
compiling_test = settings(property_test, max_examples=10)  # a new shape an example
counts = st.lists(st.integers(0, 9), min_size=1, max_size=40)


def run(x, weights, options=None):
    """y and statistics: of the reference, or of the public call where there are options."""
    if options is None:
        return reference.ffn(x, weights.get("w_gate"), weights["w_up"], weights["w_down"])
    call = sparse_ffn if "w_gate" in weights else sparse_mlp
    return call(x, **weights, options=options)


def integer_layer(seed, kind, bias=-4):
    """x and weights of small integers in f32; about half of the neurons stay silent at the default bias."""
    rng = np.random.default_rng(seed)
    names = ("w_gate", "w_up", "w_down") if kind == "gated" else ("w_up", "w_down")
    weights = {name: rng.integers(-2, 3, (F, D)).astype(np.float32) for name in names}
    x = rng.integers(-2, 3, (M, D)).astype(np.float32)
    x[:, 0] = 1
    weights[names[0]][:, 0] = bias + rng.integers(-2, 3, F)
    return jnp.asarray(x), {name: jnp.asarray(weight) for name, weight in weights.items()}


def designed_layer(pattern, *, dtype="float32", kind="gated", tokens=24, d_ff=96):
    inputs, active = layer(
        pattern, tokens=tokens, d_model=24, d_ff=d_ff, tile=32, slots=4, dtype=dtype, gated=kind == "gated"
    )
    weights = {name: jnp.asarray(value) for name, value in inputs.items() if name != "x"}
    return jnp.asarray(inputs["x"]), weights, active


def assert_close(got, want, dtype):
    """Up to the order of the sums: some ulps of the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        got, want, rtol=0, atol=(32 if dtype == "float32" else 2) * ulp * abs(want).max()
    )


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
@given(st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))))
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


# Pruning


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


# Bad input


def good():
    return dict.fromkeys(("w_gate", "w_up", "w_down"), jnp.ones((12, 8)))


def without(name):
    return {key: value for key, value in good().items() if key != name}


BAD_WEIGHTS = {
    "a list": ([jnp.ones((12, 8))], TypeError, r"weights must be a mapping .*; got list: pass \{'w_up': "),
    "an unknown name": (
        good() | {"down_proj": jnp.ones((12, 8))},
        ValueError,
        "weights must be named w_gate, w_up and w_down; got 'down_proj': rename or remove it",
    ),
    "no down projection": (
        without("w_down"),
        ValueError,
        "weights must have w_up and w_down; got w_gate, w_up: add w_down",
    ),
    "nothing": ({}, ValueError, "weights must have w_up and w_down; got none: add w_up"),
    "no array": (
        good() | {"w_up": [1.0]},
        TypeError,
        r"w_up must be an array; got list: convert it with jax\.numpy\.asarray",
    ),
    "no gate by name": (
        good() | {"w_gate": None},
        TypeError,
        "w_gate must be an array; got None: leave w_gate out of a layer without one",
    ),
    "a stack": (
        dict.fromkeys(("w_up", "w_down"), jnp.ones((2, 12, 8))),
        ValueError,
        r"w_up must have shape \(F, D\), .*; got \(2, 12, 8\): pass one layer, or vmap over layers",
    ),
    "another F": (
        good() | {"w_gate": jnp.ones((13, 8))},
        ValueError,
        r"w_gate must have the shape \(F, D\) of w_up, \(12, 8\); got \(13, 8\): pass weights of one layer",
    ),
    "another D": (
        good() | {"w_down": jnp.ones((12, 9))},
        ValueError,
        r"w_down must have the shape .*; got \(12, 9\): pass weights of one layer",
    ),
    "a transposed down matrix": (
        good() | {"w_down": jnp.ones((8, 12))},
        ValueError,
        r"w_down must have .*; got \(8, 12\), which looks like \(D, F\): pass w_down\.T",
    ),
}


@pytest.mark.parametrize("call", [reorder, prune_silent])
@pytest.mark.parametrize("mistake", BAD_WEIGHTS)
def test_bad_weights(mistake, call):
    weights, error, sentence = BAD_WEIGHTS[mistake]
    with pytest.raises(error, match=sentence) as raised:
        call(weights, jnp.arange(12))
    assert_one_sentence(raised.value)


BAD_VECTORS = {
    "a list": (list(range(12)), TypeError, "NAME must be an array; got list: convert it"),
    "a float type": (jnp.arange(12.0), TypeError, "NAME must be integers, one a neuron; got float32: pass "),
    "a mask": (jnp.ones(12, bool), TypeError, "NAME must be integers, one a neuron; got bool: pass "),
    "a layer axis": (
        jnp.ones((2, 12), int),
        ValueError,
        r"NAME must have shape \(F,\).*; got \(2, 12\): pass ",
    ),
    "a scalar": (
        jnp.int32(3),
        ValueError,
        r"NAME must have shape \(F,\).*; got \(\): pass those of one layer",
    ),
}
WITH_VECTORS = {
    "neuron_order": ("hits", neuron_order),
    "inverse_order": ("order", inverse_order),
    "reorder": ("order", lambda order: reorder(good(), order)),
    "prune_silent": ("hits", lambda hits: prune_silent(good(), hits)),
}


@pytest.mark.parametrize("call", WITH_VECTORS)
@pytest.mark.parametrize("mistake", BAD_VECTORS)
def test_bad_hits_and_orders(mistake, call):
    value, error, sentence = BAD_VECTORS[mistake]
    name, function = WITH_VECTORS[call]
    with pytest.raises(error, match=sentence.replace("NAME", name)) as raised:
        function(value)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize("call", ["reorder", "prune_silent"])
def test_hits_and_orders_of_another_layer(call):
    name, function = WITH_VECTORS[call]
    sentence = rf"{name} must have shape \(F,\) = \(12,\), F from the weights; got \(13,\): pass those of one"
    with pytest.raises(ValueError, match=sentence) as raised:
        function(jnp.arange(13))
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [({3: 4}, "3 0 times"), ({0: 12}, "0 0 times"), ({0: -1}, "0 0 times"), ({11: 5, 10: 11}, "5 2 times")],
    ids=["twice", "too large", "negative", "twice and in range"],
)
@pytest.mark.parametrize("call", ["reorder", "inverse_order"])
def test_an_order_that_is_no_permutation(call, change, found):
    order = np.arange(12)
    order[list(change)] = list(change.values())
    sentence = f"order must hold each of 0 to 11 once; got {found}: pass the result of neuron_order"
    with pytest.raises(ValueError, match=sentence) as raised:
        WITH_VECTORS[call][1](order)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    ("hits", "options", "sentence"),
    [
        (
            [0] * 12,
            {},
            "hits must be above 0 for at least one neuron; got none that fired, .*: count them on ",
        ),
        ([0] * 12, {"multiple": 8}, "hits must be above 0 for at least one neuron"),
        (
            [-7] + [1] * 11,
            {},
            "hits must be counts of at least 0; got -7, as when an int32 sum wraps: add up in ",
        ),
        ([1] * 12, {"multiple": 0}, "multiple must be at least 1; got 0"),
        (
            [5] * 12,
            {"tokens": 4},
            "tokens must be at least the hits of every neuron, 5; got 4: pass the number",
        ),
    ],
    ids=["nothing fired", "nothing fired, with a multiple", "negative", "no multiple", "too few tokens"],
)
def test_counts_that_cannot_be(hits, options, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        prune_silent(good(), np.array(hits), **options)
    assert_one_sentence(raised.value)


def test_pruning_inside_jit():
    sentence = "prune_silent must run on the host, .*; got traced hits: call it outside jit"
    with pytest.raises(TypeError, match=sentence) as raised:
        jax.jit(lambda hits: prune_silent(good(), hits).kept)(jnp.arange(12))
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        ([[1.0] * 8], TypeError, "x must be an array; got list: convert it"),
        (
            jnp.ones((3, 9)),
            ValueError,
            r"x must have shape \(\.\.\., D\) with D=8 .*; got \(3, 9\): pass what the",
        ),
        (jnp.float32(1), ValueError, r"x must have shape \(\.\.\., D\) with D=8 .*; got \(\): pass what the"),
        (jnp.ones((3, 8), "bfloat16"), TypeError, "x must be float32 .*; got bfloat16: cast one of them"),
    ],
    ids=["a list", "another D", "a scalar", "another type"],
)
def test_bad_tokens(x, error, sentence):
    with pytest.raises(error, match=sentence) as raised:
        prune_silent(good(), jnp.arange(12)).verify(x)
    assert_one_sentence(raised.value)


def assert_one_sentence(error):
    message = str(error)
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message)
    assert len(message) < 250
