"""The contract on the PanelELL kernels, run by Pallas' interpreter on a CPU."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from op_contract import Contract
from panel_path import PanelPath

from pallas_kernels import FFNOptions, PanelELL, reference
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import pallas_triton as kernels


class TestPanelInterpreted(Contract):
    path = PanelPath(
        FFNOptions(format="panel", backend="interpret", tile=32, compression=4, panel=16, capacity=1.0),
        d_model=40,
        d_ff=72,
        many_tokens=301,
        check_vma=False,  # 2026-11: Pallas' interpreter mixes its own arrays with varying ones
        variants=({"panel": 32}, {"capacity": 0.5}, {"capacity": 1e-6}),
    )


@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize("pattern", ["uneven", "few", "all-zero", "fully-dense"])
def test_the_kernels_write_the_format(pattern, tokens):
    """Gate stage, lists and the copy over the lists give what `PanelELL.from_dense` makes of the reference's gate."""
    inputs, _ = TestPanelInterpreted.path.layer(pattern, tokens, "float32")
    x, weight = jnp.asarray(inputs["x"]), jnp.asarray(inputs["w_gate"])
    config = configs.choose(x, weight, TestPanelInterpreted.path.options)
    chunk = config.up.tile
    gate = kernels.gate_panel(x, weight, panel=config.panel, config=config.gate, interpret=True)
    lists, needed = kernels.build_lists(gate, d_ff=len(weight), chunk=chunk, interpret=True)
    values = kernels.panel_up(gate, lists, x, None, config=config.up, interpret=True).h
    expected = PanelELL.from_dense(reference.project(x, weight), panel=config.panel, chunk=chunk)
    used = int(needed) * chunk
    for name in ("offsets", "counts"):
        np.testing.assert_array_equal(getattr(lists, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(lists.neurons[:used], expected.neurons[:used])
    np.testing.assert_allclose(values[:used], expected.values[:used], rtol=1e-6, atol=1e-6)
    packed = dataclasses.replace(expected, values=values, neurons=lists.neurons)
    np.testing.assert_allclose(packed.to_dense(), expected.to_dense(), rtol=1e-6, atol=1e-6)
    listed = np.flatnonzero(np.asarray(lists.slots).ravel() >= 0)
    assert len(listed) == int(lists.counts.sum())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"up_keep": configs.StageConfig(64, 16, 4, 2)}, "up_keep.tile must be up.tile=32"),
        ({"down": configs.StageConfig(32, 64, 4, 2)}, "down.tile_k must divide up.tile=32"),
        ({"dw": configs.WeightsConfig(32, 32, 32, 4, 2)}, "dw.tile_k must divide panel=16"),
    ],
)
def test_the_laws_of_a_config(changes, sentence):
    small = configs._for_f32(16)
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(small, **changes)
    with pytest.raises(ValueError, match=r"StageConfig.tile must be a power of two from 16 to 256; got 24"):
        configs.StageConfig(24, 16, 4, 2)
