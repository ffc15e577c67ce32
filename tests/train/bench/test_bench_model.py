"""The benchmark of whole models: what it counts and compares, and what it says where something is missing."""

import dataclasses
import json
import math

import jax
import pytest
from rich.console import Console

from pallas_kernels import FFNOptions
from pallas_kernels.bench import timing
from pallas_kernels.bench.timing import Ceilings
from sparse_lm import ModelConfig
from train import cli
from train.bench import bench_model, core, nvml
from train.bench.bench_model import BenchModelOptions, Row
from train.bench.core import Counts
from train.bench.energy import Energy, EnergyReport, Power
from train.bench.results import CommonOptions
from train.errors import UserError

MODEL = ModelConfig(
    vocab_size=64, d_model=32, d_ff=128, num_layers=2, num_heads=2, num_kv_heads=2, context_length=32,
    ffn=FFNOptions("panel(tokens=16, capacity=1.0)", backend="interpret"), token_order="vocabulary",
    token_clusters=4,
)  # fmt: skip
DENSE_FLOPS = 2 * 128 * (2 * (4 * 32 * 32 + 3 * 32 * 128) + 2 * 32 * 32)
"""Of 128 tokens of MODEL: weights of attention and feed-forward layers, and half of the scores."""


@pytest.fixture(scope="module", autouse=True)
def short_timings():
    """Times are printed and not judged here."""
    measure = timing.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            timing, "measure", lambda calls, **how: measure(calls, rounds=2, chain_ms=0.0, least_calls=1)
        )
        patch.setattr(timing, "ceilings", lambda dtype, **how: Ceilings(1e12, 1e12, 0.01))
        yield


def options(**changes):
    return BenchModelOptions(**{"model": MODEL, "batch_size": 4, "nnz": 6, "formats": ("dense",)} | changes)


def printed(**changes):
    console = Console(record=True, width=200)
    return bench_model.run(options(**changes), console=console), console.export_text()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "model.json"
    rows, text = printed(formats=("panel", "dense", "silu"), common=CommonOptions(json=str(path)))
    return rows, text, json.loads(path.read_text())


def test_every_case_has_its_times_and_memory(measured):
    rows, text, _ = measured
    assert [row.name for row in rows] == ["panel", "dense", "silu"]
    for row in rows:
        assert len(row.samples_ms) == 2
        assert row.tokens_per_ms == pytest.approx(128 / row.median_ms)
        assert row.program_bytes > row.temporary_bytes > 0
        assert f"{row.median_ms:.1f} (" in text
    assert "energy is left out: energy and clocks are those of an NVIDIA GPU; this is cpu" in text
    assert "mJ/token" not in text


def test_the_sparse_case_is_as_active_as_asked_and_gives_what_dense_gives(measured):
    panel, dense, silu = measured[0]
    assert all(math.isclose(l0, 6, rel_tol=0.4) for l0 in panel.counts.l0)
    assert panel.dense_share == 0
    assert panel.difference < 0.01
    assert (dense.counts, dense.difference, silu.difference) == (None, None, None)


def test_work_is_counted_by_what_a_format_computes(measured):
    panel, dense, silu = measured[0]
    assert dense.flops == silu.flops == DENSE_FLOPS
    spared = sum(128 * 128 - 16 * pairs for pairs in panel.counts.pairs)
    assert panel.flops == DENSE_FLOPS - 2 * 2 * 32 * spared < DENSE_FLOPS
    assert dense.ceiling_share == pytest.approx(DENSE_FLOPS / 1e12 / (dense.median_ms / 1e3))


def test_work_of_rows_and_of_tokens_done_densely():
    rows = dataclasses.replace(MODEL, ffn=FFNOptions("twell"))
    counts = Counts(l0=(6.0, 6.0), overflow_rows=(0, 28), dense_tokens=(0, 28), pairs=(0, 0))
    spared = 128 * (128 - 6) + 100 * (128 - 6)
    assert core.flops(rows, 128, counts) == DENSE_FLOPS - 2 * 2 * 32 * spared


def test_json_has_rows_machine_and_what_it_was_asked(measured):
    rows, _, document = measured
    assert [row["name"] for row in document["rows"]] == ["panel", "dense", "silu"]
    assert [row["median_ms"] for row in document["rows"]] == [row.median_ms for row in rows]
    assert document["options"]["nnz"] == 6
    assert document["tokens"] == 128
    assert document["device"]["platform"] == "cpu"
    assert document["versions"]["jax"] == jax.__version__
    assert "clocks" not in document


