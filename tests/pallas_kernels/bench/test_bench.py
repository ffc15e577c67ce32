"""The benchmark's pieces on tiny layers: inputs, timing, accuracy, and the program's exit status."""

import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FFNOptions, Twell, reference
from pallas_kernels import device as device_lib
from pallas_kernels.activations import RELU
from pallas_kernels.bench import accuracy, cases, timing
from pallas_kernels.bench import twell as bench
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.inputs import Activity, ffn_inputs
from pallas_kernels.bench.shapes import PAPER, SHAPES, FFNShape
from pallas_kernels.bench.timing import Ceilings
from pallas_kernels.device import Device
from pallas_kernels.formats import TwELL

OPTIONS = FFNOptions(format=Twell(tile=64, compression=4), backend="interpret")
LIMITS = Ceilings(flops=1e15, bytes=4e12, dispatch_ms=1e-3)
CASE, NON_GATED = (Case(FFNShape("tiny", 32, 64, gated), 32, Activity(8.0)) for gated in (True, False))


SIZES = {"tokens": 1500, "d_model": 100, "d_ff": 700}


def make(activity, **sizes):
    return ffn_inputs(jax.random.key(0), activity, **(sizes or SIZES))


def active_gates(inputs):
    gate = inputs.get("w_gate", inputs["w_up"])
    return np.asarray(RELU.active(reference.project(inputs["x"], gate)))


@pytest.mark.parametrize("nnz", [8.0, 30.0, 100.0])
def test_inputs_are_as_sparse_as_asked(nnz):
    mask = active_gates(make(Activity(nnz)))
    assert mask.sum(axis=1).mean() == pytest.approx(nnz, rel=0.05)
    assert 0.3 <= (~mask.any(axis=0)).mean() < 0.5


def test_inputs_have_uneven_rows_and_neurons():
    even = active_gates(make(Activity(30, 0, 0, 0)))
    uneven = active_gates(make(Activity(30, 0, 1.5, 0.5)))
    assert uneven.sum(axis=0).std() > 4 * even.sum(axis=0).std()
    assert uneven.sum(axis=1).std() > 1.5 * even.sum(axis=1).std()


def test_inputs_have_the_type_and_the_arguments_of_the_layer():
    inputs = jax.eval_shape(lambda: make(Activity(), tokens=5, d_model=8, d_ff=100, dtype=jnp.float16))
    assert {name: value.shape for name, value in inputs.items()} == {
        "x": (5, 8), "w_gate": (100, 8), "w_up": (100, 8), "w_down": (100, 8),
    }  # fmt: skip
    assert {value.dtype for value in inputs.values()} == {jnp.dtype(jnp.float16)}
    with pytest.raises(ValueError, match="a mean nnz of 90 needs more than the 70 live neurons of F=100"):
        make(Activity(90), tokens=5, d_model=8, d_ff=100)
    with pytest.raises(ValueError, match="D of at least 4; got 5 and 3"):
        make(Activity(), tokens=5, d_model=3, d_ff=100)


@pytest.mark.parametrize(
    ("fields", "law"),
    [
        ({"mean_nnz": 0}, "above 0"),
        ({"dead": 1.0}, "under 1"),
        ({"rate_spread": -1}, "at least 0"),
        ({"topic_share": 1.5}, "from 0 to 1, and topics at least 1; got 1.5, 64"),
    ],
)
def test_an_impossible_activity_is_an_error(fields, law):
    with pytest.raises(ValueError, match=law):
        Activity(**fields)


def test_contestants_take_turns():
    log: list[str] = []
    times = timing.measure({name: partial(log.append, name) for name in "ab"}, rounds=7, chain_ms=0.0)
    # Three calls a chain and as many before it: 12 calls a round, and one round more that does not count.
    rounds = {"".join(log[first : first + 12]) for first in range(len(log) - 96, len(log), 12)}
    assert rounds == {"aaaaaabbbbbb", "bbbbbbaaaaaa"}
    assert [(len(each.samples_ms), each.calls) for each in times.values()] == [(7, 3)] * 2
    assert times["a"].median_ms == sorted(times["a"].samples_ms)[3]


def test_a_rest_takes_the_place_of_the_run_in(monkeypatch):
    log: list[str | float] = []
    monkeypatch.setattr(time, "sleep", log.append)
    timing.measure({name: partial(log.append, name) for name in "ab"}, rounds=2, chain_ms=0.0, rest_s=0.5)
    rounds = {tuple(log[first : first + 8]) for first in range(len(log) - 24, len(log), 8)}
    assert rounds <= {(0.5, *"aaa", 0.5, *"bbb"), (0.5, *"bbb", 0.5, *"aaa")}


