"""When hooks are due, and what signals do."""

import os
import signal
import subprocess
import sys

import pytest

from train.run.hooks import Hook, StopSignal

STEPS = 7


def called(hook: Hook, *, stop_at: int | None = None) -> list[int]:
    last = stop_at or STEPS
    return [
        step for step in range(1, last + 1) if hook.due(step, last=step == STEPS, stopping=step == stop_at)
    ]


def nothing(step, state) -> None:
    pass


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (Hook(nothing, 3), [3, 6, 7]),
        (Hook(nothing, 7), [7]),
        (Hook(nothing, 3, at_end=False), [3, 6]),
        (Hook(nothing, 0), [7]),
        (Hook(nothing, 0, at_end=False), []),
    ],
)
def test_hook_is_called_every_so_many_steps(hook, expected):
    assert called(hook) == expected


def test_stopping_run_calls_only_what_asks_for_it():
    assert called(Hook(nothing, 2), stop_at=4) == [2]
    assert called(Hook(nothing, 2, on_stop=True), stop_at=5) == [2, 4, 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), number)
        assert stop.reached(2)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == f"{number.name}: saving after this step; once more to exit at once\n"


@pytest.mark.timeout(60)
def test_second_signal_ends_the_process_at_once():
    script = (
        "import time\nfrom train.run.hooks import StopSignal\n"
        "with StopSignal():\n  print('ready', flush=True)\n  time.sleep(1); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "once more to exit at once" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
