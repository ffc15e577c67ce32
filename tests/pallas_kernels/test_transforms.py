"""What a caller's program may be around the layer: types, transformations and what is differentiated."""

import math
import re
from functools import cache, partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from designed import layer
from lowering import lowered, shapes
from op_checks import call, check_everything, check_gradients, check_values, cotangent, differentiate
from truth import exact, forward, gradients, judge, rounding_to

from pallas_kernels import Auto, FFNOptions, Hybrid, Panel, Threshold, Twell, sparse_ffn, sparse_mlp

FORMATS = {
    "dense": FFNOptions("dense"),
    "twell": FFNOptions(Twell(tile=32, compression=2), backend="interpret"),
    "hybrid": FFNOptions(Hybrid(tile=32, width=64), backend="interpret"),
    "panel": FFNOptions(Panel(tokens=16, capacity=1.0), backend="interpret"),
    "auto": FFNOptions(Auto(tokens=16), backend="interpret"),
}
SPARSE = [name for name in FORMATS if name != "dense"]
ON_GPU = {name: FFNOptions(name, backend="triton") for name in SPARSE}
M, D, F = 32, 24, 64


def small(dtype="float32", pattern="few", tokens=M, gated=True, seed=0):
    inputs, _ = layer(
        pattern, tokens=tokens, d_model=D, d_ff=F, tile=32, slots=8, dtype=dtype, gated=gated, seed=seed
    )
    return inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_where_implicit_promotion_of_types_is_an_error(name, dtype):
    """As `jax_numpy_dtype_promotion` has it, which a caller's program may set for itself."""
    inputs = small(dtype)

    def loss(inputs):
        y, stats = call(inputs, FORMATS[name])
        return jnp.sum(y.astype("float32")) + stats.l1 + stats.l0

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss), inputs)


# -- the L1 gradient ---------------------------------------------------------------------------------------


INTERPRETED = {
    "dense": FORMATS["dense"],
    "twell": FORMATS["twell"],
    "panel": FFNOptions(Panel(tokens=128, capacity=1.0), backend="interpret"),
}
RATIOS = (100, 3_000, 24_000)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", INTERPRETED)
def test_the_l1_gradient_arrives_in_bfloat16(name, ratio):
    check_the_l1_gradient(INTERPRETED[name], ratio, tokens=4096)


@pytest.mark.parametrize("ratio", RATIOS[:2])
def test_the_l1_gradient_arrives_in_bfloat16_at_the_non_zeros(ratio):
    """Interpreted, HybridELL walks tokens one by one: too few of them to average over the largest ratio,
    which a GPU does."""
    check_the_l1_gradient(FORMATS["hybrid"], ratio, tokens=512)


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    "format", [Panel(capacity=1.0), Hybrid(width=64), Twell(compression=1), "dense"], ids=str
)
def test_the_l1_gradient_arrives_in_bfloat16_on_a_gpu(format, ratio):
    check_the_l1_gradient(FFNOptions(format), ratio, tokens=16384)


@cache
def l1_gradient_of_w_up(options, tokens):
    """A layer's inputs, and what a weight dl1 of l1 adds to the gradient of ``sum(dy * y)`` in w_up, as a
    function that is compiled once for all ratios."""
    d_model, d_ff = 16, 64
    rng = np.random.default_rng(0)
    x, w_gate, w_up, w_down = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((tokens, d_model), *[(d_ff, d_model)] * 3)
    )
    dy = jnp.asarray(rng.standard_normal((tokens, d_model)), jnp.bfloat16).astype(jnp.float32)
    master = w_up.astype(jnp.float32)  # whose gradients are not rounded once more

    @jax.jit
    def gradient(w_up, dl1):
        def objective(w_up):
            masters = (w_gate.astype(jnp.float32), w_up, w_down.astype(jnp.float32))
            y, stats = sparse_ffn(x, *masters, options=options)
            return jnp.sum(y.astype(jnp.float32) * dy) + dl1 * stats.l1

        return jax.grad(objective)(w_up)

    inputs = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    inputs = {key: np.asarray(value) for key, value in inputs.items()}
    without = np.asarray(gradient(master, 0.0), np.float64)
    return inputs, lambda dl1: np.asarray(gradient(master, dl1), np.float64) - without