def test_what_does_not_compile_is_an_answer():
    compiled = timing.compile_all(
        {"good": (jnp.negative, (1.0,)), "bad": (jnp.dot, (jnp.ones(2), jnp.ones(3)))}
    )
    assert not isinstance(compiled["good"], Exception)
    assert compiled["good"](1.0) == -1.0
    assert isinstance(compiled["bad"], TypeError)


def test_ceilings_are_rates():
    limits = timing.ceilings(jnp.bfloat16, size=64)
    assert limits.flops > 1e6
    assert limits.bytes > 1e6
    assert LIMITS.floor_ms(flops=1e12, bytes_moved=2e9) == pytest.approx(1.0)
    assert LIMITS.floor_ms(flops=1e12, bytes_moved=8e9) == pytest.approx(2.0)


def test_work_of_the_paper_layer():
    works = cases.work(Case(PAPER, 65536), FFNOptions("twell"), mean_nnz=30.0)
    gemm = 2 * 65536 * 2048 * 5632
    assert works["dense_ffn"].flops == 3 * gemm
    assert works["gate_pack"].flops == gemm
    assert works["up_down"].gathered == 65536 * 30 * 2 * 2048 * 2
    assert works["up_down"].bytes == 4 * 65536 * (22 + 30) + 2 * 2 * 2048 * (65536 + 5632)


def test_rows_are_sampled_from_end_to_end():
    rows = accuracy.sample_rows(100_000)
    assert (rows[0], rows[-1], len(rows)) == (0, 99_999, 256)
    assert accuracy.sample_rows(3).tolist() == [0, 1, 2]


def test_nan_is_never_acceptable():
    assert not accuracy.acceptable(accuracy.relative_error(np.array([np.nan]), np.ones(1)), 1.0)
    assert accuracy.acceptable(1.4e-3, 1e-3)
    assert not accuracy.acceptable(1.6e-3, 1e-3)


@pytest.fixture(scope="module")
def layer():
    """A tiny layer's arguments, and the dense call's answer."""
    inputs = CASE.make_inputs()(jax.random.key(0))
    return inputs, cases.dense(inputs["x"], inputs["w_gate"], inputs["w_up"], inputs["w_down"])


def test_wrong_statistics_are_named(layer):
    _, (_, right) = layer
    assert accuracy.stats_failures(right, right) == []
    named = " ".join(accuracy.stats_failures(jax.tree.map(lambda leaf: leaf * 2, right), right))
    assert all(name in named for name in ("l1", "l0", "neuron_hits", "max_nnz"))


def test_wrong_outputs_are_named(layer):
    inputs, (y, stats) = layer
    gate = reference.project(inputs["x"], inputs["w_gate"])
    packed = TwELL.from_dense(gate, tile=64, compression=4)
    right = {
        "dense_ffn": y, "sparse_ffn": (y, stats), "up_down": (y, None),
        "gate_gemm": gate, "gate_pack": packed,
    }  # fmt: skip
    errors, failures = bench._judge(inputs, right)
    assert (failures, errors.keys()) == ([], right.keys())
    wrong = {
        "sparse_ffn": (y.at[0].set(jnp.nan), stats),
        "up_down": (y * 1.02, None),
        "gate_pack": TwELL.from_dense(gate.at[:, 7].set(1), tile=64, compression=4),
    }
    for name, output in wrong.items():
        _, failures = bench._judge(inputs, right | {name: output})
        assert len(failures) == 1
        assert failures[0].startswith(f"{bench._LABELS[name]} has a relative error of")


@pytest.fixture(scope="module")
def finished():
    [outcome] = bench.run([CASE], OPTIONS, rounds=2, chain_ms=0.1)
    return outcome


def test_a_run_checks_and_times_every_contestant(finished):
    result, failures = finished
    assert failures == []
    assert list(result.rows) == list(cases.contestants(CASE, OPTIONS))
    assert result.measured["mean_nnz"] == pytest.approx(8.0, rel=0.2)
    assert {name for name, row in result.rows.items() if row.error is None} == {"sparse_ffn_y"}
    assert result.memory["dense_ffn"] > 0


