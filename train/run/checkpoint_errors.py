"""What orbax, TensorStore and the file system raise around a checkpoint, as one sentence each."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from train.errors import UserError, short_reason
from train.lost_process import lost_process
from train.run.checkpoint_files import complete_before


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
            "workdir must be a directory that can be made and written to; "
            f"{error.filename or directory} cannot ({error.strerror}): choose another with --workdir"
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
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_disk_full(error):
            reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
            raise UserError(
                f"the disk is full: {where} had no room for a checkpoint{reason}, earlier ones are intact: "
                "free some space and run the same command again"
            ) from error
        if jax.process_count() > 1 and not isinstance(error, OSError):
            # Processes wait for each other around a save.
            raise lost_process(short_reason(error)) from error
        raise UserError(
            f"{where} must be a directory that can be written to; a checkpoint could not be saved "
            f"({short_reason(error)}), earlier ones are intact: mend that and run the same command again"
        ) from error


@contextmanager
def reading(where: Path) -> Iterator[None]:
    """Turns what a damaged checkpoint makes orbax raise into one sentence, which names the complete one
    before it; the device's faults pass."""
    try:
        yield
    except Exception as error:
        # Orbax wraps some failed reads in a bare Exception. What else is raised, as for want of a device or
        # of memory on it, says nothing of the checkpoint.
        if type(error) is not Exception and not isinstance(
            error, OSError | ValueError | KeyError | TypeError
        ):
            raise
        before, remedy = complete_before(where), "there is none before it to choose"
        if before is not None:
            remedy = (
                f"choose the one before it, {before}, from which training goes on once {where.name} has been "
                f"moved out of {where.parent}"
            )
        raise UserError(
            f"{where} must be a whole checkpoint; found a part of it missing, damaged or of another shape "
            f"({short_reason(error)}); it was left as it is: {remedy}"
        ) from error


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
