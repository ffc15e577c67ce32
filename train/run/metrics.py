"""Numbers of a run for machines: JSON lines, TensorBoard, speed, and the share of the device's peak."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from sparse_lm import ModelConfig
from sparse_lm.model import flops_per_token
from train.errors import UserError

FILE_NAME = "metrics.jsonl"
DROPPED_NAME = "metrics.dropped.jsonl"
# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets; the longest match of a name counts.
_PEAKS = {
    "NVIDIA A10G": 70e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}

Record = dict[str, Any]


def to_record(step: int, metrics: Mapping[str, jax.Array]) -> Record:
    """A step's metrics as plain numbers and lists; waits until the step is done."""
    values = jax.device_get(dict(metrics))
    return {"step": step} | {name: np.asarray(value).tolist() for name, value in values.items()}


def is_finite(record: Record) -> bool:
    """False if the loss or its gradient is NaN or infinite:
    the state after this step is then no good either."""
    return all(math.isfinite(record[name]) for name in ("loss", "grad_norm"))


class Sink(Protocol):
    """Takes the records of a run."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` in the workdir, and to TensorBoard event files if asked.

    What an earlier, interrupted run wrote for steps after ``start`` is dropped first, for those steps come
    again; it is added to ``metrics.dropped.jsonl``, since what comes again need not be the same.

    Args:
      workdir: the run's directory.
      start: the step that the run resumes from; 0 for a new one.
      tensorboard: also write event files.
      primary: false for the processes that write nothing.
      sinks: what else gets every record; closed with this.

    Raises:
      UserError: TensorBoard files are wanted and tensorboardX is not installed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        tensorboard: bool,
        primary: bool = True,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._file = self._events = None
        self._sinks = sinks
        if primary:
            workdir.mkdir(parents=True, exist_ok=True)
            if tensorboard:
                self._events = _event_writer(workdir / "tensorboard", start)
            path = workdir / FILE_NAME
            _keep_until(path, start)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends one record, whose ``step`` is an int and whose other values are numbers, lists or dicts."""
        if self._file is not None:
            self._file.write(json.dumps(_json_numbers(record)) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in scalars(record):
                self._events.add_scalar(name, value, record["step"])
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in (self._file, self._events, *self._sinks):
            if sink is not None:
                sink.close()


class Speed:
    """Tokens per second and time to go, without the first step (compilation) and what hooks take.

    Args:
      start: steps done before.
      steps: steps in all.
      tokens_per_step: of the whole batch.
    """

    def __init__(self, *, start: int, steps: int, tokens_per_step: int) -> None:
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._marked_step, self._marked_time = start + 1, math.nan
        self._paused = 0.0
        self._seconds_per_step = math.nan

    def done(self, step: int) -> None:
        """Notes that ``step`` has just ended."""
        if math.isnan(self._marked_time):
            self._marked_step, self._marked_time = step, time.perf_counter()

    def tokens_per_second(self, step: int) -> float | None:
        """Since the last call; None where no whole step lies between."""
        now = time.perf_counter()
        steps, seconds = step - self._marked_step, now - self._marked_time - self._paused
        if steps < 1 or seconds <= 0:
            return None
        self._marked_step, self._marked_time, self._paused = step, now, 0.0
        self._seconds_per_step = seconds / steps
        return self._tokens_per_step / self._seconds_per_step

    def seconds_left(self, step: int) -> float | None:
        """Until the last step, at the pace of the last report."""
        left = (self._steps - step) * self._seconds_per_step
        return None if math.isnan(left) else left

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if not math.isnan(self._marked_time):
                self._paused += time.perf_counter() - began


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None for a device that the table lacks."""
    known = [
        name for name in _PEAKS if device_kind == name or device_kind.startswith((name + " ", name + "-"))
    ]
    return _PEAKS[max(known, key=len)] if known else None


def model_flops_utilisation(config: ModelConfig, tokens_per_second: float) -> float | None:
    """Model FLOPs of dense training over the peak of all devices; None where the peak is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None or config.dtype == "float32":
        return None
    achieved = tokens_per_second * flops_per_token(config, config.context_length)
    return achieved / (peak * jax.device_count())


def _json_numbers(value: Any) -> Any:
    """``value`` with null for what is not finite, for which JSON has no number."""
    if isinstance(value, Mapping):
        return {name: _json_numbers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_until(path: Path, start: int) -> None:
    """Moves records of steps after ``start``, and lines that are no record, as a last one that was cut off,
    to the file of dropped ones."""
    if not path.exists():
        return
    kept: list[bytes] = []
    dropped: list[bytes] = []
    for line in path.read_bytes().splitlines():
        (kept if _is_of_step_until(line, start) else dropped).append(line + b"\n")
    if not dropped:
        return
    with path.with_name(DROPPED_NAME).open("ab") as file:
        file.writelines(dropped)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, path)


def _is_of_step_until(line: bytes, start: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= start)
    except (ValueError, TypeError, KeyError):
        return False


def _event_writer(directory: Path, start: int) -> Any:
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        raise UserError(
            "report.tensorboard needs the package tensorboardX, which is not installed: "
            "pip install 'sparse-lm[tensorboard]', or leave the option out"
        ) from error
    return tensorboardX.SummaryWriter(str(directory), purge_step=start + 1)


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Each number in a record but its step, under a name with slashes."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from scalars({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value
