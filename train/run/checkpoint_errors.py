"""What orbax, TensorStore and the file system raise around a checkpoint, as one sentence each."""

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from train.errors import UserError


@contextmanager
def making(directory: Path) -> Iterator[None]:
    """Turns what the file system raises of a directory in the workdir into one sentence; a full disk is left
    to the caller."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"workdir must be a directory that can be made and written to; {directory} cannot "
            f"({error.strerror}): choose another with --workdir"
        ) from error


def check_writable(directory: Path) -> None:
    """Raises the OSError that making or writing to ``directory`` would, without making it."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns what orbax and the file system raise of a save, here or in the background, into one sentence."""
    _silence_what_is_raised_too()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_disk_full(error):
            reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
            raise UserError(
                f"the disk is full: {where} had no room for a checkpoint{reason}, earlier ones are intact: "
                "free some space and run the same command again"
            ) from error
        raise UserError(
            f"{where} must be a directory that can be written to; a checkpoint could not be saved "
            f"({short_reason(error)}), earlier ones are intact: mend that and run the same command again"
        ) from error


@contextmanager
def reading(where: Path) -> Iterator[None]:
    """Turns whatever a damaged checkpoint makes orbax raise, bare ``Exception`` too, into one sentence."""
    _silence_what_is_raised_too()
    try:
        yield
    except jax.errors.JaxRuntimeError:  # the device's fault, not the checkpoint's
        raise
    except Exception as error:
        raise UserError(
            f"{where} must be a whole checkpoint; found a part of it missing, damaged or of another shape "
            f"({short_reason(error)}): move it away, and the one before it is taken"
        ) from error


def _silence_what_is_raised_too() -> None:
    """Keeps tracebacks off the terminal that orbax's background tasks print of errors that it also raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_worth_logging)
    previous = sys.unraisablehook
    if getattr(previous, "__module__", None) == __name__:
        return

    def hook(unraisable: Any) -> None:
        # Reads and writes still under way when the first error ends orbax's event loop: some notice that it
        # is closed, others are cut off (GeneratorExit) when they are collected.
        error = unraisable.exc_value
        if str(error) != "Event loop is closed" and not isinstance(
            getattr(error, "__cause__", None), GeneratorExit
        ):
            previous(unraisable)

    sys.unraisablehook = hook


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drops what orbax logs of exceptions that it also raises, and of checkpoints without a held-out CE."""
    message = record.getMessage()
    if record.name == "asyncio":
        return "exception was never retrieved" not in message
    return not ("orbax" in record.pathname and (record.exc_info or "did not provide metrics" in message))


def short_reason(error: Exception) -> str:
    """One short line of a message that may have many."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:120]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, is a full disk or quota (the C++ writers only say
    so in words)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
