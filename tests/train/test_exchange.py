"""What crosses devices in a step is what `train.exchange` says, and the step is that of one device."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from jax.sharding import AxisType

from pallas_kernels import FFNOptions
from pallas_kernels.bench.collectives import bytes_by_kind
from pallas_kernels.options import Dense, Panel
from sparse_lm import LayerPlan
from train import parallel
from train.config import ParallelConfig
from train.parallel import AXIS, Layout
from train.state import Program, build_program, is_matrix

DEVICES = 4
EMBEDDING = tiny_runs.MODEL.vocab_size * tiny_runs.MODEL.d_model
TOKENS = np.random.default_rng(0).integers(0, 257, (8, 17)).astype(np.int32)
LAYOUTS = {
    "data-parallel": ParallelConfig(),
    "zero1": ParallelConfig(shard="zero1"),
    "fsdp": ParallelConfig(shard="fsdp"),
    "pmap": ParallelConfig(mode="pmap"),
}


def program_of(accumulation: int, dtype: str, z_loss: float = 0.0, **model_fields: Any) -> Program:
    config = tiny_runs.tiny_config("none", "none")
    sparse = dataclasses.replace(config.model.sparsity, revive="off")  # which counts dead neurons of its own
    model = dataclasses.replace(config.model, dtype=dtype, sparsity=sparse, **model_fields)
    optimizer = dataclasses.replace(config.optimizer, accumulation=accumulation, z_loss=z_loss)
    return build_program(dataclasses.replace(config, model=model, optimizer=optimizer))


def compiled(layout: Layout, program: Program) -> jax.stages.Compiled:
    return layout.compiled_step(program, layout.place(TOKENS))


def parameters(program: Program) -> tuple[int, int]:
    """How many in matrices, and how many in norms."""
    leaves = jax.tree_util.tree_leaves_with_path(program.abstract_state().params)
    matrices = sum(leaf.size for path, leaf in leaves if is_matrix(path))
    return matrices, sum(leaf.size for _, leaf in leaves) - matrices


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", LAYOUTS)
def test_matrices_cross_once_a_step_or_once_a_micro_batch_under_fsdp(mode, accumulation):
    program = program_of(accumulation, "bfloat16")
    found = bytes_by_kind(compiled(Layout.over_all_devices(LAYOUTS[mode]), program).as_text())
    matrices, norms = parameters(program)
    scalars = 256  # terms, the gradient's norm, statistics that are one number a layer
    hits = found.pop("all-reduce s32")
    assert 4 * 2 * 64 <= hits <= 4 * 2 * 64 + scalars
    small = found.pop("all-reduce f32")
    if mode == "fsdp":
        # The compiler may gather the embedding, which is outside the layers, once for all micro-batches.
        gathered = found.pop("all-gather u16") // 2
        assert gathered in {accumulation * matrices, accumulation * matrices - (accumulation - 1) * EMBEDDING}
        expected = {"reduce-scatter f32": accumulation * 4 * matrices // DEVICES}
    elif mode == "zero1":
        expected = {"reduce-scatter f32": 4 * matrices // DEVICES, "all-gather f32": 4 * matrices}
    else:
        small -= 4 * matrices
        expected = {}
    assert 4 * norms <= small <= 4 * norms + scalars
    assert found == expected


@pytest.mark.parametrize("mode", LAYOUTS)
def test_sums_in_16_bits(mode, alone):
    """All matrices cross in bfloat16, and nothing else does; what an element of a sum loses is at most its
    rounding and that of its terms."""
    layout = Layout.over_all_devices(dataclasses.replace(LAYOUTS[mode], reduce_dtype="bfloat16"))
    program = uneven()
    with layout.step_scope():
        step: Any = layout.compile_step(program)
        text = step.lower(program.abstract_state(), layout.place(TOKENS)).as_text()
    sent = re.findall(r"\}\) : \(tensor<([\dx]+)xbf16>\) -> tensor", text)
    layers = program.abstract_state().params["blocks"]
    in_layers = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(layers) if is_matrix(path)
    )
    once = parameters(program)[0] - in_layers // 2  # the two layers are one loop
    assert sum(math.prod(map(int, shape.split("x"))) for shape in sent) == once
    (_, found), (_, expected) = one_step(layout, program), alone
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)  # of before the step
    assert abs(found["grad_norm"] / expected["grad_norm"] - 1) < 2**-8
    assert found["grad_norm"] != expected["grad_norm"]


@pytest.mark.parametrize("mode", LAYOUTS)
def test_a_step_of_several_devices_has_compiler_options_of_its_own(mode, monkeypatch):
    """XLA refuses an option that it does not know, on every device: so it is seen that it gets them."""
    monkeypatch.setattr(parallel, "_SEVERAL_DEVICES", {"xla_gpu_no_such_option": 1})
    program = program_of(1, "float32")
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        compiled(Layout.over_all_devices(LAYOUTS[mode]), program)
    compiled(Layout.over_first_devices(LAYOUTS[mode], 1), program)


def test_fsdp_gathers_a_layers_weights_again_where_remat_computes_it_again():
    program = program_of(1, "bfloat16", remat="full")
    found = bytes_by_kind(compiled(Layout.over_all_devices(LAYOUTS["fsdp"]), program).as_text())
    matrices, _ = parameters(program)
    assert found["all-gather u16"] == 2 * (matrices + matrices - EMBEDDING)


@pytest.fixture(scope="module")
def alone():
    mesh = jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return one_step(Layout(ParallelConfig(), mesh), uneven())


def uneven(**model_fields: Any) -> Program:
    """A model with a head of its own, biases and a z-loss. Four devices divide its F alone, so that its
    feed-forward matrices are cut and all others whole."""
    return program_of(
        1, "float32", z_loss=0.01, d_model=30, num_heads=3, tied_embeddings=False, qkv_bias=True,
        **model_fields,
    )  # fmt: skip


def one_step(layout: Layout, program: Program):
    state, metrics = compiled(layout, program)(layout.compile_init(program)(), layout.place(TOKENS))
    return tiny_runs.snapshot(state), jax.device_get(metrics)


@pytest.mark.parametrize("mode", LAYOUTS)
def test_a_step_whose_gradients_cross_layer_by_layer_is_that_of_one_device(mode, alone):
    program = uneven(remat="full" if mode == "fsdp" else "none")
    found = one_step(Layout.over_all_devices(LAYOUTS[mode]), program)
    # Sums over devices in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, alone)


@pytest.mark.parametrize(
    ("mode", "layer_loop"), [("zero1", "scan"), ("fsdp", "unrolled"), ("pmap", "unrolled")]
)
def test_layers_of_formats_of_their_own_are_those_of_one_device_too(mode, layer_loop, alone):
    program = uneven(layer_loop=layer_loop, ffn=FFNOptions(backend="interpret"))
    plan = LayerPlan((Dense(16), Panel(16, 1.0)))
    state, metrics = one_step(Layout.over_all_devices(LAYOUTS[mode]), program.with_plan(plan))
    assert metrics["dense_tokens_per_layer"].tolist() == [128, 0]
    assert metrics["overflow_rows"] == 0
    assert metrics["pairs_per_layer"].min() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), state, alone[0])


@pytest.mark.parametrize("mode", LAYOUTS)
@pytest.mark.parametrize("layer_loop", ["unrolled", "scan"])
def test_a_layers_gradients_are_awaited_behind_the_backward_of_the_layer_before_it(mode, layer_loop):
    """Of three layers in a line two have another one before them; nothing holds back those of a loop."""
    layout = Layout.over_all_devices(LAYOUTS[mode])
    program = program_of(1, "float32", num_layers=3, layer_loop=layer_loop)
    with layout.step_scope():
        step: Any = layout.compile_step(program)
        text = step.lower(program.abstract_state(), layout.place(TOKENS)).as_text()
    awaited = [operands.split(", ") for operands in re.findall(r"optimization_barrier (.*) : ", text)]
    assert len(awaited) == (2 if layer_loop == "unrolled" else 0)
    matrices, norms = 7, 2  # of a layer
    for operands in awaited:
        assert len(operands) >= 1 + matrices + norms
