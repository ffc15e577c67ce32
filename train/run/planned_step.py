"""The step of a run that chooses its layers' formats: another is compiled beside it and taken when ready."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.table import Table

from sparse_lm import LayerPlan
from train.errors import UserError, short_reason
from train.parallel import Layout
from train.run.metrics import Record, is_finite
from train.run.plan import Activity, Planner
from train.run.program_exit import COMPILING
from train.run.step_memory import StepMemory, device_limit
from train.state import Program, TrainState
from train.step import Metrics, TrainStep

_PENDING, _READY, _FAILED = range(3)
_SWITCH_INTERVAL = 2e-4
"""Seconds after which a thread that traces a plan yields to the running loop. The loop asks for the
interpreter some dozens of times a step, and by Python's default waits 5 ms each time."""


class PlannedStep:
    """Calls like a train step; `observe` takes what it counts.

    Which plan a step runs depends on when a compilation ends, and changes no result but for the order of
    sums.

    Args:
      layout: where state and batches live.
      program: the run.
      planner: proposes plans; None leaves the model's format as it is.
      plan: the first plan, where there is a planner.
      say: takes what the run's output should say.
      agree_every: where there are several processes, they ask each other at every so manieth step whether all
        have compiled a plan.
      compiled: the step of ``plan``, where it is compiled already.
      wait: whether a step waits for a plan that is being compiled, so that the step that takes it is the same
        in every run of one command.

    Attributes:
      plan: the formats that the next step runs in; None without a planner.
    """

    def __init__(
        self,
        layout: Layout,
        program: Program,
        planner: Planner | None,
        plan: LayerPlan | None,
        *,
        say: Callable[[Any], None],
        agree_every: int,
        compiled: TrainStep | None = None,
        wait: bool = False,
    ) -> None:
        self._layout, self._program, self._planner = layout, program, planner
        self._say, self._agree_every, self._wait = say, agree_every, wait
        self.plan = plan if planner else None
        self._step: Any = compiled or layout.compile_step(
            program.with_plan(self.plan) if self.plan else program
        )
        self._before, self._since = self.plan, 0  # the plan before, and the first step of this one
        self._tokens: Any = None
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix=COMPILING)
        self._next: tuple[LayerPlan, Future[Any]] | None = None

    def __call__(self, step: int, state: TrainState, tokens: Any) -> tuple[TrainState, Metrics]:
        """The step number ``step``, by the plan that is the newest to be ready."""
        self._tokens = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
        if self._next is not None:
            self._take(step, *self._next)
        return self._step(state, tokens)

    def observe(self, record: Record) -> Record:
        """Takes the metrics of a step, and begins to compile another plan if they ask for one.

        Returns:
          The metrics and, of a planned run, ``union_per_layer``, the neurons that a panel activates, and
          ``plan``, the formats that the step ran in.
        """
        plan = self.plan if record["step"] >= self._since else self._before
        if self._planner is None or plan is None:
            return record
        step = Activity.of(record, self._planner.terrain)
        record = record | {"union_per_layer": step.union.tolist(), "plan": str(plan)}
        # Where a step went wrong gates are NaN, which activate nothing: no plan follows that.
        if self._next is not None or plan is not self.plan or not is_finite(record):
            return record
        if (found := self._planner.observe(step, plan)) is not None:
            proposed, activity = found
            self._say(f"step {record['step']}: compiling other formats for the layers: {proposed}")
            self._say(table(proposed, activity))
            self._next = proposed, self._compiler.submit(self._compile, proposed)
        return record

    def close(self) -> None:
        """Gives up the compilation that runs, without waiting for it."""
        self._next = None
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _compile(self, plan: LayerPlan) -> Any:
        """The step of a plan.

        Raises:
          UserError: the device has no room for it. Once it had begun it would have taken the state's buffers.
        """
        with _yielding():
            compiled = self._layout.compiled_step(self._program.with_plan(plan), self._tokens)
        if (limit := device_limit()) is not None:
            memory = StepMemory.of(compiled, limit)
            if memory is not None and not memory.fits:
                raise UserError(f"a step would take {memory}")
        return compiled

    def _take(self, step: int, plan: LayerPlan, compiled: Future[Any]) -> None:
        """Takes a plan that all processes have ready, and drops one that any of them cannot run."""
        assert self._planner is not None
        status = self._status(step, compiled)
        if status == _PENDING:
            return
        self._next = None
        self._planner.restart()
        error = compiled.exception() if compiled.done() else None
        if status == _FAILED:
            self._planner.refuse(plan)
            reason = f" ({short_reason(error)})" if isinstance(error, Exception) else ""
            self._say(f"step {step}: the layers keep their formats; the others cannot run here{reason}")
            return
        self._before, self._since = self.plan, step
        self.plan, self._step = plan, compiled.result()
        self._say(f"step {step}: layers run as {plan}")

    def _status(self, step: int, compiled: Future[Any]) -> int:
        """The same answer in every process."""
        status = _PENDING
        if self._wait or compiled.done():  # the exception is there when the compilation has ended
            status = _READY if compiled.exception() is None else _FAILED
        if jax.process_count() == 1:
            return status
        if step % self._agree_every:
            return _PENDING
        everyone = multihost_utils.process_allgather(np.asarray(status))
        return _FAILED if (everyone == _FAILED).any() else int(everyone.min())


@contextlib.contextmanager
def _yielding() -> Iterator[None]:
    """Threads take short turns."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def table(plan: LayerPlan, activity: Activity) -> Table:
    """For people: each layer's format and the activity that speaks for it."""
    rows = Table()
    for name in ("layer", "format", "nnz", "union", "dense tokens"):
        rows.add_column(name, justify="left" if name == "format" else "right")
    each = zip(plan.layouts, activity.nnz, activity.union, activity.dense, strict=True)
    for layer, (layout, nnz, union, dense) in enumerate(each):
        rows.add_row(str(layer), str(layout), f"{nnz:.1f}", f"{union:.0f}", f"{dense:.0%}")
    return rows
