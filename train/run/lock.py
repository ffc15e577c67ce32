"""One run at a time in a work directory: a lock file that names the run which holds it.

The operating system's record lock on ``<workdir>/run.lock`` decides between processes of one host. It ends
with its process, however that ends, so that what a killed run leaves behind never stands in the way. Other
hosts may see the directory through a network file system that does not carry such locks; for them the holder
touches the file every few seconds, and a file that was touched lately is a run that lives.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from train.errors import UserError

FILE_NAME = "run.lock"
TOUCH_SECONDS = 15.0
SILENT_SECONDS = 120.0  # a holder on another host that touched nothing for so long is dead
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Record locks belong to a process, so they do not tell two runs of one process apart.
_held_here: set[Path] = set()


@dataclasses.dataclass(frozen=True)
class Holder:
    """The run that holds a directory, as its lock file names it.

    Attributes:
      host: name of its machine.
      pid: its process there.
      started: local time with its offset, ISO 8601.
      command: what was typed.
    """

    host: str
    pid: int
    started: str
    command: str

    @classmethod
    def this_process(cls) -> "Holder":
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(socket.gethostname(), os.getpid(), started, shlex.join(sys.argv))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started} as: {self.command}"


class RunLock:
    """Holds a work directory for this process from ``acquire`` to ``release``; makes the directory if need
    be.

    Attributes:
      taken_from: the run that held the directory and died without releasing it, if there was one.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir.expanduser().absolute()
        self._path = self._workdir / FILE_NAME
        self._made: list[Path] = []
        self._file: IO[str] | None = None
        self._ended = threading.Event()
        self.taken_from: Holder | None = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the directory.

        Raises:
          UserError: another run holds it, or it cannot be made or written to.
        """
        if self._path in _held_here:  # opening and closing its file here would let the lock go
            raise self._refusal(Holder.this_process())
        try:
            try:
                self._file = self._make_and_take()
            except FileNotFoundError:  # another run that was refused has just removed what it had made
                self._file = self._make_and_take()
        except OSError as error:
            self._remove_made()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                "workdir must be a directory that can be made and written to; "
                f"{error.filename or self._workdir} cannot ({error.strerror}): choose another with --workdir"
            ) from error
        _held_here.add(self._path)
        threading.Thread(target=self._touch, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Gives the directory back, and removes what only the lock put there."""
        if self._file is None:
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            # While it is still locked: whoever opened it meanwhile notices, and tries again.
            self._path.unlink()
        self._file.close()
        self._file = None
        _held_here.discard(self._path)
        self._remove_made()

    def _make_and_take(self) -> IO[str]:
        self._made = []
        missing = self._workdir
        while not missing.exists() and missing != missing.parent:
            self._made.append(missing)
            missing = missing.parent
        self._workdir.mkdir(parents=True, exist_ok=True)
        return self._take()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # what holds files by now stays
            for directory in self._made:
                directory.rmdir()
        self._made = []

    def _take(self) -> IO[str]:
        """The lock file, locked and with this run's name in it."""
        while True:
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
            try:
                self._claim(file)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                        self._sign(file)
                        return file
            except BaseException:
                file.close()
                raise
            file.close()  # its last holder removed it between opening and locking

    def _claim(self, file: IO[str]) -> None:
        """Returns if no living run holds ``file``, or raises UserError."""
        silent_for = time.time() - os.fstat(file.fileno()).st_mtime
        holder = _read(file)
        has_locks = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(holder) from error
            if error.errno not in _NO_LOCKS_HERE:
                raise
            has_locks = False
        elsewhere = holder is not None and (holder.host != socket.gethostname() or not has_locks)
        if elsewhere and silent_for < SILENT_SECONDS:
            raise self._refusal(holder, f"; if it has died, try again in {SILENT_SECONDS:.0f} seconds")
        self.taken_from = holder

    def _refusal(self, holder: Holder | None, otherwise: str = "") -> UserError:
        return UserError(
            f"{self._workdir} is held by another run ({holder or 'which is just starting'}): wait for it to "
            f"end, or choose another directory with --workdir{otherwise}"
        )

    def _sign(self, file: IO[str]) -> None:
        file.seek(0)
        file.truncate()
        json.dump(dataclasses.asdict(Holder.this_process()), file)
        file.flush()

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _read(file: IO[str]) -> Holder | None:
    """Who signed the file; None for one that is empty or that was cut off while it was written."""
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None
