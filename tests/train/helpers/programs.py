"""The program as a user starts it, for runs of a few milliseconds a step."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TINY = (
    "--batch-size", "4", "--data.tokenizer", "byte", "--model.vocab-size", "257", "--model.d-model", "16",
    "--model.d-ff", "32", "--model.num-layers", "1", "--model.num-heads", "2", "--model.num-kv-heads", "1",
    "--model.context-length", "16", "--report.evaluate-tokens", "64", "--optimizer.warmup-steps", "1",
)  # fmt: skip


def train(corpus: Path, workdir: Path, *options: str) -> list[str]:
    """The words of ``sparse-lm train`` for a tiny run; what ``options`` repeat is theirs."""
    return ["train", *TINY, "--data.paths", str(corpus), "--workdir", str(workdir), *options]


def xla_flags(devices: int) -> str:
    """The tests' own XLA_FLAGS, which make compilation cheap, with another number of simulated devices: of a
    flag that is given twice, XLA takes the last."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


@contextlib.contextmanager
def signals_of_a_terminal() -> Iterator[None]:
    """What starts in this context takes a hang-up and Ctrl-C as from a terminal: under nohup the one is
    ignored here, in a shell's background the other, and so they would be in what starts here."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def start(words: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The program in a process of its own, with its output in pipes; at the end of the context it is gone,
    also where an assertion failed before it was stopped."""
    with start_python(["-m", "train", *words], **environment) as process:
        yield process


@contextlib.contextmanager
def start_python(words: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`start`, for what ``python`` with ``words`` runs."""
    with signals_of_a_terminal():
        process = subprocess.Popen(
            [sys.executable, "-u", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": xla_flags(devices=1),
                "PYTHONPATH": os.pathsep.join(sys.path),
                **environment,
            },
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


@contextlib.contextmanager
def start_together(
    words: list[str], count: int, *, python: bool = False
) -> Iterator[list[subprocess.Popen[str]]]:
    """`start`, or `start_python`, for the ``count`` processes of one run, of one device each, that find each
    other over loopback."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                (start_python if python else start)(words, **cluster, JAX_PROCESS_ID=str(index))
            )
            for index in range(count)
        ]


def wait_for_line(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines up to the first that has ``text``."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(
        f"the program ended before it printed {text!r}: {''.join(lines)}{process.stderr.read()}"
    )


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)
