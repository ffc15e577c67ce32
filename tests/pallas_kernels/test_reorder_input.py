"""Each mistake in what is to be reordered, pruned or checked is one sentence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.neurons import inverse_order, neuron_order, prune_silent, reorder


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
