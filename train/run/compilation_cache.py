"""Compiled programs, kept on disk from run to run: a second start does not compile again."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from train.errors import UserError

OFF = "off"


@contextlib.contextmanager
def kept(asked: str) -> Iterator[None]:
    """Keeps what is compiled inside, as ``TrainConfig.compilation_cache`` asks.

    Raises:
      UserError: the directory asked for cannot be made.
    """
    before = _get()
    _set(asked != OFF and before[0], _directory(asked, before[1]))
    try:
        yield
    finally:
        _set(*before)


def where() -> str | None:
    """The directory that compiled programs are kept in now; None if they are not."""
    enabled, directory = _get()
    return directory if enabled else None


def _directory(asked: str, present: str | None) -> str | None:
    """Where to: what is asked for, else what JAX has been told, else the user's cache, for GPUs alone.

    What is compiled for a CPU may need instructions that another host of the same home directory lacks.
    """
    if asked == OFF:
        return present
    if not asked and (present or jax.default_backend() == "cpu"):
        return present
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    directory = Path(asked or caches / "sparse-lm" / "compiled").expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not asked:
            return None  # a home directory that is not there, or not ours, stops no run
        raise UserError(
            f"compilation-cache must name a directory that can be made; got {asked}: {error.strerror}"
        ) from error
    return str(directory)


def _get() -> tuple[bool, str | None]:
    config: Any = jax.config
    return config.jax_enable_compilation_cache, config.jax_compilation_cache_dir


def _set(enabled: bool, directory: str | None) -> None:
    if (enabled, directory) != _get():
        jax.config.update("jax_enable_compilation_cache", enabled)
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()  # JAX looks at these once, when it first compiles
