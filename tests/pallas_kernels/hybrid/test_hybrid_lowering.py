"""The HybridELL kernels lowered for CUDA with no GPU at hand, through an abstract H200.

What a device would refuse at lowering shows here: types, odd sizes, transformations, arrays past 2^31
elements; and what is kept between forward and backward.
"""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from lowering import lowered, on_h200, pairs, shapes
from op_checks import DTYPES, LAYERS, differentiate
from op_checks import call as call_with

from pallas_kernels import FFNOptions, Hybrid
from pallas_kernels.bench.shapes import SHAPES, TOKENS
from pallas_kernels.hybrid.layer import forward

FORWARD = {"gated": ("_pack", "hybrid_up_down"), "non-gated": ("_pack", "hybrid_down")}
BACKWARD = ("hybrid_dx", "hybrid_dw")
OPTIONS = FFNOptions(format="hybrid", backend="triton")


def call(inputs, options=OPTIONS):
    return call_with(inputs, options)


def arguments(inputs):
    return inputs["x"], inputs.get("w_gate"), inputs["w_up"], inputs["w_down"]


def step(inputs, apply=call):
    """Outputs and gradients of a call."""
    return differentiate(inputs, jnp.ones(inputs["x"].shape, jnp.float32), 1.0, apply)


def assert_kernels(text, kind="gated", backward=False):
    names = FORWARD[kind] + BACKWARD * backward
    assert text.count("custom_call @__gpu$xla.gpu.triton") == len(names)
    for name in names:
        assert name in text
    assert "callback" not in text


@pytest.mark.parametrize(
    ("sizes", "dtype", "kind"), pairs([(1, 40, 200), (7, 129, 65), (16385, 1000, 5633)], DTYPES), ids=str
)
def test_types_and_odd_sizes(sizes, dtype, kind):
    assert_kernels(lowered(step, shapes(*sizes, dtype, kind)), kind, backward=True)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_gradient(dtype, kind):
    """The same kernels as in a step, but for what they keep."""
    assert_kernels(lowered(call, shapes(7, 129, 65, dtype, kind)), kind)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("width", [1, 30, 128, 500])
def test_widths(width, kind):
    apply = partial(call, options=dataclasses.replace(OPTIONS, format=Hybrid(width=width)))
    assert_kernels(lowered(partial(step, apply=apply), shapes(100, 64, 600, kind=kind)), kind, backward=True)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_published_models(name, tokens):
    shape = SHAPES[name]
    kind = "gated" if shape.gated else "non-gated"
    inputs = shapes(tokens, shape.d_model, shape.d_ff, kind=kind)
    assert_kernels(lowered(step, inputs), kind, backward=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # 16 and 32 bits: their words differ
@pytest.mark.parametrize(
    "sizes",
    [(7, 512, 65536), (2**20, 4096, 65536), (2**20, 64, 65536)],
    ids=["most-16-bit-neurons", "all-arrays", "words"],
)
def test_the_largest_sizes(sizes, dtype):
    """M of 2^20: x or the packed words pass 2^31 elements."""
    assert_kernels(lowered(step, shapes(*sizes, dtype)), backward=True)


def test_more_neurons_than_16_bits_name():
    """The gate runs in two pieces, and indices take 32 bits."""
    text = lowered(step, shapes(7, 64, 70000))
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 5
    assert "tensor<7x128xi32>" in text


def test_slots_past_31_bits_are_refused():
    with pytest.raises(ValueError, match="narrow the rows"):
        lowered(
            partial(
                step, apply=partial(call, options=dataclasses.replace(OPTIONS, format=Hybrid(width=2048)))
            ),
            shapes(2**20, 16, 4096),
        )


# -- memory ------------------------------------------------------------------------------------------------


def residuals(inputs, options=OPTIONS):
    """Shapes of what a call keeps for its backward, beside its own arguments."""
    keep = partial(forward, options=options, backend="triton")
    _, kept = on_h200(lambda: jax.eval_shape(keep, *arguments(inputs)))
    return jax.tree.leaves(kept)


@pytest.mark.parametrize(("kind", "words"), [("gated", 3), ("non-gated", 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 128])
def test_bytes_kept_of_a_token(width, dtype, kind, words):
    """An index and one or two values for each of W entries, and a count: 772 bytes at W 128 in bf16."""
    tokens = 65536
    kept = residuals(
        shapes(tokens, 2048, 5632, dtype, kind), dataclasses.replace(OPTIONS, format=Hybrid(width=width))
    )
    expected = (2 + (words - 1) * jnp.dtype(dtype).itemsize) * width + 4
    assert sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept) == expected * tokens
    if (width, dtype) == (128, "bfloat16"):
        assert expected <= 1.2 * 1024
    assert {leaf.shape for leaf in kept} == {(tokens, width), (tokens,)}


@pytest.mark.parametrize("kind", LAYERS)
def test_no_dense_array_passes_from_forward_to_backward(kind):
    """By JAX's own account of what a gradient saves: the arguments and the triples."""
    tokens, d_ff = 4096, 5632
    inputs = shapes(tokens, 2048, d_ff, kind=kind)

    def saved():
        _, pull_back = jax.vjp(call, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), inputs))
        return jax.tree.leaves(pull_back)

    leaves = on_h200(lambda: jax.eval_shape(saved))
    sizes = sorted(math.prod(leaf.shape) for leaf in leaves)
    assert sizes.count(tokens * 128) == (3 if kind == "gated" else 2)
    assert not [leaf.shape for leaf in leaves if tokens in leaf.shape and leaf.shape[-1] >= d_ff]
    assert sum(sizes) <= sum(math.prod(s.shape) for s in inputs.values()) + tokens * (3 * 128 + 1) + 8