def check_the_l1_gradient(options, ratio, tokens):
    """Where the gradient through y is ``ratio`` times that of l1, 0.9 to 1.1 of the latter reaches w_up:
    rounded alone, or added to what is rounded already, λ / M would be lost."""
    inputs, l1_gradient = l1_gradient_of_w_up(options, tokens)
    first = math.sqrt(inputs["x"].shape[1])  # root mean square of dy Wd^T
    dl1 = first * tokens / ratio
    got = l1_gradient(dl1)
    true = gradients(inputs, np.zeros(inputs["x"].shape), dl1)["w_up"]
    share = np.sum(got * true) / np.sum(true * true)
    assert 0.9 <= share <= 1.1


@pytest.mark.parametrize("name", FORMATS)
def test_the_l1_gradient_in_float16_is_the_true_one_under_a_loss_scale(name):
    """2e-5 / M is no float16 number; 2^16 times it is."""
    inputs = small("float16")
    x, weights = inputs["x"], {key: value for key, value in inputs.items() if key != "x"}
    masters = {key: jnp.asarray(value, jnp.float32) for key, value in weights.items()}
    scale, coefficient = 2.0**16, 2e-5

    def objective(masters):
        return scale * coefficient * sparse_ffn(x, **masters, options=FORMATS[name])[1].l1

    got = jax.jit(jax.grad(objective))(masters)
    true = gradients(inputs, np.zeros(x.shape), coefficient)
    for key, gradient in got.items():
        size = np.abs(true[key]).max()
        np.testing.assert_allclose(np.asarray(gradient) / scale, true[key], rtol=0, atol=4e-3 * size)
    assert np.abs(true["w_up"]).max() > 0


@pytest.mark.parametrize("compression", [1, 8])
def test_a_product_beyond_float16_is_infinite_at_every_capacity(compression):
    """Gates and ups of 300 in six neurons: 90,000 is no float16 number, on kernels as on their backup."""
    inputs = {
        "x": np.ones((M, 1), np.float16),
        "w_gate": np.full((32, 1), -1, np.float16),
        "w_up": np.full((32, 1), 300, np.float16),
        "w_down": np.full((32, 1), 1e-3, np.float16),
    }
    inputs["w_gate"][:6] = 300
    options = FFNOptions(Twell(tile=32, compression=compression), backend="interpret")
    y, stats = jax.jit(partial(call, options=options))(inputs)
    assert np.isposinf(np.asarray(y)).all()
    assert np.isposinf(stats.l1)


# -- types and programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_under_64_bit_types(name):
    inputs = small("bfloat16", "uneven")
    dy = cotangent(inputs)
    step = partial(differentiate, apply=partial(call, options=FORMATS[name]))
    with jax.enable_x64(True):
        (y, stats), grads = jax.device_get(jax.jit(step)(inputs, dy, np.float32(0.375)))
    assert stats.neuron_hits.dtype == stats.max_nnz.dtype == np.int32
    check_values(y, stats, inputs)
    check_gradients(grads, inputs, dy, 0.375)


@pytest.mark.parametrize("name", SPARSE)
def test_lowers_for_a_gpu_under_64_bit_types(name):
    step = partial(differentiate, dl1=1.0, apply=partial(call, options=ON_GPU[name]))
    dy = jax.ShapeDtypeStruct((2048, 256), jnp.float32)
    with jax.enable_x64(True):
        text = lowered(step, shapes(2048, 256, 512), dy)
    assert "xla.gpu.triton" in text


