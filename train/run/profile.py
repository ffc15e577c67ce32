"""Records a window of a run's steps with JAX's profiler."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

DIRECTORY = "profile"


class ProfileWindow:
    """Traces steps ``first`` to ``last`` into a directory, and none where ``steps`` is None.

    The trace begins before step ``first`` is dispatched and ends once step ``last`` has run on the device, or
    with the run. Perfetto, XProf and TensorBoard read it.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path) -> None:
        self._steps, self._directory = steps, directory
        self._tracing = False

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Comes before a step is dispatched."""
        if self._steps is not None and not self._tracing and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, outputs: Any) -> None:
        """Comes after a step is dispatched, with what it returns."""
        if self._tracing and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(outputs)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
