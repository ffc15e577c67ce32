"""What a call costs in energy, by the counter of an NVIDIA GPU."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax

_SECONDS = 0.8  # of calls: the counter moves every 20 to 100 ms


class EnergyCounter:
    """Joules that the first GPU of this process has taken since its driver was loaded.

    Attributes:
      missing: why there is no counter, in one sentence; None if there is one.
    """

    def __init__(self) -> None:
        self.missing: str | None = None
        self._nvml: Any = None
        try:
            import pynvml
        except ModuleNotFoundError:
            self.missing = "energy is read through NVML, whose package is missing: pip install nvidia-ml-py"
            return
        try:
            pynvml.nvmlInit()
            self._device = _first_device(pynvml)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        except pynvml.NVMLError as error:
            self.missing = f"energy is read through NVML, which has no counter here: {error}"
            return
        self._nvml = pynvml

    def joules(self, call: Callable[[], Any]) -> float | None:
        """Of one call, the mean over calls that follow each other for most of a second; what the device takes
        when it is idle is part of it. None without a counter."""
        if self._nvml is None:
            return None
        jax.block_until_ready(call())
        before, start, calls = self._read(), time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS:
            jax.block_until_ready([call() for _ in range(4)])
            calls += 4
        return (self._read() - before) / calls

    def _read(self) -> float:
        return 1e-3 * float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))


def _first_device(nvml: Any) -> Any:
    """The GPU that CUDA numbers 0, which the environment may have chosen."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first or 0))
