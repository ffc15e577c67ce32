"""The executable specification against float64 numpy, its gradients against differences
of function values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import exact, forward, gradients, judge, rounding_to

from pallas_kernels import reference
from pallas_kernels.activations import RELU

M, D, F = 5, 7, 11
KINDS = ("gated", "non-gated")
DTYPES = ("bfloat16", "float16", "float32")


def draw(kind, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    names = ("w_gate", "w_up", "w_down") if kind == "gated" else ("w_up", "w_down")
    inputs = {"x": rng.standard_normal((M, D))} | {name: rng.standard_normal((F, D)) for name in names}
    return {name: value.astype(jnp.dtype(dtype)) for name, value in inputs.items()}


def ffn(inputs):
    return reference.ffn(inputs["x"], inputs.get("w_gate"), inputs["w_up"], inputs["w_down"])


jitted = jax.jit(ffn)


@jax.jit
def differentiated(inputs, dy, dl1):
    x, weights = inputs["x"], (inputs.get("w_gate"), inputs["w_up"], inputs["w_down"])
    projections = reference.projections(x, *weights[:2])
    scale = jnp.reshape(dl1 / M, (1,)).astype(jnp.float32)
    found = reference.backward(x, *weights, *projections, dy.astype(x.dtype), scale, dtype=x.dtype)
    return {
        name: g for name, g in zip(("x", "w_gate", "w_up", "w_down"), found, strict=True) if g is not None
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_values(seed, dtype, kind):
    inputs = draw(kind, dtype, seed)
    y, stats = jitted(inputs)
    true, rounded = forward(inputs), forward(inputs, rounding_to(inputs["x"].dtype))
    judge("y", y, true["y"], rounded["y"], inputs["x"].dtype)
    judge("l1", stats.l1, true["l1"], rounded["l1"], inputs["x"].dtype)
    np.testing.assert_allclose(stats.l0, true["active"].sum() / M, rtol=1e-6)
    np.testing.assert_array_equal(stats.neuron_hits, true["active"].sum(axis=0))
    assert stats.max_nnz == true["active"].sum(axis=1).max()
    assert stats.overflow_rows == 0
    assert (y.dtype, stats.l1.dtype, stats.neuron_hits.dtype) == (inputs["x"].dtype, jnp.float32, jnp.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("through", [(1.0, 0.0), (0.0, 0.5), (1.0, 0.5)], ids=["y", "l1", "both"])
def test_gradients(through, dtype, kind):
    inputs = draw(kind, dtype)
    dy = through[0] * np.ones((M, D), np.float32)
    got = differentiated(inputs, dy, through[1])
    true = gradients(inputs, dy, through[1], exact)
    rounded = gradients(inputs, dy, through[1], rounding_to(inputs["x"].dtype))
    for name in inputs:
        judge(name, got[name], true[name], rounded[name], inputs["x"].dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", [(1.0, 0.0), (0.0, 0.5)], ids=["y", "l1"])
def test_the_truths_gradients_are_differences_of_its_values(through, kind):
    """Central differences in float64, a relation that no formula for a gradient can fake."""
    inputs = {name: value.astype(np.float64) for name, value in draw(kind).items()}
    dy = through[0] * np.random.default_rng(3).standard_normal((M, D))
    analytic = gradients(inputs, dy, through[1])

    def objective(inputs):
        layer = forward(inputs)
        return (layer["y"] * dy).sum() + through[1] * layer["l1"]

    for name, value in inputs.items():
        numerical = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = 1e-6
            above, below = (objective(inputs | {name: value + sign * step}) for sign in (1, -1))
            numerical[index] = (above - below) / 2e-6
        np.testing.assert_allclose(analytic[name], numerical, atol=1e-7, err_msg=name)


# -- active, inactive, NaN, infinity -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_active(dtype):
    gate = jnp.array([-jnp.inf, -1, -0.0, 0.0, 1e-3, jnp.inf, jnp.nan], dtype)
    np.testing.assert_array_equal(RELU.active(gate), [False, False, False, False, True, True, True])


def one_neuron(gate, up, down=1.0, dtype="float32"):
    """y, statistics of a layer with one token, x = (1, 1), one neuron, and the given projections."""
    half = partial(jnp.full, (1, 2), dtype=dtype)
    return reference.ffn(half(1), half(gate / 2), half(up / 2), half(down))


def test_an_inactive_neuron_contributes_nothing():
    """Also where its up projection overflows to infinity: relu(g) * u would be NaN there."""
    for gate in (-1.0, 0.0, -0.0):
        y, stats = one_neuron(gate, 65504 * 2, dtype="float16")
        assert not np.asarray(y).any()
        assert stats.l1 == stats.l0 == stats.max_nnz == 0


def test_an_active_neuron_with_an_infinite_product_is_infinite():
    y, stats = one_neuron(2.0, 60000, dtype="float16")
    assert np.isposinf(np.asarray(y, np.float32)).all()
    assert np.isposinf(stats.l1)


def test_nan_is_active_and_reaches_the_output():
    inputs = draw("gated") | {"x": np.ones((2, D), np.float32)}
    inputs["x"][1, 2] = np.nan
    y, stats = jitted(inputs)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[0]).all()
    assert np.isnan(stats.l1)
    assert stats.max_nnz == F
    np.testing.assert_array_equal(stats.neuron_hits, forward(inputs)["active"].sum(axis=0))


def test_the_gate_is_rounded_before_its_sign_is_read():
    """A gate that rounds to zero is inactive, however positive its exact sum."""
    x = jnp.array([[2.0**-14, 2.0**-14]], jnp.float16)
    gate = jnp.array([[2.0**-12, 0]], jnp.float16)  # 2^-26, under half of float16's least subnormal
    ones = jnp.ones((1, 2), jnp.float16)
    _, stats = reference.ffn(x, gate, ones, ones)
    assert stats.l0 == 0
    _, stats = reference.ffn(x * 4, gate, ones, ones)
    assert stats.l0 == 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    inputs = draw(kind)
    inputs["x"] = inputs["x"][:0]
    y, stats = jitted(inputs)
    assert y.shape == (0, D)
    assert stats.l1 == stats.l0 == stats.max_nnz == 0
    assert not stats.neuron_hits.any()
