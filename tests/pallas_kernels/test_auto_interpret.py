"""The contract on ``format="auto"``, whose kernels Pallas' interpreter runs on a CPU,
and what its probe decides."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_checks import DL1, call, check_everything, cotangent, differentiate, run
from op_contract import Contract
from panel_path import PanelPath

from pallas_kernels import Auto, FFNOptions
from pallas_kernels import auto as adaptive
from pallas_kernels.panel import config as configs

OPTIONS = FFNOptions(Auto(tokens=16), backend="interpret")


class TestAutoInterpreted(Contract):
    path = PanelPath(
        FFNOptions(format=Auto(tokens=16), backend="interpret"),
        d_model=40,
        d_ff=72,
        many_tokens=301,
        check_vma=False,
        variants=(Auto(tokens=32),),
        tokens=40,
        partial=True,
        tile=32,
        slots=8,
    )

    def test_the_plain_call_is_not_skipped(self):
        self.skip_unsupported = lambda inputs, options: None
        self.test_pattern("uneven", "bfloat16", "gated")


@pytest.mark.parametrize(("pattern", "expected"), [("all-zero", True), ("few", True), ("fully-dense", False)])
def test_the_probe_takes_the_sparse_layer_where_panels_are_sparse(pattern, expected):
    path = dataclasses.replace(TestAutoInterpreted.path, d_ff=1000)
    inputs, _ = path.layer(pattern, 64, "bfloat16")
    decision = adaptive.pays(jnp.asarray(inputs["x"]), jnp.asarray(inputs["w_gate"]), OPTIONS, 0.55)
    assert bool(decision) is expected


def test_the_probe_sees_the_whole_call():
    """Tokens that are dense only at the end count as much as those at the start."""
    gate = np.zeros((100, 8))
    gate[:, 0] = 1
    for dense_from, expected in ((640, True), (320, True), (100, False), (0, False)):
        x = np.zeros((640, 8))
        x[:, 0] = np.where(np.arange(640) < dense_from, -1, 1)
        assert bool(adaptive.pays(jnp.asarray(x), jnp.asarray(gate), OPTIONS, 0.55)) is expected, dense_from


@pytest.mark.parametrize("sequences", [1, 2, 4, 8, 32])
def test_the_probe_is_not_misled_by_how_sequences_begin(sequences):
    """The first token of each activates every neuron, as attention's sinks do; no other activates any:
    with one such panel in the sample it would not pay."""
    x = np.full((sequences * 2048, 8), -1.0)
    x[::2048] = 1
    assert bool(adaptive.pays(jnp.asarray(x), jnp.ones((100, 8)), FFNOptions(), 0.1))


@pytest.mark.parametrize("break_even", [0.0, 2.0])
def test_either_decision_gives_the_same_result(monkeypatch, break_even):
    """The probe decides how long a call takes, never what it gives."""
    share = configs.BreakEven(break_even, break_even)
    monkeypatch.setattr(configs, "break_even", lambda *_, **__: share)
    path = TestAutoInterpreted.path
    step = jax.jit(partial(differentiate, apply=partial(call, options=path.options)))
    for pattern in ("few", "fully-dense"):
        inputs, active = path.layer(pattern, 48, "bfloat16")
        dy = cotangent(inputs)
        check_everything(run(step, inputs, dy, DL1), inputs, dy, active, 0)
