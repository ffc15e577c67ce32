"""Forward calls of few panels, interpreted on a CPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_checks import call, check_counts, check_values, compiled_forward, run
from panel_path import PanelPath
from truth import exact, forward, judge, rounding_to

from pallas_kernels import Auto, FFNOptions, Panel, PanelELL, device, reference
from pallas_kernels.activations import RELU
from pallas_kernels.common.gate_stage import xla_product
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import pallas_triton_counts
from pallas_kernels.panel import pallas_triton_few as kernels
from pallas_kernels.panel.pallas_triton_gate import pack_panel

PATH = PanelPath(
    FFNOptions(format=Panel(tokens=16, capacity=1.0), backend="interpret"),
    d_model=40,
    d_ff=72,
    many_tokens=0,
    dtype="bfloat16",
    tile=32,
    slots=8,
)
OPTIONS = [PATH.options, FFNOptions(format=Auto(tokens=16), backend="interpret")]


@pytest.mark.parametrize("tokens", [1, 37, 160])
@pytest.mark.parametrize("pattern", ["uneven", "fully-dense", "all-zero"])
def test_lists_and_counts(pattern, tokens):
    inputs, active = PATH.layer(pattern, tokens, "bfloat16")
    x, w = jnp.asarray(inputs["x"]), jnp.asarray(inputs["w_gate"])
    panels = pack_panel(
        xla_product(x, w), d_ff=72, panel=16, config=configs.PackConfig(64, 4), interpret=True
    )
    stage = configs.StageConfig(32, 16, 4, 2)
    lists = kernels.list_neurons(panels, d_ff=72, config=configs.FewConfig(stage, stage), interpret=True)
    expected = PanelELL.from_dense(reference.project(x, w), panel=16, chunk=32)
    np.testing.assert_array_equal(lists.counts, expected.counts)
    np.testing.assert_array_equal(lists.hits, active.sum(axis=0))
    by_token = np.pad(active.sum(axis=1), (0, -tokens % 16)).reshape(-1, 16)
    np.testing.assert_array_equal(lists.gates, by_token.sum(axis=1))
    np.testing.assert_array_equal(lists.most, by_token.max(axis=1))
    assert lists.stride == 96
    for panel, (first, last) in enumerate(zip(expected.offsets[:-1], expected.offsets[1:], strict=True)):
        own = slice(panel * lists.stride, panel * lists.stride + int(last - first))
        np.testing.assert_array_equal(lists.neurons[own], expected.neurons[first:last])
        np.testing.assert_array_equal(
            np.asarray(lists.segments[own]) > 0, np.arange(last - first) < expected.counts[panel]
        )


@pytest.mark.parametrize("tokens", [2000, 700])
def test_more_rows_of_hits_and_tiles_of_columns_than_a_program_takes_at_one_time(tokens, monkeypatch):
    monkeypatch.setattr(kernels, "_HIT_ROWS", 16)
    monkeypatch.setattr(pallas_triton_counts, "_TILES", 2)
    rng, n_panels = np.random.default_rng(0), tokens // 16
    hits = rng.integers(0, 17, (n_panels, 100), np.uint8)
    nnz = rng.integers(0, 50, (7, n_panels * 16)).astype(np.int32)
    values = jnp.zeros((n_panels, 128, 16))
    panels = kernels.GatePanel(values, jnp.asarray(hits), jnp.asarray(nnz))
    stage = configs.StageConfig(16, 16, 4, 2)
    lists = kernels.list_neurons(panels, d_ff=97, config=configs.FewConfig(stage, stage), interpret=True)
    np.testing.assert_array_equal(lists.hits, hits[:, :97].sum(axis=0, dtype=np.int32))
    by_token = nnz.sum(axis=0).reshape(-1, 16)
    np.testing.assert_array_equal(lists.gates, by_token.sum(axis=1))
    np.testing.assert_array_equal(lists.most, by_token.max(axis=1))


@pytest.mark.parametrize("cores", [1, 7])
def test_programs_share_tiles_and_the_statistics_are_one_sum(cores, monkeypatch):
    """Fewer programs than tiles, a panel without a neuron, and more parts of l1 than one look takes."""
    rng = np.random.default_rng(0)
    n_panels, d_ff, d_model = 5, 50, 24
    gates = rng.standard_normal((n_panels, 16, d_ff)) * (rng.random((n_panels, 1, d_ff)) < 0.7)
    gates[2] = 0
    x, w_up, w_down = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((n_panels * 16, d_model), (d_ff, d_model), (d_ff, d_model))
    )
    gates = jnp.asarray(np.maximum(gates, 0).reshape(-1, d_ff), jnp.float32)
    panels = pack_panel(gates, d_ff=d_ff, panel=16, config=configs.PackConfig(64, 4), interpret=True)
    stage = configs.StageConfig(16, 16, 4, 2, per_core=2)
    config = configs.FewConfig(stage, stage)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", 90, cores))
    monkeypatch.setattr(kernels, "_PARTS", 8)
    lists = kernels.list_neurons(panels, d_ff=d_ff, config=config, interpret=True)
    h, parts = kernels.few_up(panels, lists, x, w_up, config=config, interpret=True)
    y, stats = kernels.few_down(h, parts, lists, w_down, tokens=79, config=config, interpret=True)
    with jax.default_matmul_precision("highest"):
        expected, mask = reference.hidden(gates, x @ w_up.T, RELU)
        np.testing.assert_allclose(y, (expected @ w_down)[:79], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.l1, np.abs(expected).sum() / 79, rtol=1e-5)
    np.testing.assert_allclose(stats.l0, mask.sum() / 79, rtol=1e-6)
    assert int(stats.pairs) == int(mask.reshape(n_panels, 16, d_ff).any(axis=1).sum())
    assert (int(stats.overflow_rows), int(stats.dense_tokens)) == (0, 0)


@pytest.mark.parametrize(
    ("pattern", "tokens", "dtype", "kind"),
    [("uneven", 37, "bfloat16", "gated"), ("few", 16, "float32", "non-gated")],
)
def test_values_and_statistics(pattern, tokens, dtype, kind):
    """Also of a token that is NaN, and of tokens that do not fill their panel."""
    inputs, active = PATH.layer(pattern, tokens, dtype, kind=kind)
    for nan in (False, True):
        if nan:
            inputs["x"][3, -1] = np.nan
            active[3] = True
        y, stats = run(compiled_forward(PATH.options), inputs)
        check_values(y, stats, inputs)
        check_counts(stats, active, 0)
        assert int(stats.dense_tokens) == 0
        panels = np.pad(active, ((0, -tokens % 16), (0, 0))).reshape(-1, 16, PATH.d_ff)
        assert int(stats.pairs) == panels.any(axis=1).sum()


@pytest.mark.parametrize(
    ("activation", "kind"), [("relu2", "gated"), ("relu2", "non-gated"), ("drelu", "gated")]
)
def test_activations(activation, kind):
    inputs, _ = PATH.layer("uneven", 37, "float32", kind=kind)
    options = dataclasses.replace(PATH.options, activation=activation)
    y, stats = run(compiled_forward(options), inputs)
    true, rounded = (forward(inputs, cast, activation) for cast in (exact, rounding_to("float32")))
    judge("y", y, true["y"], rounded["y"], y.dtype)
    judge("l1", stats.l1, true["l1"], rounded["l1"], y.dtype)
    check_counts(stats, true["active"], 0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_calls_of_more_panels(options, monkeypatch):
    """Lists that all panels share."""
    monkeypatch.setattr(configs, "FEW_PANELS", 1)
    for pattern in ("few", "fully-dense"):
        inputs, active = PATH.layer(pattern, 43, "bfloat16")
        y, stats = run(jax.jit(partial(call, options=options)), inputs)
        check_values(y, stats, inputs)
        check_counts(stats, active, 0)


def test_the_laws_of_a_config():
    up = configs.StageConfig(32, 64, 4, 2)
    with pytest.raises(ValueError, match=r"FewConfig.down.tile_k must divide up.tile=32; got 64"):
        configs.FewConfig(up, configs.StageConfig(64, 64, 4, 2))
    with pytest.raises(ValueError, match=r"FewConfig.list_warps must be a power of two from 1 to 32; got 3"):
        configs.FewConfig(up, up, list_warps=3)


@pytest.mark.parametrize("d_model", [2048, 1000, 24])
@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_chosen_fits(kind, dtype, d_model):
    found = device._describe("gpu", kind, None, 132)
    itemsize = jnp.dtype(dtype).itemsize
    for tokens in (1, 128, 300, 512, 1024, 2048, 4096, 8192):
        x = jax.ShapeDtypeStruct((tokens, d_model), dtype)
        config = configs.heuristic(x, 128, found)
        cut = configs.choose_few(x, config, found)
        assert cut.up.misfit(config.panel, itemsize, found) is None, tokens
        # Half of the slices that wait for a look into the lists are in flight.
        assert cut.down.shared_memory(config.panel, itemsize) / 2 <= found.shared_memory, tokens


def test_few_panels():
    assert configs.are_few(64 * 128, 128)
    assert not configs.are_few(64 * 128 + 1, 128)
    assert not configs.are_few(0, 128)
