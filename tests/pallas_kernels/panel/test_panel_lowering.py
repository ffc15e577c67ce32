"""The PanelELL kernels and ``format="auto"`` lowered for CUDA with no GPU at hand,
through an abstract H200."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from lowering import lowered, pairs, panel_launches, shapes
from op_checks import DTYPES, LAYERS, call, differentiate

from pallas_kernels import FFNOptions, Panel
from pallas_kernels.bench.shapes import SHAPES
from pallas_kernels.panel import layer

OPTIONS = FFNOptions(format="panel", backend="triton")
FORWARD = ("panel_pack", "panel_lists", "panel_up", "panel_down")
BACKWARD = ("panel_dh", "panel_dx", "panel_dw_hot", "panel_token_lists", "panel_dw_rare")
GATHERED = ("panel_up", "panel_dh")
"""Which of them are on Mosaic GPU behind its gate, in gated layers."""
SUMMED = ("panel_down", "panel_dx", "panel_dw_hot")
"""Which of them are there in all layers."""


def assert_kernels(text, names, *, gate="triton", gated=False):
    """That a call launches kernels of such names, each on the backend that is its own."""
    expected = set(names)
    on_mosaic = expected & {*SUMMED, *(GATHERED if gated else ())} if gate == "mosaic_gpu" else set()
    triton, mosaic = map(set, panel_launches(text))
    assert mosaic == on_mosaic | ({"panel_gate"} if gate == "mosaic_gpu" else set())
    assert expected - on_mosaic <= triton
    assert not triton & on_mosaic


def step(options):
    return partial(differentiate, dl1=1.0, apply=partial(call, options=options))


@pytest.mark.parametrize(
    ("sizes", "dtype", "kind"), pairs([(1, 40, 200), (130, 129, 65), (16385, 1000, 5633)], DTYPES), ids=str
)
def test_types_and_odd_sizes(sizes, dtype, kind):
    inputs, dy = shapes(*sizes, dtype, kind), jax.ShapeDtypeStruct(sizes[:2], jnp.float32)
    assert_kernels(lowered(step(OPTIONS), inputs, dy), FORWARD + BACKWARD)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", ["triton", "mosaic_gpu"])
def test_shapes_of_published_models(name, backend):
    shape = SHAPES[name]
    inputs = shapes(65536, shape.d_model, shape.d_ff, kind="gated" if shape.gated else "non-gated")
    text = lowered(partial(call, options=FFNOptions(format="panel", backend=backend)), inputs)
    assert_kernels(text, FORWARD[1:], gate=backend, gated=shape.gated)


def test_the_largest_sizes():
    """M of 2^20: x, the values and the slots pass 2^31 elements."""
    text = lowered(partial(call, options=OPTIONS), shapes(2**20, 4096, 14336))
    assert_kernels(text, ("panel_gate", *FORWARD[1:]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("tokens", "format", "launches"),
    [
        (512, "panel", ["panel_down", "panel_lists", "panel_up"]),
        (1024, "auto", ["panel_down", "panel_lists", "panel_up"]),
        (8192, "auto", ["panel_down", "panel_lists", "panel_up"]),
        (1023, "auto", []),
        (8193, "panel", ["panel_count", "panel_down", "panel_lists", "panel_up"]),
    ],
)
def test_a_forward_call_of_few_panels_is_few_launches(tokens, format, launches, kind):
    """Each kernel once behind Hopper's gate; ``auto`` is no decision there."""
    text = lowered(partial(call, options=FFNOptions(format=format)), shapes(tokens, 2048, 5632, kind=kind))
    found, on_mosaic = panel_launches(text)
    many = tokens == 8193
    gathered = ["panel_up"] * (many and kind == "gated") + ["panel_down"] * many
    assert sorted(found) == [name for name in launches if name not in gathered]
    assert on_mosaic == (["panel_gate", *gathered] if launches else [])
    # The platform's, whose outcome XLA knows, are the only ones.
    assert text.count("stablehlo.case") == (2 if format == "auto" and launches else 0)