def test_the_contestants_of_a_layer_without_gate_projection():
    programs = bench._programs(NON_GATED, OPTIONS)
    outputs = {name: jax.eval_shape(function, *arguments) for name, (function, arguments) in programs.items()}
    assert outputs["up_down"][0] == outputs["sparse_ffn"][0] == outputs["dense_ffn"]
    assert outputs["inputs"].keys() == {"x", "w_up", "w_down"}
    assert cases.work(NON_GATED, OPTIONS, 8.0).keys() >= cases.contestants(NON_GATED, OPTIONS).keys()


def test_on_hopper_both_kernels_of_gate_pack_are_timed(monkeypatch):
    hopper, ampere = Device("gpu", "NVIDIA H200", 90, 132), Device("gpu", "NVIDIA A100", 80, 108)
    for device, names in ((hopper, ["gate_pack", "gate_pack_triton"]), (ampere, ["gate_pack"])):
        monkeypatch.setattr(device_lib, "current", lambda device=device: device)
        entries = cases.contestants(Case(PAPER, 65536), FFNOptions("twell"))
        assert [name for name in entries if name.startswith("gate_pack")] == names
        assert entries.keys() <= cases.work(Case(PAPER, 65536), FFNOptions("twell"), 30.0).keys()


def test_the_table_and_the_json_hold_the_run(finished):
    result, _ = finished
    lines = bench.table(result, LIMITS).splitlines()
    assert lines[0].startswith("32 tokens, D 32, F 64, gated, bfloat16, mean nnz ")
    labels = [bench._LABELS[name] for name in result.rows]
    assert [line.split("|")[1].strip() for line in lines[4:-2]] == labels
    loaded = json.loads(json.dumps(bench.to_json([result], LIMITS, ["command"])))
    assert loaded["versions"]["jax"] == jax.__version__
    assert loaded["device"]["kind"] == jax.devices()[0].device_kind
    [case] = loaded["cases"]
    assert case["case"]["shape"]["d_ff"] == 64
    assert (case["rows"][0]["name"], len(case["rows"][0]["timing"]["samples_ms"])) == ("dense_ffn", 2)


def test_a_case_that_does_not_compile_is_reported(monkeypatch):
    monkeypatch.setattr(
        timing, "compile_all", lambda programs: dict.fromkeys(programs, ValueError("too large"))
    )
    [(result, failures)] = bench.run([CASE], OPTIONS)
    assert result is None
    assert f"{CASE} did not compile: up_down: too large" in failures


def test_without_a_gpu_the_program_says_so(capsys):
    assert bench.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.fixture
def pretended_gpu(monkeypatch, finished):
    """The program as on a GPU, with a run that has already been made."""
    asked = []
    device = Device("gpu", "NVIDIA H200", 90, 132)
    monkeypatch.setattr(device_lib, "current", lambda: device)
    monkeypatch.setattr(bench.timing, "ceilings", lambda dtype: LIMITS)

    def run(cases, options, **keywords):
        asked.append((cases, options))
        return [finished]

    monkeypatch.setattr(bench, "run", run)
    return asked


def test_the_program_asks_for_the_cases_that_were_named(pretended_gpu, capsys, tmp_path):
    path = tmp_path / "deep" / "out.json"
    arguments = [
        "--shapes",
        "llama-3-8b",
        "--tokens",
        "4096",
        "16",
        "--nnz",
        "9",
        "--json",
        str(path),
    ]
    assert bench.main(arguments) == 0
    assert bench.main(["--tile", "128"]) == 0
    (named, _), (everything, options) = pretended_gpu
    assert named == [Case(SHAPES["llama-3-8b"], m, Activity(9.0)) for m in (4096, 16)]
    assert everything == cases.default_cases()
    assert options == FFNOptions(format=Twell(tile=128))
    assert json.loads(path.read_text())["command"][1:] == arguments
    assert "gate_pack takes" in capsys.readouterr().out


def test_a_wrong_result_fails_the_program(pretended_gpu, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *arguments, **keywords: [(None, ["y is wrong"])])
    assert bench.main([]) == 1
    assert "WRONG: y is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tile", "100"], "tile must be a power of two"),
        (["--nnz", "0"], "mean_nnz must be above 0"),
        (["--shapes", "qwen1.5-0.5b", "--nnz", "2500"], "needs more than the 1971 live neurons"),
        (["--tokens", "0"], "at least 1"),
        (["--dtype", "float32", "--backend", "mosaic_gpu"], "multiplies bfloat16 or float16"),
    ],
)
def test_bad_arguments_end_the_program_with_a_sentence(pretended_gpu, capsys, arguments, sentence):
    with pytest.raises(SystemExit):
        bench.main([*arguments])
    assert sentence in capsys.readouterr().err
    assert pretended_gpu == []
