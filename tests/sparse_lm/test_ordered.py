"""The norm before an order and the sum behind it: as plain expressions give them, with their gradients."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from lowering import lowered

from pallas_kernels.common import varying_axes
from sparse_lm.layers import rms_norm, scaled
from sparse_lm.order import by_key
from sparse_lm.ordered import add_scattered, gathered_norm, nearest_to_norm

EPS, FACTOR = 1e-3, 0.3


def order_of(*shape):
    return by_key(jax.random.permutation(jax.random.key(9), int(np.prod(shape))).reshape(shape))


def inputs(shape, dtype="float32"):
    """x, y, a scale and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, y, given = (jax.random.normal(key, shape).astype(dtype) for key in keys[:3])
    return x, y, 1 + 0.3 * jax.random.normal(keys[3], shape[-1:]), given


def half_block(x, y, scale, order, backend="auto"):
    """A norm in an order, what stands for a layer (a product, token by token), and the sum."""
    x, entering = gathered_norm(x, scale, order, eps=EPS, dtype=y.dtype, backend=backend)
    return add_scattered(x, entering * order.gather(y), order, factor=FACTOR, backend=backend)


def plain(x, y, scale):
    return x + scaled(rms_norm(x, scale, eps=EPS, dtype=y.dtype) * y, FACTOR)


def with_gradients(function, x, y, scale, given):
    """What a function of x, y and the scale gives, and its gradients from a cotangent."""
    output, pull = jax.vjp(function, x, y, scale)
    return output, *pull(given)


BOUNDS = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


def check(shape, dtype, backend):
    """The kernels' values and gradients against those of plain expressions in f32."""
    arguments = inputs(shape, dtype)
    step = jax.jit(partial(with_gradients, partial(half_block, order=order_of(*shape[:-1]), backend=backend)))
    got = step(*arguments)
    want = with_gradients(plain, *(value.astype("float32") for value in arguments))
    for actual, wanted in zip(got, want, strict=True):
        bound = BOUNDS[dtype] * float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(actual.astype("float32"), wanted, rtol=0, atol=bound)
    assert [value.dtype for value in got] == [value.dtype for value in (arguments[0], *arguments[:3])]
    for one, other in zip(got, step(*arguments), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((37, 24), "float32"), ((2, 16, 32), "bfloat16"), ((1, 1, 8), "float16")], ids=str
)
def test_values_and_gradients_of_the_kernels(shape, dtype):
    check(shape, dtype, "interpret")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(3, 1000, 2048), (1027, 1000)], ids=str)
def test_on_a_gpu(shape, dtype):
    check(shape, dtype, "triton")


def split_over_devices(mesh, order, backend, **options):
    """`half_block` in ``shard_map``: each device has that order of its own tokens."""

    def local(x, y, scale):
        rows = varying_axes.vary_with(x, order)
        return half_block(x, y, scale, rows, backend)

    specs = (PartitionSpec("data"), PartitionSpec("data"), PartitionSpec())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), **options)


def test_each_device_has_an_order_of_its_own_tokens():
    arguments = inputs((4, 10, 16))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    # Interpreted kernels do not pass the check of varying axes.
    mapped = split_over_devices(mesh, order_of(1, 10), "interpret", check_vma=False)
    got = jax.jit(partial(with_gradients, mapped))(*arguments)
    for actual, wanted in zip(got, with_gradients(plain, *arguments), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(wanted))))


def test_lowered_inside_shard_map_with_its_check():
    def step(*arguments):
        return with_gradients(split_over_devices(None, order_of(1, 10), "auto"), *arguments)

    text = lowered(step, *inputs((4, 10, 16)), mesh_shape=(4,), mesh_axes=("data",))
    assert "norm_rows_backward" in text


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(5, 2048), (2, 3, 1000)], ids=str)
def test_lowered_for_cuda(shape, dtype):
    step = partial(with_gradients, partial(half_block, order=order_of(*shape[:-1])))
    text = lowered(step, *inputs(shape, dtype))
    for name in ("norm_rows", "norm_rows_backward", "add_rows", "take_rows"):
        assert f'"{name}"' in text or f'name = "{name}' in text, name
    assert "norm_rows" not in lowered(step, *inputs(shape, dtype), platform="cpu")


def test_what_no_kernel_takes_is_left_to_xla():
    order = order_of(3)
    for shape, dtype in (((3, 20_000), "bfloat16"), ((3, 8), "float8_e4m3fn")):
        x = jnp.ones(shape, dtype)
        text = lowered(lambda x: add_scattered(x, x, order), x)
        assert "add_rows" not in text