@pytest.mark.parametrize("activation", ["relu2", "drelu", Threshold(0.01)], ids=str)
@pytest.mark.parametrize("format", ["twell", "hybrid", "panel", "decode", "auto"])
def test_every_activation_lowers_for_a_gpu(format, activation):
    """With gradients, on Triton; TwELL and PanelELL on Hopper's gate as well."""
    inputs, dy = shapes(2048, 256, 512), jax.ShapeDtypeStruct((2048, 256), jnp.float32)
    backends = ["triton", "mosaic_gpu"] if format in ("twell", "panel") else ["triton"]
    for backend in backends:
        options = FFNOptions(format, activation, backend)
        step = partial(differentiate, dl1=1.0, apply=partial(call, options=options))
        assert "custom_call" in lowered(step, inputs, dy)


@pytest.mark.parametrize("gated", [True, False])
def test_exports_for_any_number_of_tokens(gated):
    batch, length = jax.export.symbolic_shape("batch, length")
    inputs = small("bfloat16", tokens=12, gated=gated)
    abstract = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in inputs.items()}
    abstract["x"] = jax.ShapeDtypeStruct((batch, length, D), jnp.bfloat16)
    exported = jax.export.export(jax.jit(partial(call, options=FFNOptions())))(abstract)
    y, stats = exported.call(inputs | {"x": inputs["x"].reshape(3, 4, D)})
    check_values(np.asarray(y).reshape(12, D), stats, inputs)


@pytest.mark.parametrize("name", SPARSE)
def test_a_second_derivative_is_one_sentence(name):
    inputs = jax.tree.map(jnp.asarray, small())

    def first(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(call(inputs | {"x": x}, FORMATS[name])[0] ** 2))(x))

    with pytest.raises(NotImplementedError, match="differentiated once, in reverse mode") as raised:
        jax.jit(jax.grad(first)).lower(inputs["x"])
    assert "\n" not in str(raised.value)


def test_the_dense_layer_has_a_second_derivative():
    inputs = jax.tree.map(jnp.asarray, small(tokens=4))

    def first(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(call(inputs | {"x": x}, FORMATS["dense"])[0] ** 2))(x))

    x = inputs["x"]
    direction = jax.random.normal(jax.random.key(0), x.shape).at[:, :8].set(0)
    step = 1e-3
    numerical = (first(x + step * direction) - first(x - step * direction)) / (2 * step)
    found = jnp.sum(jax.grad(first)(x) * direction)
    np.testing.assert_allclose(found, numerical, rtol=2e-2)


def test_lowered_for_a_cpu_the_choice_for_a_gpu_is_dense():
    """What runs is chosen for the platform that a program is lowered for, not for the one that traced it."""
    inputs = shapes(2048, 256, 512)
    text = {
        platform: lowered(partial(call, options=FFNOptions()), inputs, platform=platform)
        for platform in ("cuda", "cpu")
    }
    assert "xla.gpu.triton" in text["cuda"]
    assert "xla.gpu.triton" not in text["cpu"]


# -- vmap --------------------------------------------------------------------------------------------------


def kernels(function, *arguments):
    """How many kernels a program calls, in order of their names."""
    return sorted(re.findall(r"name=(\w+)\n", str(jax.make_jaxpr(function)(*arguments))))


def per_token(options):
    """The layer as it is written for one token, and mapped over them."""

    def mapped(inputs):
        weights = {key: value for key, value in inputs.items() if key != "x"}
        return jax.vmap(lambda token: call({"x": token} | weights, options))(inputs["x"])

    return mapped


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "non-gated"])
def test_a_layer_of_one_token_mapped_over_many(name, gated):
    """The values, and the statistics of each token; the gradients of the mean of all l1."""
    inputs = small("bfloat16", "uneven", gated=gated)
    dy, dl1 = cotangent(inputs), 0.375
    step = jax.jit(partial(differentiate, apply=per_token(FORMATS[name])))
    (y, stats), grads = jax.device_get(step(inputs, dy, np.float32(dl1 / M)))
    true, rounded = (forward(inputs, cast) for cast in (exact, rounding_to("bfloat16")))
    judge("y", y, true["y"], rounded["y"], y.dtype)
    np.testing.assert_array_equal(stats.neuron_hits, true["active"])
    np.testing.assert_array_equal(stats.l0, true["active"].sum(axis=1))
    np.testing.assert_array_equal(stats.max_nnz, true["active"].sum(axis=1))
    of_token = np.abs(rounded["h"]).sum(axis=1)
    np.testing.assert_allclose(stats.l1, of_token, rtol=2e-2, atol=1e-2)
    check_gradients(grads, inputs, dy, dl1)


