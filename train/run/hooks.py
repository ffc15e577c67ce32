"""What happens every so many steps or minutes, beside the steps themselves."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Hook:
    """Calls ``action(step, state)`` after every ``every``-th step, once that step is known to be finite.

    Attributes:
      action: must not keep ``state``, whose buffers the next step reuses.
      every: steps between calls; 0 means never on the way.
      clock: also after a step at which so much time has passed; None counts steps alone.
      at_end: also after the last step of a run that was not interrupted.
      on_stop: also after the step at which a signal stops the run.
    """

    action: Callable[[int, TrainState], None]
    every: int
    clock: "Clock | None" = None
    at_end: bool = True
    on_stop: bool = False

    def due(self, step: int, *, last: bool, stopping: bool) -> bool:
        """Whether to call after ``step``; a stopping run calls only what asks for it."""
        if stopping:
            return self.on_stop
        timed = self.clock is not None and self.clock.rings(step)
        return timed or (self.every > 0 and step % self.every == 0) or (last and self.at_end)

    def call(self, step: int, state: TrainState) -> None:
        """The action; its clock then starts anew."""
        self.action(step, state)
        if self.clock is not None:
            self.clock.restart()


class Clock:
    """Tells when an interval has passed, with the same answer in every process.

    Args:
      minutes: the interval; 0 never rings.
      agree_every: where there are several processes, the first one's clock decides, and they ask it only at
        every so manieth step, because asking waits for all of them.
    """

    def __init__(self, minutes: float, *, agree_every: int) -> None:
        self._seconds, self._agree_every = 60 * minutes, agree_every
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def rings(self, step: int) -> bool:
        """Whether the interval has passed since the last restart."""
        if not self._seconds:
            return False
        passed = time.monotonic() - self._began >= self._seconds
        if jax.process_count() == 1:
            return passed
        if step % self._agree_every:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(passed)))


class StopSignal:
    """Turns a first SIGTERM, Ctrl-C or hang-up of the terminal into a request that the loop reads;
    a second one ends the process at once.

    With several processes the one that gets the signal tells the others through JAX's preemption service, so
    that all stop after the same step.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            shared = jax.process_count() > 1
            for number in self._SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup
                if not shared:
                    self._previous[number] = signal.signal(number, self._request)
                elif number != signal.SIGTERM:  # that one JAX's preemption service takes itself
                    self._previous[number] = signal.signal(number, self._forward)
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
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # a terminal that hung up takes no more text
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"{name}: saving after this step; once more to exit at once\n".encode())
