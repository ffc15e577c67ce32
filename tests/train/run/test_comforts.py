"""What a run shows besides its figures, and pictures of runs, through the program."""

import json
import os
import re
import sys
import types

import numpy as np
import programs
import pytest
import tiny_runs

from train import cli


@pytest.fixture
def wandb(monkeypatch):
    """W&B's two calls, as it documents them, kept in place of being sent."""
    sent = types.SimpleNamespace(init=None, logged=[], finished=0)

    class Run:
        def log(self, numbers, step):
            sent.logged.append((step, numbers))

        def finish(self):
            sent.finished += 1

    def init(**options):
        sent.init = options
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return sent


def test_samples_a_profile_and_a_dashboard(corpus, tmp_path, capsys, wandb):
    options = ("--steps", "4", "--report.evaluate-every", "2", "--samples", "the sum", "--profile", "2:3",
               "--wandb", "sparse")  # fmt: skip
    assert cli.main(programs.train(corpus, tmp_path, *options)) == 0
    said = capsys.readouterr().out
    samples = {
        record["step"]: record["samples"]
        for record in tiny_runs.read_records(tmp_path)
        if "samples" in record
    }
    assert samples.keys() == {2, 4}
    for step, (text,) in samples.items():
        assert text.startswith("the sum")
        assert len(text) > len("the sum")
        assert f"step {step}: the sum" in said

    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()

    first_id = wandb.init["id"]
    assert (wandb.init["project"], wandb.init["resume"], wandb.finished) == ("sparse", "allow", 1)
    assert [step for step, numbers in wandb.logged if "ce" in numbers] == [1, 2, 3, 4]
    evaluations = [numbers["evaluation/ce"] for _, numbers in wandb.logged if "evaluation/ce" in numbers]
    assert len(evaluations) == 2

    assert cli.main(programs.train(corpus, tmp_path, *options, "--steps", "5", "--profile", "9:9")) == 0
    assert wandb.init["id"] == first_id
    capsys.readouterr()

    picture, figures = tmp_path / "curves.png", tmp_path / "figures.json"
    runs = [str(tmp_path), str(tmp_path)]
    assert cli.main(["plot", *runs, "--out", str(picture), "--json", str(figures)]) == 0
    said = capsys.readouterr().out.splitlines()
    last = tiny_runs.read_records(tmp_path)
    ce = [record["ce"] for record in last if "ce" in record]
    assert len(ce) == 5
    assert said[0] == said[1]
    assert said[0].startswith(f"{tmp_path.name}: at 320 tokens cross-entropy {ce[-1]:.4g}, active neurons ")
    assert said[2:] == [f"picture: {picture}", f"figures: {figures}"]
    first, second = json.loads(figures.read_text())["runs"]
    assert first == second
    check_figures(first, last)
    assert picture.read_bytes().startswith(b"\x89PNG")


def check_figures(found, records):
    """Of a run of five steps of 64 tokens, evaluated after two, four and all."""
    steps = [record for record in records if "ce" in record]
    assert (found["steps"], found["tokens_per_step"], found["last"]["steps"]) == (5, 64, 5)
    assert found["config"]["model"]["d_ff"] == 32
    assert found["start"]["processes"] == 1
    assert found["last"]["ce"] == pytest.approx(np.mean([record["ce"] for record in steps]))
    assert found["last"]["l0_per_layer"] == pytest.approx([np.mean([record["l0"] for record in steps])])
    assert found["last"]["dense_share_per_layer"] == [1.0]
    speeds = [record["tokens_per_second"] for record in steps if "tokens_per_second" in record]
    assert found["tokens_per_second"] == pytest.approx(len(speeds) / sum(1 / speed for speed in speeds))
    assert found["plans"] == []
    evaluations = [
        (record["step"], record["evaluation"]["ce"]) for record in records if "evaluation" in record
    ]
    assert [step for step, _ in evaluations] == [2, 4, 5]
    assert [(each["step"], each["ce"]) for each in found["heldout"]] == evaluations
    curve = found["curves"]["cross-entropy"]
    assert curve["tokens"] == [64, 128, 192, 256, 320]
    assert curve["values"] == pytest.approx([record["ce"] for record in steps], rel=1e-5)


def test_wandb_that_is_not_installed_is_one_sentence(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(programs.train(corpus, tmp_path, "--steps", "1", "--wandb", "x")) == 1
    assert "report.wandb needs the package wandb, which is not installed: pip" in capsys.readouterr().err


def test_samples_must_fit_the_context(corpus, tmp_path, capsys):
    words = programs.train(corpus, tmp_path / "run", "--steps", "1", "--samples", "0123456789abcdef")
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "report.samples must leave room in the model's context of 16 tokens; got one of 16" in said
    assert os.listdir(tmp_path / "run") == ["cache"]


def test_plot_names_what_is_no_run(tmp_path, capsys):
    assert cli.main(["plot", str(tmp_path), "--out", "x.png"]) == 1
    assert "must be the work directory of a run; " in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "manifest.json").write_text('{"tokens_per_step": ')
    assert cli.main(["plot", str(tmp_path), "--out", "x.png"]) == 1
    assert "must be the work directory of a run; its manifest.json is no JSON" in capsys.readouterr().err
    manifest = {"tokens_per_step": 8, "config": {"model": {"num_layers": 1, "d_ff": 4}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ce": nul')
    assert cli.main(["plot", str(tmp_path), "--out", "x.png"]) == 1
    assert "must hold a run of at least one step; found none in metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1, "ce": 2.0, "l0": 1.0}\n')
    assert cli.main(["plot", str(tmp_path), "--out", "x.png"]) == 1
    assert re.search(
        r"manifest.json and metrics.jsonl in .* must hold what a run writes; found other fields or types "
        r"\(KeyError: 'dead_per_layer'\): restore the files\n",
        capsys.readouterr().err,
    )
