"""The benchmark of whole layers on a tiny one: what it compares, what it prints, and its exit status."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench_layers
from pallas_kernels import device as device_lib
from pallas_kernels.cases import Case
from pallas_kernels.device import Device
from pallas_kernels.inputs import Activity
from pallas_kernels.shapes import FFNShape

CASE = Case(FFNShape("tiny", 32, 64), 32, Activity(8.0))


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_a_case_is_checked_timed_and_shown(direction):
    result = bench_layers.run(CASE, direction, ["dense", "auto"], rounds=2, chain_ms=1.0)
    assert not result.failures
    rows = {row.name: row for row in result.rows}
    assert {"dense", "auto"} <= rows.keys()
    assert rows["auto"].error == pytest.approx(1, abs=0.5)
    assert all(len(row.timing.samples_ms) == 2 for row in result.rows)
    assert result.measured["mean_nnz"] == pytest.approx(8, rel=0.2)
    text = bench_layers.table(result)
    assert text.startswith(f"{direction}: 32 tokens, D 32, F 64, gated, bfloat16")
    assert "| auto |" in text
    assert json.loads(json.dumps(bench_layers.to_json([result], ["x"])))["cases"][0]["direction"] == direction


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_a_wrong_format_is_reported(monkeypatch, direction):
    honest = bench_layers.contestants

    def one_is_wrong(direction, formats):
        programs = honest(direction, formats)
        right = programs["auto"]
        programs["auto"] = lambda *arguments: jax.tree.map(
            lambda leaf: leaf * jnp.asarray(1.1, leaf.dtype), right(*arguments)
        )
        return programs

    monkeypatch.setattr(bench_layers, "contestants", one_is_wrong)
    result = bench_layers.run(CASE, direction, ["dense", "auto"], rounds=1, chain_ms=1.0)
    assert result.failures
    assert all(failure.startswith("auto: ") for failure in result.failures)


def test_the_program_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(device_lib, "current", lambda: Device("cpu", "cpu", 0, 0))
    assert bench_layers.main(["forward"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_cases_are_the_product_of_what_was_asked():
    args = bench_layers._parser().parse_args(["train", "--nnz", "30", "100", "--tokens", "7", "9"])
    cases = list(bench_layers._cases(args))
    assert [(case.activity.mean_nnz, case.tokens) for case in cases] == [(30, 7), (30, 9), (100, 7), (100, 9)]