def test_energy_stands_beside_the_times(monkeypatch):
    used = Energy(Power(400.0, 1.0, 50, 1500.0), 2.0, 500, joules=0.64, joules_in_all=0.8)
    report = EnergyReport(Power(80.0, 1.0, 50, 300.0), 2.0, {"dense": used})
    asked = {}

    def measure(gpu, calls, *, seconds):
        asked.update(calls=list(calls), seconds=seconds)
        return report

    monkeypatch.setattr(nvml, "find", lambda: (_Gpu(), ""))
    monkeypatch.setattr(bench_model, "measure_energy", measure)
    (row,), text = printed(energy_seconds=3.0)
    assert asked == {"calls": ["dense"], "seconds": 3.0}
    assert row.millijoules_per_token == pytest.approx(1e3 * 0.64 / 128)
    assert "5.000" in text
    assert "read every 2 ms, which moved 50 times a second" in text
    assert "80 W at rest are subtracted" in text


class _Gpu:
    def record(self):
        return {"sm_mhz": 1500}


def test_without_room_a_case_is_a_row_and_the_others_go_on(monkeypatch):
    buffers_of = core.buffers_of

    def short_of_memory(model, params, tokens):
        if model.activation == "silu":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nmore")
        return buffers_of(model, params, tokens)

    monkeypatch.setattr(core, "buffers_of", short_of_memory)
    (silu, dense), text = printed(formats=("silu", "dense"))
    assert silu.failure == "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."
    assert dense.median_ms > 0
    assert "silu: out of memory" in text
    assert "failed" in text


def test_peaks_need_a_device_that_counts(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match="--peaks needs a device that counts its memory; cpu does not"):
        printed(peaks=True)


def test_a_peak_stands_in_the_table():
    row = Row("dense", 128, samples_ms=(1.0, 3.0), program_bytes=2**20, peak_bytes=7 * 2**20)
    source = core.synthetic_source(MODEL, batch_size=4, nnz=6)
    console = Console(record=True, width=200)
    console.print(bench_model.table(options(), source, [row], Ceilings(1e12, 1e12, 0.01)))
    text = console.export_text()
    assert "2.0 (1.0–3.0)" in text
    assert " 7 " in text


def test_a_checkpoint_is_timed_on_its_own_text(finished, tmp_path, capsys):
    path = tmp_path / "model.json"
    command = ["bench", "model", "--checkpoint", str(finished.workdir), "--formats", "dense", "auto"]
    assert cli.main([*command, "--batch-size", "4", "--no-energy", "--json", str(path)]) == 0
    assert "activity of its own text" in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert (document["options"]["batch_size"], document["tokens"]) == (4, 64)
    assert document["options"]["model"]["d_ff"] == 64
    auto = document["rows"][1]
    assert auto["difference"] == 0, "on a CPU auto is the dense layer"
    assert auto["dense_share"] == 1
    _, stats = core.load_for_inference(finished.workdir)[0](
        core.checkpoint_source(str(finished.workdir), core.TextChoice(), batch_size=4).tokens
    )
    assert auto["counts"]["l0"] == pytest.approx(stats.l0.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("command", "sentence", "status"),
    [
        ("--nnz 0", "nnz must be above 0; got 0.0", 2),
        ("--rounds 0", "rounds must be at least 1; got 0", 2),
        ("--batch-size 0", "batch-size must be at least 1; got 0", 2),
        ("--nnz 3 --checkpoint x", "nnz is for synthetic activity: --checkpoint brings its own", 2),
        ("--peaks --checkpoint x", "peaks is for --config", 2),
        ("--energy-seconds 0", "energy-seconds must be above 0; got 0.0", 2),
        ("--tolerance 0.1", "tolerance needs --against, the result that it is of; got none", 2),
        ("--against x --tolerance -1", "tolerance must be at least 0; got -1.0", 2),
        (
            "--against {tmp}/none.json",
            "--against must name a file that this benchmark's --json",
            1,
        ),
        ("--against {tmp}/a --json {tmp}/../{tmp.name}/a", "--json must name another file than --against", 2),
        ("--data.every-document", "--data.every-document needs --data.paths; got none", 2),
        ("--formats gelu", "must be one of", 2),
        ("--batch-size 2 --formats panel", "needs an NVIDIA GPU", 1),
        ("--batch-size 2 --nnz 5000", "a mean nnz of 5000 needs more than", 1),
        ("--checkpoint {run} --batch-size 10000", "batch-size must be at most", 1),
        ("--checkpoint {run} --data.paths {tmp}/none.jsonl", "there is no file", 1),
        ("--json {tmp}/file/x.json", "--json must name a file that can be written", 1),
    ],
)
def test_mistakes_are_sentences(finished, capsys, tmp_path, command, sentence, status):
    (tmp_path / "file").touch()
    words = command.format(tmp=tmp_path, run=finished.workdir).split()
    assert cli.main(["bench", "model", "--config", "tiny", "--formats", "dense", *words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
