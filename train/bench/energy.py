"""Energy of calls that a GPU runs again and again, from its own energy counter.

The counter moves in steps of some milliseconds. While a call runs without end, a thread reads the counter,
and the power is the energy between the first step that it makes and the last, over the time between them:
where a window begins and ends makes no difference. Energy of a call is that power times the time of a call.
What the GPU takes with the process at rest is measured the same way, and subtracted.
"""

import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

_READ_S = 0.002
_RUN_IN = 0.3  # of a window, before it

Key = TypeVar("Key", bound=Hashable)


class Counter(Protocol):
    """A GPU that counts its joules and tells its clock."""

    def energy_joules(self) -> float: ...

    def sm_mhz(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Power:
    """Mean power between the first and the last step of the counter.

    Attributes:
      watts: energy over time.
      seconds: the time.
      counter_steps: steps of the counter in it.
      sm_mhz: mean clock of the multiprocessors at those steps.
    """

    watts: float
    seconds: float
    counter_steps: int
    sm_mhz: float


@dataclasses.dataclass(frozen=True)
class Energy:
    """Of one call.

    Attributes:
      power: while it runs without end.
      call_ms: milliseconds of a call then.
      calls: in the window.
      joules: of a call, with what the GPU takes at rest subtracted.
      joules_in_all: without.
    """

    power: Power
    call_ms: float
    calls: int
    joules: float
    joules_in_all: float


@dataclasses.dataclass(frozen=True)
class EnergyReport:
    """Of several calls, one after the other.

    Attributes:
      idle: the GPU at rest, before them.
      read_ms: how often the counter was read.
      calls: by name.
    """

    idle: Power
    read_ms: float
    calls: Mapping[Any, Energy]

    def sampling(self) -> str:
        """How it was measured, in one sentence."""
        steps = min(each.power.counter_steps / each.power.seconds for each in self.calls.values())
        shortest = min(each.power.seconds for each in self.calls.values())
        return (
            f"energy by the GPU's own counter, read every {self.read_ms:g} ms, which moved {steps:.0f} times "
            f"a second; windows of {shortest:.1f} s and more; {self.idle.watts:.0f} W at rest are subtracted"
        )


def measure(
    counter: Counter, calls: Mapping[Key, Callable[[], Any]], *, seconds: float, idle_seconds: float = 3.0
) -> EnergyReport:
    """Runs each call for ``seconds`` without end, after a run-in.

    Raises:
      RuntimeError: the counter does not move.
    """
    with _watch(counter) as readings:
        time.sleep(idle_seconds)
    idle = _power(readings)
    found = {}
    for name, call in calls.items():
        _run(call, _RUN_IN * seconds)
        with _watch(counter) as readings:
            count, elapsed = _run(call, seconds)
        power = _power(readings)
        each = elapsed / count
        found[name] = Energy(power, 1e3 * each, count, (power.watts - idle.watts) * each, power.watts * each)
    return EnergyReport(idle, 1e3 * _READ_S, found)


def _run(call: Callable[[], Any], seconds: float) -> tuple[int, float]:
    """Calls without a gap until the time is over, the host one call ahead; how many, and in what time."""
    start = time.perf_counter()
    count, before = 0, call()
    while True:
        count += 1
        following = call()
        jax.block_until_ready(before)
        before = following
        if time.perf_counter() - start >= seconds:
            jax.block_until_ready(following)
            return count + 1, time.perf_counter() - start


class _Reading(NamedTuple):
    seconds: float
    joules: float
    sm_mhz: int


@contextlib.contextmanager
def _watch(counter: Counter) -> Iterator[list[_Reading]]:
    """What is read at every step of the counter, while the context lasts."""
    readings: list[_Reading] = []
    done = threading.Event()

    def read() -> None:
        last = counter.energy_joules()
        while not done.wait(_READ_S):
            joules = counter.energy_joules()
            if joules != last:
                readings.append(_Reading(time.perf_counter(), joules, counter.sm_mhz()))
                last = joules

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        done.set()
        thread.join()


def _power(readings: Sequence[_Reading]) -> Power:
    if len(readings) < 2:
        raise RuntimeError(
            f"the GPU's energy counter must move while it is watched; it moved {len(readings)} times"
        )
    first, last = readings[0], readings[-1]
    seconds = last.seconds - first.seconds
    clock = statistics.mean(reading.sm_mhz for reading in readings)
    return Power((last.joules - first.joules) / seconds, seconds, len(readings) - 1, clock)
