"""The lines of a run."""

import io
import sys

import pytest
import tiny_runs
from rich.console import Console

from train.run import report
from train.run.report import Reporter, progress_line

RECORD = {"step": 3, "ce": 2.34567, "l1": 0.25, "l0": 16.0, "dead_per_layer": [32, 0], "loss": 2.4}


@pytest.fixture
def config():
    return tiny_runs.tiny_config("none", "some dir")


def test_progress_line_shows_what_is_known(config, monkeypatch):
    assert progress_line(config, RECORD, None, None) == (
        "step 3/8  ce 2.3457  l1 0.25  l0 16.0 (25.0% of 64)  dead 25.0%"
    )
    monkeypatch.setattr(report, "model_flops_utilisation", lambda model, rate: 0.4321)
    assert progress_line(config, RECORD, 12_345.6, 3725.4).endswith(
        "dead 25.0%  12.3k tokens/s  mfu 43.2%  eta 1:02:05"
    )


def test_line_is_plain_and_whole_where_there_is_no_terminal(config):
    output = io.StringIO()
    console = Console(file=output, width=40, highlight=False, soft_wrap=True)
    Reporter(config, console=console).progress(RECORD, tokens_per_second=1e6, seconds_left=1.0)
    assert output.getvalue() == (
        "step 3/8  ce 2.3457  l1 0.25  l0 16.0 (25.0% of 64)  dead 25.0%  1.0M tokens/s  eta 0:00:01\n"
    )


def test_next_commands_quote_the_directory(config):
    output = io.StringIO()
    console = Console(file=output, width=40, highlight=False, soft_wrap=True)
    Reporter(config, console=console).next_commands()
    assert "sparse-lm evaluate --checkpoint 'some dir'\n" in output.getvalue()


@pytest.mark.parametrize(
    ("started", "python", "typed"),
    [
        ("/usr/local/bin/sparse-lm", "/usr/local/bin/python", "sparse-lm"),
        (".venv/bin/sparse-lm", "{here}/.venv/bin/python", ".venv/bin/sparse-lm"),
        ("{here}/.venv/bin/sparse-lm", "{here}/.venv/bin/python", ".venv/bin/sparse-lm"),
        ("/my envs/bin/sparse-lm", "/my envs/bin/python", "'/my envs/bin/sparse-lm'"),
        ("/lib/train/__main__.py", "/usr/local/bin/python", "python -m train"),
        ("/lib/train/__main__.py", "{here}/.venv/bin/python", ".venv/bin/python -m train"),
        ("/lib/pytest/__main__.py", "/usr/local/bin/python", "sparse-lm"),
    ],
)
def test_program_is_named_as_it_was_started(monkeypatch, tmp_path, started, python, typed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [started.format(here=tmp_path)])
    monkeypatch.setattr(sys, "executable", python.format(here=tmp_path))
    monkeypatch.setattr(report.shutil, "which", lambda name: f"/usr/local/bin/{name}")
    assert report.program_as_typed() == typed


def test_other_processes_are_silent(config, capsys):
    Reporter(config, primary=False).say("something")
    assert capsys.readouterr().out == ""
