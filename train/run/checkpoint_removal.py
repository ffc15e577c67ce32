"""How a run removes the checkpoints that it no longer keeps.

A removal that a kill cuts off must not leave what looks like a checkpoint that lost a part, whoever damaged
it. So a checkpoint is first moved into ``<workdir>/checkpoints/deleting/``, in one rename, and removed there:
what the run finds in that directory is its own and given up, and may go.
"""

import contextlib
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SUBDIRECTORY = "deleting"


class Removal:
    """Removes in a thread of its own what has been moved into a directory of checkpoints' ``deleting``.

    Args:
      directory: where the steps' directories are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / SUBDIRECTORY
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="removal")
        self._running: Future[None] | None = None

    def found(self) -> list[Path]:
        """The checkpoints that wait for their removal; whatever else lies there is not the run's."""
        if not self._directory.is_dir():
            return []
        return sorted(
            path
            for path in self._directory.iterdir()
            if path.name.isdecimal() and path.is_dir() and not path.is_symlink()
        )

    def begin(self) -> None:
        """Begins to remove what there is. Waits for a removal that still runs."""
        self.wait()
        self._running = self._thread.submit(self._remove)

    def wait(self) -> None:
        """Waits for the removal that runs. Raises the OSError that it ended with."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """`wait`, and lets the thread go."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _remove(self) -> None:
        for path in self.found():
            shutil.rmtree(path)
        with contextlib.suppress(OSError):  # not there, or it holds what is not the run's
            self._directory.rmdir()
