"""One whole tiny run, shared by the tests that look at a run from outside."""

import contextlib
import gc
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_runs

from train.run import background_errors
from train.run.hooks import Hook
from train.run.loop import run

_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Most tests here run the same program, some in processes of their own: it is compiled once for all."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture(scope="session", autouse=True)
def errors_in_the_background() -> Iterator[None]:
    """Tests hold on to errors for longer than the program does, and so to what the errors have cut off."""
    with background_errors.kept_quiet():
        yield
        gc.collect()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tiny_runs.FinishedRun:
    """The run that others are compared with; nobody writes into its workdir."""
    config = tiny_runs.tiny_config(corpus, tmp_path_factory.mktemp("finished"))
    states: dict[int, Any] = {}
    compilations: dict[int, int] = {}
    output = io.StringIO()
    jax.clear_caches()  # a test before may have had a run of the same shapes: its programs are to count too
    with _count_compilations() as events, contextlib.redirect_stdout(output):

        def record(step: int, state: Any) -> None:
            states[step] = tiny_runs.snapshot(state)
            compilations[step] = len(events)

        result = run(config, hooks=(Hook(record, 1),))
    return tiny_runs.FinishedRun(config, result, states, output.getvalue(), compilations)


@contextlib.contextmanager
def _count_compilations() -> Iterator[list[str]]:
    events: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event == _COMPILED:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
