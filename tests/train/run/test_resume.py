"""A run that was stopped, however rudely, and taken up again is the run that was never stopped,
bit for bit."""

import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs

from train.run.checkpoint_files import complete_steps
from train.run.loop import run


def assert_same_run(workdir: Path, last_state, finished: tiny_runs.FinishedRun) -> None:
    """State and the whole history of losses are those of the uninterrupted run;
    so was the order of the data."""
    jax.tree.map(np.testing.assert_array_equal, last_state, finished.states[tiny_runs.STEPS])
    found, expected = tiny_runs.read_records(workdir), tiny_runs.read_records(finished.workdir)
    for record in (*found, *expected):
        record.pop("tokens_per_second", None)
    assert [record for record in found if "ce" in record] == [r for r in expected if "ce" in r]
    assert [record for record in found if "evaluation" in record][-1] == expected[-1]


def wait_for(process, text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"the process ended before it printed {text!r}: {''.join(lines)}")


@pytest.mark.timeout(120)
def test_sigterm_saves_and_the_resumed_run_is_the_same(finished, corpus, tmp_path, capsys):
    process = tiny_runs.start_process(corpus, tmp_path, mode="slow")
    wait_for(process, "step 3/8")
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "SIGTERM: saving after this step" in rest
    stopped_at = complete_steps(tmp_path / "checkpoints")[-1]
    assert f"stopped by a signal after step {stopped_at} of 8" in rest
    assert 3 <= stopped_at < 8

    result, states = tiny_runs.run_recording(tiny_runs.tiny_config(corpus, tmp_path))
    assert result.outcome == "finished"
    assert f"resuming after step {stopped_at} of 8" in capsys.readouterr().out
    assert min(states) == stopped_at + 1
    assert_same_run(tmp_path, states[8], finished)


@pytest.mark.timeout(120)
def test_kill_during_a_save_resumes_from_the_one_before(finished, corpus, tmp_path, capsys):
    process = tiny_runs.start_process(corpus, tmp_path, mode="stuck")
    wait_for(process, "about to commit")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert complete_steps(tmp_path / "checkpoints") == [2]
    assert (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").is_dir()

    _, states = tiny_runs.run_recording(tiny_runs.tiny_config(corpus, tmp_path))
    said = capsys.readouterr().out
    assert "removing what a killed run left of checkpoints: 4.orbax-checkpoint-tmp\n" in said
    assert "ignoring half-written" not in said
    assert list((tmp_path / "checkpoints").glob("*tmp*")) == []
    assert min(states) == 3
    assert_same_run(tmp_path, states[8], finished)
    assert complete_steps(tmp_path / "checkpoints")[-2:] == [6, 8]


def test_finished_run_started_again_does_nothing(finished, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.workdir.rglob("*"))
    result = run(finished.config)
    assert (result.outcome, result.step) == ("already-finished", 8)
    said = capsys.readouterr().out
    assert "this run is finished: 8 of 8 steps are done" in said
    assert said.splitlines()[-4:] == finished.output.splitlines()[-4:]
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.workdir.rglob("*")) == before


def test_more_steps_go_on_from_the_end(finished, corpus, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "copy")
    result, states = tiny_runs.run_recording(tiny_runs.tiny_config(corpus, tmp_path / "copy", steps=9))
    assert (result.step, sorted(states)) == (9, [9])
    steps = [record["step"] for record in tiny_runs.read_records(tmp_path / "copy") if "ce" in record]
    assert steps == list(range(1, 10))
