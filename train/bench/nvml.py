"""The counters of an NVIDIA GPU itself, through NVML: energy, clocks, driver.

They need the package nvidia-ml-py (``pip install 'sparse-lm[nvml]'``) and NVIDIA's driver. Where either is
missing, `find` says so in one sentence and benchmarks leave out what they would have shown.
"""

import os
from typing import Any

import jax

_INSTALL = "pip install 'sparse-lm[nvml]'"


class Gpu:
    """One GPU, as NVML sees it; from `find`."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._nvml, self._handle = library, handle

    def energy_joules(self) -> float:
        """What the GPU has used since its driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def sm_mhz(self) -> int:
        """Clock of the multiprocessors now."""
        return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def record(self) -> dict[str, Any]:
        """Driver, clocks in MHz and the power limit in watts as they are now, ready for JSON."""
        nvml = self._nvml
        driver = nvml.nvmlSystemGetDriverVersion()
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "sm_mhz": self.sm_mhz(),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_MEM),
            "most_sm_mhz": nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM),
            "power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3,
        }


def find() -> tuple[Gpu | None, str]:
    """The GPU that JAX's first device is; or None, and one sentence on why there are no counters of it."""
    device = jax.local_devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return None, f"energy and clocks are those of an NVIDIA GPU; this is {device.device_kind}"
    try:
        import pynvml as library
    except ModuleNotFoundError:
        return None, f"energy and clocks need the package nvidia-ml-py, which is not installed: {_INSTALL}"
    try:
        library.nvmlInit()
        gpu = Gpu(library, _handle(library, device))
        gpu.energy_joules(), gpu.record()
    except library.NVMLError as error:
        return None, f"energy and clocks need NVML, which answers: {error}"
    return gpu, ""


def _handle(library: Any, device: jax.Device) -> Any:
    """Of JAX's device, whose number counts the GPUs that CUDA_VISIBLE_DEVICES lists."""
    number = str(getattr(device, "local_hardware_id", 0) or 0)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[int(number)] if int(number) < len(visible) else number
    if name.isdecimal():
        return library.nvmlDeviceGetHandleByIndex(int(name))
    return library.nvmlDeviceGetHandleByUUID(name)
