"""One writer at a time in a directory."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from train.errors import UserError


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool) -> Iterator[None]:
    """Holds a directory, which is made if it is not there; a process that dies lets it go.

    Args:
      directory: what to hold.
      wait: for another process that holds it, rather than refuse.

    Raises:
      UserError: another process holds it.
      OSError: it cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError as error:
        raise UserError(
            f"{directory} is being written by another process: wait for it, or choose another directory"
        ) from error
    finally:
        os.close(descriptor)
