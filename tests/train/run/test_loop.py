"""A run seen from outside: no recompilation, bad losses, last lines, files."""

import dataclasses
import re

import jax
import pytest
import tiny_runs

from train.config import CheckpointConfig, ReportConfig
from train.errors import UserError
from train.parallel import Layout
from train.run import loop
from train.run.checkpoint_files import complete_steps
from train.run.loop import run
from train.run.metrics import to_record


def test_nothing_is_compiled_after_the_first_step(finished):
    """Nor by a later save or evaluation: the first save is after step 2, the first evaluation
    after step 4."""
    count = finished.compilations
    assert 0 < count[1] == count[2] < count[3] == count[4] < count[5]
    assert {count[step] for step in range(5, tiny_runs.STEPS + 1)} == {count[5]}


def test_run_learns(finished):
    losses = [record["ce"] for record in tiny_runs.read_records(finished.workdir) if "ce" in record]
    assert losses[-1] < losses[0] - 0.5


def test_last_lines_say_where_the_checkpoint_is_and_what_to_type(finished):
    lines = finished.output.splitlines()[-4:]
    assert lines == [
        f"checkpoint: {finished.workdir}",
        "next:",
        f'  sparse-lm generate --checkpoint {finished.workdir} --prompt "The state of the"',
        f"  sparse-lm evaluate --checkpoint {finished.workdir}",
    ]


def test_every_step_is_reported_and_recorded(finished):
    shown = re.findall(r"^step (\d+)/8  ce ", finished.output, re.MULTILINE)
    assert shown == [str(step) for step in range(1, 9)]
    records = tiny_runs.read_records(finished.workdir)
    assert [record["step"] for record in records if "ce" in record] == list(range(1, 9))
    assert [record["step"] for record in records if "evaluation" in record] == [4, 8]


def test_step_that_is_not_finite_stops_the_run(corpus, tmp_path):
    """The rate is 0 at step 1 and absurd at step 2, whose state is finite still; step 3 sees the damage.

    Its loss happens to be finite, its gradient is not: the state after it must not be saved either.
    """
    optimizer = dataclasses.replace(tiny_runs.OPTIMIZER, learning_rate=1e30)
    with pytest.raises(
        UserError, match=r"training stopped at step 3: the loss is \d.* and the gradient norm (nan|inf), "
    ) as error:
        run(
            tiny_runs.tiny_config(corpus, tmp_path, optimizer=optimizer, checkpoint=CheckpointConfig(every=1))
        )
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '2'}: lower" in str(error.value)
    assert complete_steps(tmp_path / "checkpoints") == [1, 2]
    assert [record["step"] for record in tiny_runs.read_records(tmp_path)] == [1, 2]


def test_next_step_is_dispatched_before_the_last_one_is_read(corpus, tmp_path, monkeypatch):
    events: list[str] = []
    compile_step = Layout.compile_step

    def traced(layout, program):
        train_step = compile_step(layout, program)

        def dispatch(state, tokens):
            events.append(f"dispatch {int(jax.device_get(state.step)) + 1}")
            return train_step(state, tokens)

        return dispatch

    def read(step, metrics):
        events.append(f"read {step}")
        return to_record(step, metrics)

    monkeypatch.setattr(Layout, "compile_step", traced)
    monkeypatch.setattr(loop, "to_record", read)
    run(
        tiny_runs.tiny_config(
            corpus,
            tmp_path,
            steps=4,
            checkpoint=CheckpointConfig(every=9),
            report=ReportConfig(evaluate_every=0),
        )
    )
    expected = "dispatch 1, dispatch 2, read 1, dispatch 3, read 2, dispatch 4, read 3, read 4"
    assert ", ".join(events) == expected
