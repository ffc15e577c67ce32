"""The TwELL kernels lowered for CUDA with no GPU at hand, through an abstract H200.

What a device would refuse at lowering shows here: types, odd sizes, transformations, arrays
past 2^31 elements.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from lowering import lowered, pairs, shapes
from op_checks import DTYPES, LAYERS, call, differentiate

from pallas_kernels import FFNOptions, Twell
from pallas_kernels.bench.shapes import SHAPES, TOKENS

KERNELS = {"gated": ("twell_up_down",), "non-gated": ("twell_down",)}
GATES = ("twell_pack", "twell_gate_pack")
"""Behind XLA's product, and Triton's own where that would be too large."""
OPTIONS = FFNOptions(format="twell", backend="triton")


def assert_kernels(text, kind="gated"):
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 2
    assert sum(name in text for name in GATES) == 1
    for name in KERNELS[kind]:
        assert name in text


@pytest.mark.parametrize(
    ("sizes", "dtype", "kind"), pairs([(1, 40, 200), (7, 129, 65), (16385, 1000, 5633)], DTYPES), ids=str
)
def test_types_and_odd_sizes(sizes, dtype, kind):
    """With the gradients, whose backward is the dense layer's: the tests below have the call alone."""
    dy = jax.ShapeDtypeStruct(sizes[:2], jnp.float32)
    step = partial(differentiate, dl1=1.0, apply=partial(call, options=OPTIONS))
    assert_kernels(lowered(step, shapes(*sizes, dtype, kind), dy), kind)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("geometry", [(32, 4), (64, 1), (128, 8), (256, 1), (256, 16)], ids=str)
def test_tiles(geometry, kind):
    tile, compression = geometry
    options = FFNOptions(format=Twell(tile=tile, compression=compression), backend="triton")
    assert_kernels(lowered(partial(call, options=options), shapes(100, 64, 600, "bfloat16", kind)), kind)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_published_models(name, tokens):
    shape = SHAPES[name]
    kind = "gated" if shape.gated else "non-gated"
    text = lowered(partial(call, options=OPTIONS), shapes(tokens, shape.d_model, shape.d_ff, kind=kind))
    assert_kernels(text, kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # 16 and 32 bits: their words differ
@pytest.mark.parametrize(
    "sizes",
    [(7, 512, 65536), (2**20, 4096, 65536), (2**20, 4096, 1024), (2**20, 64, 65536)],
    ids=["most-neurons", "all-arrays", "x", "words"],
)
def test_the_largest_sizes(sizes, dtype):
    """F up to the 16-bit limit and M of 2^20: x or the packed words pass 2^31 elements."""
    assert_kernels(lowered(partial(call, options=OPTIONS), shapes(*sizes, dtype)))


@pytest.mark.parametrize("kind", LAYERS)
def test_no_dense_intermediate(kind):
    """Where the product packs its own output, the forward holds no (M, F) array."""
    options = dataclasses.replace(OPTIONS, backend="mosaic_gpu")
    text = lowered(partial(call, options=options), shapes(65536, 2048, 5632, kind=kind))
    assert not re.search(r"tensor<65536x(5632|5888)x", text)
    assert "tensor<65536x2048xbf16>" in text
    dense = FFNOptions(format="dense")
    assert re.search(r"tensor<65536x5632x", lowered(partial(call, options=dense), shapes(65536, 2048, 5632)))


def test_no_dense_intermediate_of_a_large_call():
    text = lowered(partial(call, options=OPTIONS), shapes(2**19, 2048, 5632))
    assert not re.search(r"tensor<524288x(5632|5888)x", text)
    assert "twell_gate_pack" in text


def batched(inputs, names):
    return {
        name: jax.ShapeDtypeStruct((3, *value.shape), value.dtype) if name in names else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("names", [("x",), ("x", "w_gate", "w_up", "w_down")], ids=["x", "all"])
def test_vmap(names):
    inputs = batched(shapes(7, 40, 200), names)
    axes = {name: 0 if name in names else None for name in inputs}
    assert_kernels(lowered(jax.vmap(partial(call, options=OPTIONS), in_axes=(axes,)), inputs))


def test_scan():
    inputs = batched(shapes(7, 40, 200), ("w_gate", "w_up", "w_down"))
    x = inputs.pop("x")

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: call({"x": x} | w, OPTIONS), x, weights)

    assert_kernels(lowered(layers, x, inputs))


def test_remat():
    apply = jax.checkpoint(partial(call, options=OPTIONS))
    step = partial(differentiate, dl1=1.0, apply=apply)
    text = lowered(step, shapes(7, 40, 200), jax.ShapeDtypeStruct((7, 40), jnp.float32))
    assert "twell_pack" in text


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Over four H200s: each lowers the kernels for its quarter of the tokens."""

    def local(inputs):
        y, stats = call(inputs, OPTIONS)
        return y, stats.all_reduce("data")

    inputs = shapes(4 * 1027, 40, 200)
    specs = {name: P("data") if name == "x" else P() for name in inputs}
    mapped = jax.shard_map(local, in_specs=(specs,), out_specs=(P("data"), P()), check_vma=check_vma)
    step = partial(differentiate, dl1=1.0, apply=mapped)
    dy = jax.ShapeDtypeStruct(inputs["x"].shape, jnp.float32)
    text = lowered(step, inputs, dy, mesh_shape=(4,), mesh_axes=("data",))
    assert_kernels(text)
    assert re.search(r"tensor<1027x(\d+)xui32>", text)


def test_leading_shapes_and_empty_batches():
    inputs = shapes(7, 40, 200)
    nested = inputs | {"x": jax.ShapeDtypeStruct((2, 3, 40), "bfloat16")}
    assert_kernels(lowered(partial(call, options=OPTIONS), nested))
    empty = inputs | {"x": jax.ShapeDtypeStruct((0, 40), "bfloat16")}
    assert "triton" not in lowered(partial(call, options=OPTIONS), empty)


def test_backend_auto_falls_to_triton():
    options = FFNOptions(format="twell")
    assert_kernels(lowered(partial(call, options=options), shapes(7, 40, 200)))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gate_on_mosaic(dtype, tile, kind):
    """Hopper's own gate; Triton's up and down projections follow it."""
    options = FFNOptions(format=Twell(tile=tile), backend="mosaic_gpu")
    text = lowered(partial(call, options=options), shapes(1031, 2048, 5640, dtype, kind))
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
    assert KERNELS[kind][0] in text


def test_words_of_a_call_are_a_fraction_of_the_dense_gate():
    """At C = 8 the packed buffer is F / 2 bytes a token, a quarter of the bf16 gate."""
    text = lowered(partial(call, options=OPTIONS), shapes(65536, 2048, 5632))
    words = re.search(r"tensor<65536x(\d+)xui32>", text)
    assert int(words.group(1)) == np.ceil(5632 / 256) * 32
