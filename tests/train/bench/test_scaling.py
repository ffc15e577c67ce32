"""The benchmark of steps over devices, on simulated ones: what it runs, compares and refuses."""

import json
import math

import jax
import pytest
from rich.console import Console

from sparse_lm import ModelConfig
from train import cli
from train.bench import scaling
from train.bench.scaling import Row, ScalingOptions

MODEL = ModelConfig(
    vocab_size=64, d_model=16, d_ff=64, num_layers=1, num_heads=2, num_kv_heads=2, context_length=16,
    dtype="float32",
)  # fmt: skip
WEIGHTS = 4 * 16 * 16 + 3 * 64 * 16 + 64 * 16
NORMS = 3 * 16


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "scaling.json"
    options = ScalingOptions(
        model=MODEL, batch_size=4, devices=(1, 2), modes=("zero1", "pmap"), nnz=6, steps=2,
        tensor_parallel=True, tensor_parallel_model=True, loss_steps=5, json=str(path),
    )  # fmt: skip
    console = Console(record=True, width=140)
    found = scaling.run(options, console=console)
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    return found, console.export_text()


def test_every_mode_is_compared_with_one_device(measured):
    found, text = measured
    rows = found["rows"]
    modes = [None, "zero1", "pmap"]
    assert [(row["mode"], row["devices"]) for row in rows] == [(m, 2 if m else 1) for m in modes]
    alone = rows[0]["median_ms"]
    for row in rows:
        assert row["failure"] is None
        assert row["tokens"] == row["devices"] * 4 * 16
        assert len(row["samples_ms"]) == 2
        assert row["program_bytes"] > row["temporary_bytes"] > 0
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["median_ms"])
        assert math.isclose(row["l0"], 6, rel_tol=0.5)
        if row["mode"]:
            assert row["of_linear"] == pytest.approx(alone / row["median_ms"])
            assert row["waiting_ms"] == pytest.approx(row["median_ms"] - alone)
            assert f"2 devices, {row['mode']}: " in text


def test_what_is_exchanged_is_counted(measured):
    sent = {row["mode"]: row["exchanged"] for row in measured[0]["rows"]}
    assert sent[None] == {}
    assert sent["pmap"]["all-reduce f32"] == pytest.approx(4 * (WEIGHTS + NORMS), abs=256)
    assert sent["zero1"]["reduce-scatter f32"] == 4 * WEIGHTS // 2
    assert sent["zero1"]["all-gather f32"] == 4 * WEIGHTS


def test_a_layers_neurons_are_shared(measured):
    alone, shared = measured[0]["tensor_parallel"]
    assert (alone["devices"], shared["devices"]) == (1, 2)
    assert alone["exchanged"] == {}
    # y and dx of all tokens; norms and statistics are a few scalars.
    assert shared["exchanged"]["all-reduce f32"] == pytest.approx(2 * 4 * 64 * 16, abs=64)
    assert shared["of_linear"] == pytest.approx(alone["median_ms"] / shared["median_ms"] / 2)


def test_a_models_neurons_are_shared(measured):
    found, text = measured
    rows = found["tensor_parallel_model"]
    cases = [(row["what"], row["devices"]) for row in rows]
    assert cases == [(what, count) for what in ("forward", "forward and backward") for count in (1, 2)]
    for alone, shared in (rows[:2], rows[2:]):
        assert (alone["failure"], shared["failure"], alone["exchanged"]) == (None, None, {})
        assert shared["of_linear"] == pytest.approx(alone["median_ms"] / shared["median_ms"] / 2)
    # y of all tokens, and in the backward dx of all tokens.
    forward, both = (row["exchanged"]["all-reduce f32"] for row in (rows[1], rows[3]))
    assert forward == pytest.approx(4 * 64 * 16, abs=64)
    assert both == pytest.approx(2 * 4 * 64 * 16, abs=64)
    assert "forward, 2 devices share the model's neurons: " in text


def test_losses_are_those_of_one_device_up_to_rounding(measured):
    found = measured[0]["losses"]
    assert list(found["losses"]) == ["1 alone", "2 zero1", "2 pmap"]
    assert all(len(losses) == 5 for losses in found["losses"].values())
    assert found["losses"]["1 alone"][-1] != found["losses"]["1 alone"][0]
    assert max(found["largest_difference"].values()) < 1e-5


def test_a_case_without_memory_is_a_line_that_says_so(monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 80 GiB are not enough\nand more")

    monkeypatch.setattr(scaling, "_timed", fail)
    console = Console(record=True, width=140)
    options = ScalingOptions(model=MODEL, devices=(1,), nnz=6, steps=1)
    rows = scaling.run(options, console=console)["rows"]
    assert rows[0]["failure"] == "out of memory: RESOURCE_EXHAUSTED: 80 GiB are not enough"
    assert "1 device: out of memory" in console.export_text()


def test_shares_need_times():
    row = Row("zero1", 2, 128, samples_ms=(2.0, 4.0, 3.0))
    assert row.beside(None) == row
    assert row.beside(Row(None, 1, 64, failure="out of memory")) == row
    found = row.beside(Row(None, 1, 64, samples_ms=(2.7,)))
    assert (found.of_linear, found.waiting_ms) == (pytest.approx(0.9), pytest.approx(0.3))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--devices 2 4", "devices must begin with 1"),
        ("--devices 1 64", "devices must be at most 4, which are here; got 64"),
        ("--steps 0", "steps must be at least 1; got 0"),
        ("--compiler-options fast", "must each be name=value; got 'fast'"),
        ("--modes tensor", "must be one of"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert cli.main(["bench", "scaling", "--config", "tiny", *words.split()]) > 0
    assert sentence in capsys.readouterr().err
