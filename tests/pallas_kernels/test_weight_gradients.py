"""What the weights' gradients are rounded to, in every format: `FFNOptions.weight_gradients`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_checks import DL1, call, compiled, cotangent, run
from truth import gradients

from pallas_kernels import Auto, FFNOptions, Hybrid, Panel, Twell

TOKENS, D, F = 128, 32, 48
OPTIONS = {
    "dense": FFNOptions(format="dense"),
    "twell": FFNOptions(Twell(tile=32, compression=8, backup_rows=5), backend="interpret"),
    "hybrid": FFNOptions(Hybrid(tile=32, width=16, backup_rows=5), backend="interpret"),
    "panel": FFNOptions(Panel(tokens=16, capacity=1.0), backend="interpret"),
    "panel without room": FFNOptions(Panel(tokens=16, capacity=1e-6), backend="interpret"),
    "auto": FFNOptions(Auto(tokens=16), backend="interpret"),
}


def layer(kind, dtype="bfloat16"):
    """Arguments of a layer that activates some of its neurons; f32 weights that are no values of x's type."""
    rng = np.random.default_rng(0)
    names = ("w_gate", "w_up", "w_down") if kind == "gated" else ("w_up", "w_down")
    x = np.abs(rng.standard_normal((TOKENS, D))).astype(dtype)
    inputs = {"x": x} | {name: rng.standard_normal((F, D)).astype(np.float32) / 6 for name in names}
    inputs[names[0]] -= 0.03  # x is positive: most gates are not
    return inputs


def differentiated(inputs, dy, name, weight_gradients):
    """The gradients of every input in a format."""
    options = dataclasses.replace(OPTIONS[name], weight_gradients=weight_gradients)
    return run(compiled(options), inputs, dy, DL1)[1]


def true_gradients(inputs, dy):
    """In float64, of the layer that is computed: with weights as they round to x's type."""
    return gradients({name: value.astype(inputs["x"].dtype) for name, value in inputs.items()}, dy, DL1)


def error(got, true):
    return np.linalg.norm(got.astype(np.float64) - true) / np.linalg.norm(true)


def weights_of(inputs):
    return [name for name in inputs if name != "x"]


# Of the other kind the contract has them, in every format, beside sums that nothing rounds.
@pytest.mark.parametrize(("name", "kind"), [(name, "gated") for name in OPTIONS] + [("dense", "non-gated")])
def test_unrounded_gradients_are_closer_to_the_truth(name, kind):
    """Than the same rounded once more, to x's type."""
    inputs = layer(kind)
    dy, dtype = cotangent(inputs), inputs["x"].dtype
    true, eps = true_gradients(inputs, dy), float(jnp.finfo(dtype).eps)
    unrounded = differentiated(inputs, dy, name, "auto")
    for weight in weights_of(inputs):
        assert unrounded[weight].dtype == np.float32
        rounded = unrounded[weight].astype(dtype)
        assert error(unrounded[weight], true[weight]) < 0.97 * error(rounded, true[weight])
        assert error(unrounded[weight], true[weight]) < eps
    assert unrounded["x"].dtype == dtype
    assert error(unrounded["x"], true["x"]) < eps


# The public call rounds before it turns to a format: the dense one shows it, and the quickest of the others.
@pytest.mark.parametrize(("name", "kind"), [("dense", "gated"), ("dense", "non-gated"), ("twell", "gated")])
def test_rounded_gradients_are_those_of_weights_that_the_caller_has_cast(name, kind):
    """Bit for bit, and further from the truth than unrounded ones."""
    inputs = layer(kind)
    dy, dtype = cotangent(inputs), inputs["x"].dtype
    true = true_gradients(inputs, dy)
    unrounded, rounded = (differentiated(inputs, dy, name, choice) for choice in ("auto", "input"))
    narrow = {name: value.astype(dtype) for name, value in inputs.items()}
    outside = differentiated(narrow, dy, name, "auto")
    for weight in weights_of(inputs):
        assert (rounded[weight].dtype, outside[weight].dtype) == (np.float32, dtype)
        np.testing.assert_array_equal(rounded[weight], outside[weight].astype(np.float32))
        assert error(unrounded[weight], true[weight]) < 0.97 * error(rounded[weight], true[weight])
    assert rounded["x"].dtype == dtype


def test_asking_for_float32_changes_no_bit():
    for dtype in ("bfloat16", "float32"):
        inputs = layer("gated", dtype)
        dy = cotangent(inputs)
        usual, asked = (differentiated(inputs, dy, "dense", choice) for choice in ("auto", "float32"))
        for weight in inputs:
            assert asked[weight].tobytes() == usual[weight].tobytes()


@pytest.mark.parametrize("name", ["dense", "twell", "panel"])
def test_micro_batches_add_up_in_float32(name):
    """Gradients of eight micro-batches, added as they come: rounding each of them costs accuracy."""
    inputs = layer("gated")
    dy = cotangent(inputs)
    weights = {n: inputs[n] for n in weights_of(inputs)}
    micro_batches = inputs["x"].reshape(8, -1, D), dy.reshape(8, -1, D)

    def accumulated(weight_gradients):
        options = dataclasses.replace(OPTIONS[name], weight_gradients=weight_gradients)

        def objective(weights, x, dy):
            y, stats = call({"x": x} | weights, options)
            return jnp.sum(y.astype(jnp.float32) * dy) + DL1 / 8 * stats.l1

        def add(total, micro):
            return jax.tree.map(jnp.add, total, jax.grad(objective)(weights, *micro)), None

        start = jax.tree.map(jnp.zeros_like, weights)
        return jax.jit(lambda batches: jax.lax.scan(add, start, batches)[0])(micro_batches)

    true = true_gradients(inputs, dy)
    unrounded, rounded = jax.device_get((accumulated("auto"), accumulated("input")))
    for weight in weights:
        assert unrounded[weight].dtype == rounded[weight].dtype == np.float32
        assert error(unrounded[weight], true[weight]) < 0.97 * error(rounded[weight], true[weight])
