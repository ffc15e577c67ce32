"""The benchmark of training steps: its cases, what it says of each, and what it does with one that fails."""

import dataclasses
import json
import math

import jax
import pytest
from rich.console import Console

from pallas_kernels import FFNOptions
from sparse_lm import ModelConfig
from train import cli
from train.bench import bench_step
from train.bench.bench_step import BenchStepOptions, Case, Row
from train.bench.results import CommonOptions
from train.errors import UserError

MODEL = ModelConfig(
    vocab_size=64, d_model=32, d_ff=128, num_layers=2, num_heads=2, num_kv_heads=2, context_length=32,
    ffn=FFNOptions("panel(tokens=16, capacity=1.0)", backend="interpret"), token_order="vocabulary",
    token_clusters=4,
)  # fmt: skip


def options(**changes):
    return BenchStepOptions(**{"model": MODEL, "batch_size": 4, "nnz": 6, "steps": 2} | changes)


def printed(**changes):
    console = Console(record=True, width=120)
    return bench_step.run(options(**changes), console=console), console.export_text()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "step.json"
    rows, text = printed(formats=("dense", "panel"), remats=("sparse",), common=CommonOptions(json=str(path)))
    return rows, text, json.loads(path.read_text())


def test_every_case_has_its_times_memory_and_activity(measured):
    rows, text, _ = measured
    assert [str(row.case) for row in rows] == ["dense, remat sparse", "panel, remat sparse"]
    for row in rows:
        assert row.failure is None
        assert len(row.samples_ms) == 2
        assert all(ms > 0 for ms in row.samples_ms)
        assert row.program_bytes > row.temporary_bytes > 0
        assert row.overflow_share == 0
        assert len(row.l0_per_layer) == MODEL.num_layers
        assert all(math.isclose(l0, 6, rel_tol=0.4) for l0 in row.l0_per_layer)
        assert f"{row.median_ms:.1f} (" in text


def test_the_format_changes_no_activity(measured):
    assert len({row.l0_per_layer for row in measured[0]}) == 1


def test_json_has_every_row_and_what_it_was_asked(measured):
    rows, _, document = measured
    assert document["tokens_per_step"] == 4 * 32
    assert document["options"]["nnz"] == 6
    assert document["options"]["model"]["d_ff"] == 128
    assert [row["median_ms"] for row in document["rows"]] == [row.median_ms for row in rows]
    assert document["rows"][1]["format"] == "panel"
    assert document["rows"][1]["name"] == "panel, remat sparse"
    assert document["versions"]["jax"] == jax.__version__


def test_a_silu_case_is_the_dense_layer_with_that_activation():
    programs = [Case(name, "full").program(options()) for name in ("silu", "dense")]
    model = programs[0].config.model
    assert (model.activation, model.ffn.layout.name, model.remat) == ("silu", "dense", "full")
    silu, dense = (jax.tree.map(lambda leaf: leaf.shape, each.abstract_state().params) for each in programs)
    assert silu == dense


@pytest.fixture
def a_millisecond_each(monkeypatch):
    monkeypatch.setattr(
        bench_step, "measure", lambda options, cases: (Row(case, "cpu", (1.0,)) for case in cases)
    )


def test_every_format_is_timed_under_every_policy(a_millisecond_each):
    rows, text = printed(formats=("dense", "twell"), remats=("none", "sparse"))
    cases = ["dense, remat none", "twell, remat none", "dense, remat sparse", "twell, remat sparse"]
    assert [str(row.case) for row in rows] == cases
    assert [f"{case}: 1.0 ms a step" in text for case in cases] == [True] * 4


def test_times_stand_beside_an_older_file(a_millisecond_each, tmp_path):
    printed(formats=("dense",), remats=("none",), common=CommonOptions(json=str(tmp_path / "new.json")))
    document = json.loads((tmp_path / "new.json").read_text())
    old = tmp_path / "old.json"
    faster = [row | {"median_ms": row["median_ms"] / 1e6} for row in document["rows"]]
    old.write_text(json.dumps(document | {"rows": faster}))
    with pytest.raises(UserError, match=r"dense, remat none takes .*% longer .*--tolerance allows 100.0%"):
        printed(formats=("dense",), remats=("none",), common=CommonOptions(against=str(old), tolerance=1.0))


def test_a_case_without_room_is_a_row_and_the_others_go_on(monkeypatch):
    time_step = bench_step._time

    def short_of_memory(row, *arguments):
        if row.case.format == "dense":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nmore")
        return time_step(row, *arguments)

    monkeypatch.setattr(bench_step, "_time", short_of_memory)
    rows, text = printed(
        formats=("dense", "auto"), remats=("none",), model=dataclasses.replace(MODEL, ffn=FFNOptions())
    )
    assert rows[0].failure == "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."
    assert rows[0].median_ms is None
    assert rows[1].median_ms > 0
    assert "dense, remat none: out of memory" in text


def test_any_other_error_is_not_hidden(monkeypatch):
    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: a surprise")

    monkeypatch.setattr(bench_step, "_time", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a surprise"):
        printed(formats=("dense",), remats=("none",))


def test_peaks_run_in_processes_of_their_own_and_need_a_device_that_counts(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match="--peaks needs a device that counts its memory; cpu does not"):
        printed(formats=("dense",), remats=("none",), peaks=True)


def test_a_peak_stands_in_the_table():
    row = Row(Case("dense", "none"), "a GPU", (1.0, 3.0), 2**20, 2**20, 7 * 2**20, (3.0,), 0.0)
    console = Console(record=True, width=120)
    console.print(bench_step.table(options(), [row]))
    text = console.export_text()
    assert "2.0 (1.0–3.0)" in text
    assert " 7 " in text


@pytest.mark.parametrize(
    ("command", "sentence", "status"),
    [
        ("bench step --steps 0", "steps must be at least 1; got 0", 2),
        ("bench step --nnz 0", "nnz must be above 0; got 0.0", 2),
        ("bench step --config zzz", "config must be one of", 2),
        ("bench step --remats all", "must be one of", 2),
        ("bench step --config tiny --batch-size 4 --nnz 5000", "a mean nnz of 5000 needs more than", 1),
        ("bench step --config tiny --batch-size 3", "batch-size must be a multiple of devices", 1),
        ("bench step --config tiny --batch-size 4 --nnz 9 --formats panel", "needs an NVIDIA GPU", 1),
        ("bench step --json {tmp}/file/x.json", "--json must name a file that can be written", 1),
    ],
)
def test_mistakes_are_sentences(capsys, tmp_path, command, sentence, status):
    (tmp_path / "file").touch()
    assert cli.main(command.format(tmp=tmp_path).split()) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