@pytest.mark.parametrize("kind", LAYERS)
def test_no_dense_intermediate(kind):
    """Neither pass of a large call holds an (M, F) array: the gate never leaves its kernel unpacked, nor do
    gradients."""
    tokens, d_ff = 2**19, 5632
    text = lowered(step, shapes(tokens, 2048, d_ff, kind=kind))
    assert not re.search(rf"tensor<{tokens}x{d_ff}x|tensor<{d_ff}x{tokens}x", text)
    assert f"tensor<{tokens}x2048xbf16>" in text


def test_names_for_rematerialisation_policies():
    """A policy saves the triples by name; without one, they are named again in the recomputation only."""
    names = {"sparse_ffn_indices", "sparse_ffn_gate", "sparse_ffn_up", "sparse_ffn_nnz"}
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    for saved, expected in ((policy, names), (None, set())):
        apply = jax.checkpoint(call, policy=saved)
        jaxpr = on_h200(jax.make_jaxpr(partial(step, apply=apply)), shapes(7, 40, 200))
        assert {e.params["name"] for e in jaxpr.eqns if e.primitive.name == "name"} == expected


# -- transformations ---------------------------------------------------------------------------------------


def batched(inputs, names):
    return {
        name: jax.ShapeDtypeStruct((3, *value.shape), value.dtype) if name in names else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("names", [("x",), ("x", "w_gate", "w_up", "w_down")], ids=["x", "all"])
def test_vmap(names):
    inputs = batched(shapes(7, 40, 200), names)
    axes = {name: 0 if name in names else None for name in inputs}
    assert_kernels(lowered(jax.vmap(step, in_axes=(axes,)), inputs), backward=True)


def test_scan():
    inputs = batched(shapes(7, 40, 200), ("w_gate", "w_up", "w_down"))

    def layers(inputs):
        weights = {name: value for name, value in inputs.items() if name != "x"}
        return jax.lax.scan(lambda x, w: call({"x": x} | w), inputs["x"], weights)

    assert_kernels(lowered(partial(step, apply=layers), inputs), backward=True)


def test_remat():
    text = lowered(partial(step, apply=jax.checkpoint(call)), shapes(7, 40, 200))
    assert all(name in text for name in FORWARD["gated"] + BACKWARD)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, kind):
    """Over four H200s: each lowers the kernels for its quarter of the tokens; weight gradients are summed."""

    def local(inputs):
        y, stats = call(inputs)
        return y, stats.all_reduce("data")

    inputs = shapes(4 * 1027, 40, 200, kind=kind)
    specs = {name: P("data") if name == "x" else P() for name in inputs}
    mapped = jax.shard_map(local, in_specs=(specs,), out_specs=(P("data"), P()), check_vma=check_vma)
    text = lowered(partial(step, apply=mapped), inputs, mesh_shape=(4,), mesh_axes=("data",))
    assert_kernels(text, kind, backward=True)
    assert "tensor<1027x128x" in text


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batches(kind):
    assert "triton" not in lowered(step, shapes(0, 40, 200, kind=kind))
