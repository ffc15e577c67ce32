"""Which gate stage a call takes, and that all that a CPU can run give the same gates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common import gate_stage
from pallas_kernels.device import Device
from pallas_kernels.panel.config import PackConfig, StageConfig
from pallas_kernels.panel.pallas_triton_gate import gate_panel, pack_panel
from pallas_kernels.twell.config import GatePackConfig, WordPackConfig
from pallas_kernels.twell.pallas_triton_gate import gate_pack, pack_words

AMPERE, HOPPER, BLACKWELL = (
    Device("gpu", f"NVIDIA {name}", capability, 100)
    for name, capability in (("A100", 80), ("H100", 90), ("B200", 100))
)


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "expected"),
    [
        ("mosaic_gpu", "bfloat16", HOPPER, "mosaic_gpu"),
        ("triton", "bfloat16", HOPPER, "xla"),
        ("triton", "float16", BLACKWELL, "xla"),
        ("triton", "bfloat16", AMPERE, "triton"),
        ("triton", "float32", AMPERE, "xla"),
        ("interpret", "bfloat16", Device("cpu", "cpu", 0, 0), "xla"),
    ],
)
def test_the_stage_of_a_call(backend, dtype, device, expected):
    x, w = (jax.ShapeDtypeStruct((n, 64), dtype) for n in (1 << 16, 5632))
    assert gate_stage.implementation(backend, x, w, device) == expected


def test_a_large_product_stays_in_the_kernel():
    """M F of 2^31 is 4 GiB in bf16."""
    w = jax.ShapeDtypeStruct((1 << 13, 64), "bfloat16")
    xs = (jax.ShapeDtypeStruct((tokens, 64), "bfloat16") for tokens in (1 << 18, (1 << 18) + 1))
    assert [gate_stage.implementation("triton", x, w, HOPPER) for x in xs] == ["xla", "triton"]


def whole_numbers(tokens, d_model, d_ff, dtype):
    """Arguments whose gates every order of summation gives exactly; one neuron of token 3 is NaN."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-2, 3, (n, d_model)).astype(np.float32) for n in (tokens, d_ff))
    x[:, 0], w[:, 0] = 1, -8  # most gates are inactive
    x[3, 1] = np.inf  # times the zeros of padding it is NaN too: no column past F may show
    w[:, 1] = np.where(np.arange(d_ff) == 7, 0, -1)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def packed_from_product(pack, x, w, **sizes):
    return pack(gate_stage.xla_product(x, w), d_ff=len(w), interpret=True, **sizes)


PANEL_STAGES = {
    "fused": partial(gate_panel, config=StageConfig(32, 16, 4, 2), interpret=True),
    "packed": partial(packed_from_product, pack_panel, config=PackConfig(32, 4)),
}
TWELL_STAGES = {
    "fused": partial(gate_pack, config=GatePackConfig(32, 16), interpret=True),
    "packed": partial(packed_from_product, pack_words, config=WordPackConfig(4)),
}


@pytest.mark.parametrize(
    ("stage", "dtype", "tokens", "d_ff", "rule"),
    [
        ("fused", "bfloat16", 37, 70, RELU),
        ("packed", "bfloat16", 37, 70, Rule(threshold=2.0)),
        ("packed", "float32", 37, 70, RELU),
        ("packed", "bfloat16", 64, 96, RELU),  # nothing is cut
    ],
)
def test_panels(stage, dtype, tokens, d_ff, rule):
    x, w = whole_numbers(tokens, 24, d_ff, dtype)
    gate = np.asarray(reference.project(x, w), np.float64)
    active = ~(gate <= rule.threshold)
    assert np.isnan(gate[3, 7])
    assert 0 < active.mean() < 0.3
    found = PANEL_STAGES[stage](x, w, panel=32, rule=rule)
    n_panels, segments = -(-tokens // 32), found.segments
    np.testing.assert_array_equal(found.hits[:, :d_ff].sum(axis=0, dtype=np.int32), active.sum(axis=0))
    np.testing.assert_array_equal(found.nnz.sum(axis=0)[:tokens], active.sum(axis=1))
    assert not found.hits[:, d_ff:].any()
    assert not found.nnz[:, tokens:].any()
    by_segment = np.asarray(found.hits[:, :d_ff]).reshape(n_panels, segments, d_ff)
    written = np.repeat(by_segment > 0, 32 // segments, axis=1).reshape(-1, d_ff)
    values = np.asarray(found.values[:, :d_ff], np.float64).transpose(0, 2, 1).reshape(-1, d_ff)
    dense = np.where(written, values, 0)
    np.testing.assert_array_equal(dense[:tokens], np.where(active, gate, 0))
    assert not dense[tokens:].any()


@pytest.mark.parametrize(
    ("stage", "dtype", "tile", "rule"),
    [
        ("fused", "bfloat16", 16, RELU),
        ("packed", "bfloat16", 16, RELU),  # a tile has 4 columns a lane, half of what a lane could load
        ("packed", "bfloat16", 32, Rule(threshold=2.0)),
        ("packed", "float32", 32, RELU),
    ],
)
def test_words(stage, dtype, tile, rule):
    tokens, d_ff, slots = 37, 70, 8
    x, w = whole_numbers(tokens, 24, d_ff, dtype)
    gate = np.asarray(reference.project(x, w), np.float64)
    active = ~(gate <= rule.threshold)
    packed, hits = TWELL_STAGES[stage](x, w, tile=tile, slots=slots, rule=rule)
    np.testing.assert_array_equal(hits, active.sum(axis=0))
    by_tile = np.pad(active, ((0, 0), (0, -d_ff % tile))).reshape(tokens, -1, tile)
    np.testing.assert_array_equal(packed.counts, by_tile.sum(axis=2))
    fits = ~np.asarray(packed.overflows)
    assert 0 < fits.mean() < 1
    dense = np.asarray(packed.to_dense(), np.float64)
    np.testing.assert_array_equal(dense[fits], np.where(active, gate, 0)[fits])


def test_only_a_weight_of_unaligned_rows_is_padded():
    x, narrow, whole = (jnp.ones((n, 8), jnp.bfloat16) for n in (4, 12, 16))
    assert gate_stage.xla_product(x, narrow).shape == (4, 16)
    assert gate_stage.xla_product(x, whole).shape == (4, 16)
    assert "pad" not in str(jax.make_jaxpr(gate_stage.xla_product)(x, whole))