@pytest.mark.parametrize("name", SPARSE)
def test_a_mapped_layer_runs_the_kernels_of_a_batched_one(name):
    """Once each, over all tokens; `auto` still decides between two branches. Statistics of each token may
    take a kernel that sums them, and are not made by the kernels of few panels."""
    inputs, options = shapes(16384, 256, 512), ON_GPU[name]
    mapped = lowered(lambda inputs: per_token(options)(inputs)[0], inputs)
    batched = lowered(lambda inputs: call(inputs, options)[0], inputs)
    names = [set(re.findall(r'"(twell_\w+|hybrid_\w+|panel_\w+)"', text)) for text in (mapped, batched)]
    counts = [text.count("xla.gpu.triton") for text in (mapped, batched)]
    assert names[0] - {"panel_token_l1"} == names[1]
    assert counts[0] - counts[1] == int("panel_token_l1" in names[0])
    assert ("stablehlo.case" in mapped) == (name == "auto")


@pytest.mark.parametrize("name", FORMATS)
def test_nested_maps(name):
    inputs = small("float32", "uneven", tokens=12)
    weights = {key: value for key, value in inputs.items() if key != "x"}
    one = jax.vmap(jax.vmap(lambda x: call({"x": x} | weights, FORMATS[name])))
    y, stats = jax.jit(one)(inputs["x"].reshape(2, 3, 2, D))
    true = forward(inputs)
    np.testing.assert_allclose(np.asarray(y).reshape(12, D), true["y"], rtol=0, atol=1e-4)
    hits = true["active"].reshape(2, 3, 2, F).sum(axis=2)
    np.testing.assert_array_equal(stats.neuron_hits, hits)
    np.testing.assert_allclose(stats.l0, hits.sum(axis=-1) / 2)
    np.testing.assert_array_equal(stats.max_nnz, true["active"].sum(1).reshape(2, 3, 2).max(2))


# -- what is not differentiated ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_gradient_of_x_alone_takes_none_from_the_gradients_after_it(name):
    """One compiled layer, whose trace JAX keeps: the gradient of everything, that of x alone, and then within
    another transformation that of everything again."""
    inputs = jax.tree.map(jnp.asarray, small())
    compiled = jax.jit(lambda inputs: call(inputs, FORMATS[name])[0])

    def loss(inputs, function=compiled):
        return jnp.sum(function(inputs) ** 2)

    wanted = jax.grad(loss)(inputs)
    of_x = jax.grad(lambda x: loss(inputs | {"x": x}))(inputs["x"])
    again = jax.grad(lambda inputs: loss(inputs, jax.checkpoint(compiled)))(inputs)
    np.testing.assert_allclose(of_x, wanted["x"], rtol=1e-5)
    for key, gradient in wanted.items():
        np.testing.assert_allclose(again[key], gradient, rtol=1e-5, atol=1e-4, err_msg=key)


WEIGHT_KERNELS = re.compile(r"panel_dw\w*|panel_token_lists|hybrid_dw")


@pytest.mark.parametrize("capacity", [0.25, 1.0])
@pytest.mark.parametrize("name", ["panel", "hybrid", "auto"])
def test_frozen_weights_run_no_kernel_for_weight_gradients(name, capacity):
    layout = Panel(capacity=capacity) if name == "panel" else name
    options, inputs = FFNOptions(layout, backend="triton"), shapes(2048, 256, 512)

    def gradient_of_x(inputs):
        weights = {key: value for key, value in inputs.items() if key != "x"}
        return jax.grad(lambda x: jnp.sum(call({"x": x} | weights, options)[0].astype(jnp.float32)))(
            inputs["x"]
        )

    def gradient_of_all(inputs):
        return jax.grad(lambda inputs: jnp.sum(call(inputs, options)[0].astype(jnp.float32)))(inputs)

    assert WEIGHT_KERNELS.search(lowered(gradient_of_all, inputs))
    frozen = lowered(gradient_of_x, inputs)
    assert not WEIGHT_KERNELS.search(frozen)
    assert re.search("panel_dx|hybrid_dx", frozen)


