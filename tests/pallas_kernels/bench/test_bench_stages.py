"""The benchmark of PanelELL's stages, on a tiny layer whose kernels are interpreted."""

import json

import jax
import numpy as np
import pytest

from pallas_kernels import FFNOptions, Panel, reference
from pallas_kernels.bench import stages
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.inputs import Activity
from pallas_kernels.bench.layers import cotangent
from pallas_kernels.bench.shapes import FFNShape

CASE = Case(FFNShape("tiny", 32, 64), 32, Activity(8.0))
OPTIONS = FFNOptions(Panel(tokens=16, capacity=1.0), backend="interpret")


def test_the_stages_make_up_the_layer():
    """What the stages give each other is what a call computes: y, and every gradient."""
    inputs = CASE.arrays()
    dy = cotangent(inputs)
    programs, union = stages.stages(inputs, dy, OPTIONS)
    assert list(programs) == ["gate", "counts", "lists", "up", "up_keep", "down", "dh", "dx", "dw"]
    function, arguments = programs["down"]
    y, _ = reference.ffn(*(inputs[name] for name in ("x", "w_gate", "w_up", "w_down")))
    y, found = (np.asarray(value, np.float32) for value in (y, jax.jit(function)(*arguments)))
    np.testing.assert_allclose(found, y, rtol=0, atol=2e-2 * np.abs(y).max())
    gate = reference.project(inputs["x"], inputs["w_gate"])
    assert union == np.asarray(gate > 0).reshape(2, 16, 64).any(axis=1).sum(axis=1).mean()


def test_a_case_is_timed_shown_and_stored():
    result = stages.run(CASE, rounds=2, chain_ms=0.1, options=OPTIONS)
    names = [row.name for row in result.rows]
    assert set(stages.FORWARD) | set(stages.TRAIN) <= set(names)
    assert names[-2:] == ["whole forward", "whole with gradients"]
    gate, up = (next(row for row in result.rows if row.name == name) for name in ("gate", "up"))
    assert gate.flops == 2 * 32 * 32 * 64
    assert up.flops == pytest.approx(2 * 32 * 32 * result.union)
    assert result.sum_ms(stages.FORWARD) > gate.timing.median_ms
    text = stages.table(result)
    assert "| up_keep |" in text
    assert "| the forward's stages in all |" in text
    [stored] = json.loads(json.dumps(stages.to_json([result], ["x"])))["cases"]
    assert [row["name"] for row in stored["rows"]] == names


def test_without_a_gpu_it_says_what_it_needs(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert stages.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