def test_other_tokens_are_refused():
    x, y, scale, _ = inputs((4, 16))
    with pytest.raises(ValueError, match="make the order from the same tokens"):
        gathered_norm(x, scale, order_of(5), eps=EPS, dtype=x.dtype)
    with pytest.raises(ValueError, match=r"one shape; got \(1, 16\) and \(4, 16\)"):
        add_scattered(x[:1], y, order_of(4))


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "sentence"),
    [
        ("cuda", "float32", 16, "backend must be one of auto, triton, interpret, xla; got 'cuda'"),
        ("triton", "float32", 16, "backend='triton' needs an NVIDIA GPU"),
        (
            "interpret",
            "float8_e4m3fn",
            16,
            r"floating types of 16 or 32 bits, .*; got float8_e4m3fn \(4, 16\)",
        ),
        ("interpret", "float32", 5, r"scale must have the width of x, shape \(16,\); got \(5,\)"),
    ],
)
def test_what_cannot_run_is_refused(backend, dtype, width, sentence):
    """A kernel would read beyond a scale that is too short, and say nothing."""
    x, scale = jnp.ones((4, 16), dtype), jnp.ones(width)
    with pytest.raises(ValueError, match=sentence):
        gathered_norm(x, scale, order_of(4), eps=EPS, dtype="float32", backend=backend)
    with pytest.raises(ValueError, match=sentence):
        nearest_to_norm(x, scale, jnp.ones((3, 16)), eps=EPS, dtype="float32", backend=backend)
    if width == 16:
        with pytest.raises(ValueError, match=sentence):
            add_scattered(x, x, order_of(4), backend=backend)


def test_centroids_of_another_width_are_refused():
    with pytest.raises(
        ValueError, match=r"centroids must have the width of x, shape \(3, 16\); got \(3, 15\)"
    ):
        nearest_to_norm(jnp.ones((4, 16)), jnp.ones(16), jnp.ones((3, 15)), eps=EPS, dtype="float32")


def test_export_for_any_number_of_tokens():
    """Their number is a symbol, which no size is compared with where no kernel runs anyway."""

    def half(ids, x):
        order = by_key(ids)
        x, entering = gathered_norm(x, jnp.ones(8), order, eps=EPS, dtype=x.dtype)
        return add_scattered(x, entering, order)

    (rows,) = jax.export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, 2), "int32"), jax.ShapeDtypeStruct((rows, 2, 8), "float32")
    ids, x = jnp.asarray([[5, 3], [1, 3], [0, 9]]), inputs((3, 2, 8))[0]
    np.testing.assert_array_equal(
        jax.export.export(jax.jit(half))(*shapes).call(ids, x), jax.jit(half)(ids, x)
    )


def test_no_tokens():
    x, order = jnp.ones((0, 16)), order_of(0)
    for backend in ("auto", "interpret"):
        _, entering = gathered_norm(x, jnp.ones(16), order, eps=EPS, dtype=x.dtype, backend=backend)
        assert add_scattered(x, entering, order, backend=backend).shape == (0, 16)


def check_nearest(backend, tokens=150, d_model=80, count=7):
    """Against distances in f64: as near as the nearest one, up to rounding."""
    x = jax.random.normal(jax.random.key(0), (tokens, d_model)).astype("bfloat16").at[:, 3].mul(3)
    scale = 1 + 0.3 * jax.random.normal(jax.random.key(1), (d_model,))
    centroids = 0.3 * jax.random.normal(jax.random.key(2), (count, d_model))
    norm = partial(rms_norm, scale=scale, eps=EPS, dtype=jnp.float32)
    find = partial(nearest_to_norm, eps=EPS, dtype=x.dtype, backend=backend)
    found = jax.jit(find)(x.reshape(2, tokens // 2, d_model), scale, centroids)
    assert found.shape == (2, tokens // 2)
    assert found.dtype == jnp.int32
    rows = np.asarray(norm(x), np.float64)
    distances = np.sum((rows[:, None] - np.asarray(centroids, np.float64)) ** 2, axis=-1)
    chosen = np.take_along_axis(distances, np.asarray(found).reshape(-1, 1), axis=1)[:, 0]
    assert (chosen <= distances.min(axis=1) + 0.01 * distances.mean()).all()
    assert np.mean(np.asarray(found).reshape(-1) == distances.argmin(axis=1)) > 0.95
    assert len(np.unique(found)) == count


def test_the_centroid_nearest_to_a_norm():
    check_nearest("interpret")
    check_nearest("xla")


@pytest.mark.gpu
def test_the_centroid_nearest_to_a_norm_on_a_gpu():
    check_nearest("triton", 2000, 1000, 64)
    check_nearest("triton", 2000, 2048, 200)


@pytest.mark.parametrize("count", [1, 64, 256, 257])
def test_nearest_lowered_for_cuda(count):
    x = jnp.ones((3, 100, 64), "bfloat16")
    text = lowered(
        partial(nearest_to_norm, eps=EPS, dtype=x.dtype), x, jnp.ones(64), jnp.ones((count, 64), "float32")
    )
    assert ("nearest_rows" in text) == (count <= 256)
