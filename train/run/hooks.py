"""What happens every so many steps, beside the steps themselves."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Hook:
    """Calls ``action(step, state)`` after every ``every``-th step, once that step is known to be finite.

    Attributes:
      action: must not keep ``state``, whose buffers the next step reuses.
      every: steps between calls; 0 means never on the way.
      at_end: also after the last step of a run that was not interrupted.
      on_stop: also after the step at which a signal stops the run.
    """

    action: Callable[[int, TrainState], None]
    every: int
    at_end: bool = True
    on_stop: bool = False

    def due(self, step: int, *, last: bool, stopping: bool) -> bool:
        """Whether to call after ``step``; a stopping run calls only what asks for it."""
        if stopping:
            return self.on_stop
        return (self.every > 0 and step % self.every == 0) or (last and self.at_end)


class StopSignal:
    """Turns a first SIGTERM or Ctrl-C into a request that the loop reads;
    a second one ends the process at once.

    With several processes the one that gets the signal tells the others through JAX's preemption service, so
    that all stop after the same step.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            shared = jax.process_count() > 1
            for number in self._SIGNALS[:1] if shared else self._SIGNALS:
                self._previous[number] = signal.signal(number, self._forward if shared else self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reached(self, step: int) -> bool:
        """Whether to stop after ``step``; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._second_time_at_once(number)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        self._second_time_at_once(number)

    def _second_time_at_once(self, number: int) -> None:
        for handled in self._previous:
            signal.signal(handled, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving after this step; once more to exit at once\n".encode())