def test_frozen_weights_of_the_dense_layer_multiply_for_x_alone():
    """Two projections, the output, the cotangent of h and two products to x: six, of nine with weights."""
    inputs = jax.tree.map(jnp.asarray, small())

    def products(function, *arguments):
        compiled = jax.jit(function).lower(*arguments).compile().as_text()
        return len(re.findall(r" dot\(|\$matmul|custom_call_target=\"__onednn", compiled))

    def of_x(x, inputs):
        return jax.grad(lambda x: jnp.sum(call(inputs | {"x": x}, FORMATS["dense"])[0] ** 2))(x)

    def of_all(inputs):
        return jax.grad(lambda inputs: jnp.sum(call(inputs, FORMATS["dense"])[0] ** 2))(inputs)

    assert (products(of_x, inputs["x"], inputs), products(of_all, inputs)) == (6, 9)


# -- activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("value", [0.0, 0.01, 0.03, 1.0])
def test_an_accumulator_is_on_the_side_of_the_threshold_that_its_rounding_is_on(value, dtype):
    """`Rule.last_inactive` is the last f32 number whose rounding is at or under the rounded threshold."""
    rule = FFNOptions(activation=Threshold(value)).rule
    last = np.float32(rule.last_inactive(dtype))
    after = np.nextafter(last, np.float32(np.inf))
    # In numpy: XLA takes subnormal numbers for zero on a CPU.
    rounded = np.array([last, after]).astype(jnp.dtype(dtype)).astype(np.float64)
    threshold = float(np.asarray(value, jnp.dtype(dtype)))
    np.testing.assert_array_equal(rounded > threshold, [False, True])


def test_the_threshold_is_rounded_to_the_type_of_x():
    """0.01 in bfloat16 is 0.01001: a gate of exactly that is silent, the next one is not."""
    gate = np.array([0.01, 0.0101], jnp.bfloat16)
    inputs = {
        "x": np.ones((1, 1), jnp.bfloat16),
        "w_up": gate[:, None],
        "w_down": np.ones((2, 1), jnp.bfloat16),
    }
    for name in ("dense", "panel", "twell", "hybrid"):
        options = FFNOptions(FORMATS[name].format, Threshold(0.01), FORMATS[name].backend)
        _, stats = sparse_mlp(**inputs, options=options)
        np.testing.assert_array_equal(stats.neuron_hits, [0, 1], err_msg=name)


def test_statistics_tell_what_ran():
    """`pairs` and `dense_tokens` of each format: 32 tokens in panels of 16, of a designed pattern."""
    inputs = small(pattern="uneven")
    active = forward(inputs)["active"]
    pairs = int(active.reshape(2, 16, F).any(axis=1).sum())
    found = {
        name: jax.device_get(jax.jit(partial(call, options=options))(inputs)[1])
        for name, options in FORMATS.items()
    }
    assert {name: int(stats.pairs) for name, stats in found.items()} == {
        "dense": 0, "twell": 0, "hybrid": 0, "panel": pairs, "auto": 0,
    }  # fmt: skip
    overflowing = int((active.reshape(M, 2, 32).sum(-1) > 15).any(-1).sum())
    assert {name: int(stats.dense_tokens) for name, stats in found.items()} == {
        "dense": M, "twell": overflowing, "hybrid": 0, "panel": 0, "auto": M,
    }  # fmt: skip
    tight = FFNOptions(Panel(tokens=16, capacity=1e-6), backend="interpret")
    dy = cotangent(inputs)
    (y, stats), grads = jax.device_get(
        jax.jit(partial(differentiate, apply=partial(call, options=tight)))(inputs, dy, 0.375)
    )
    assert (stats.pairs, stats.dense_tokens, stats.overflow_rows) == (pairs, M, M)
    check_everything(((y, stats), grads), inputs, dy, active, M)