@pytest.mark.parametrize("kind", LAYERS)
def test_auto_holds_both_layers_and_never_asks_the_host(kind):
    options, inputs = FFNOptions(), shapes(16384, 2048, 5632, kind=kind)
    text = lowered(step(options), inputs, jax.ShapeDtypeStruct((16384, 2048), jnp.float32))
    assert_kernels(text, FORWARD[1:] + BACKWARD, gate="mosaic_gpu", gated=kind == "gated")
    assert "stablehlo.case" in text
    assert not re.search(r"callback|infeed|outfeed|send|recv", text)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("triton", "gated"), ("triton", "non-gated"), ("mosaic_gpu", "gated"), ("mosaic_gpu", "non-gated")],
)
def test_what_cuda_graphs_cannot_hold_is_in_no_branch_of_panel(backend, kind):
    """A loop, or a write to a place that XLA knows, which becomes an asynchronous copy: beside either, XLA
    asks the host which branch to take."""
    dy = jax.ShapeDtypeStruct((16384, 2048), jnp.float32)
    options = FFNOptions(format="panel", backend=backend)
    text = lowered(step(options), shapes(16384, 2048, 5632, kind=kind), dy)
    assert_kernels(text, FORWARD[1:] + BACKWARD, gate=backend, gated=kind == "gated")
    assert text.count('"stablehlo.case"') == 2
    assert "stablehlo.while" not in text
    known = set(re.findall(r"(%\w+) = stablehlo.constant", text))
    places = re.findall(r"stablehlo.dynamic_update_slice %[\w#]+, %[\w#]+, (%[\w#]+)", text)
    assert len(places) == 4 * 3  # four blocks of y, of each token's l1, and of dx
    assert not known.intersection(places)


@pytest.mark.parametrize(  # every pair of values once
    ("check_vma", "weights", "kind"),
    [
        (True, "bfloat16", "gated"),
        (True, "float32", "non-gated"),
        (False, "bfloat16", "non-gated"),
        (False, "float32", "gated"),
    ],
)
@pytest.mark.parametrize("options", [OPTIONS, FFNOptions(), FFNOptions(backend="triton")], ids=str)
def test_shard_map(options, check_vma, weights, kind):
    """Over four H200s, each with a quarter of the tokens; weight gradients add up in the weights' type."""

    def local(inputs):
        y, stats = call(inputs, options)
        return y, stats.all_reduce("data")

    inputs = shapes(4 * 2048, 256, 520, kind=kind)
    inputs |= {n: jax.ShapeDtypeStruct(s.shape, weights) for n, s in inputs.items() if n != "x"}
    specs = {name: P("data") if name == "x" else P() for name in inputs}
    mapped = jax.shard_map(local, in_specs=(specs,), out_specs=(P("data"), P()), check_vma=check_vma)
    dy = jax.ShapeDtypeStruct(inputs["x"].shape, jnp.float32)
    apply = partial(differentiate, dl1=1.0, apply=mapped)
    text = lowered(apply, inputs, dy, mesh_shape=(4,), mesh_axes=("data",))
    gate = options.backend if options.backend == "triton" else "mosaic_gpu"
    assert_kernels(text, FORWARD[1:] + BACKWARD, gate=gate, gated=kind == "gated")
    summed = re.findall(r"\}\) : \(tensor<520x256x(\w+)>\) -> tensor<520x256x", text)
    assert summed == [{"bfloat16": "bf16", "float32": "f32"}[weights]] * (len(inputs) - 1)


@pytest.mark.parametrize(("kind", "most"), [("gated", 6000), ("non-gated", 3200)])
def test_bytes_kept_for_each_token(kind, most):
    """At the default capacity, beside the call's own arguments; the dense layer keeps 3 F values, 33.8 KB."""
    tokens = 16384
    inputs = shapes(tokens, 2048, 5632, kind=kind)
    arguments = (inputs["x"], inputs.get("w_gate"), inputs["w_up"], inputs["w_down"])
    kept = jax.eval_shape(lambda *a: layer.forward(*a, OPTIONS, "triton")[1], *arguments)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert size / tokens <= most


def test_remat_keeps_the_residuals_by_name():
    """With a policy by name a rematerialised layer keeps its lists' values,
    and without one only its arguments."""
    options, inputs = FFNOptions(format=Panel(capacity=1.0), backend="interpret"), shapes(1024, 256, 512)

    def kept(policy):
        apply = jax.checkpoint(lambda inputs: call(inputs, options)[0], policy=policy)
        leaves = jax.eval_shape(lambda inputs: jax.tree.leaves(jax.vjp(apply, inputs)[1]), inputs)
        return [leaf.shape for leaf in leaves if leaf.shape == (8 * 512, 128)]

    names = ("sparse_ffn_lists", "sparse_ffn_gate", "sparse_ffn_up")
    assert len(kept(jax.checkpoint_policies.save_only_these_names(*names))) == 2
    assert not kept(jax.checkpoint_policies.nothing_saveable)


def test_no_dense_intermediate_in_the_gradient():
    """Beside the branch for calls that do not fit, nothing of shape (M, F) exists."""
    options = FFNOptions(format=Panel(capacity=1.0), backend="mosaic_gpu")
    text = lowered(step(options), shapes(16384, 2048, 5632), jax.ShapeDtypeStruct((16384, 2048), jnp.float32))
    assert not re.search(r"tensor<16384x(5632|5888)x", text)
    assert_kernels(text, FORWARD[1:] + BACKWARD, gate="mosaic_gpu", gated=True)
