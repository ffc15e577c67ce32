"""Energy from a counter that moves in steps, and what is said where there is none."""

import sys
import time
from types import SimpleNamespace

import jax
import pytest

from train.bench import energy, nvml


class Counter:
    """Counts 100 W at rest and 300 W while something runs, in steps of 10 ms."""

    def __init__(self):
        self.watts, self._last, self._joules = 100.0, time.perf_counter(), 0.0

    def energy_joules(self):
        now = time.perf_counter()
        if now - self._last > 0.01:
            self._joules += self.watts * (now - self._last)
            self._last = now
        return self._joules

    def sm_mhz(self):
        return 1500


def test_a_calls_energy_is_its_power_above_rest_times_its_time():
    counter = Counter()

    def call():
        counter.watts = 300.0
        time.sleep(0.004)

    found = energy.measure(counter, {"one": call, "two": call}, seconds=0.3, idle_seconds=0.2)
    assert found.idle.watts == pytest.approx(100, rel=0.05)
    for each in found.calls.values():
        assert each.power.watts == pytest.approx(300, rel=0.05)
        assert each.call_ms >= 4
        assert each.joules == pytest.approx(200 * each.call_ms / 1e3, rel=0.1)
        assert each.joules_in_all == pytest.approx(300 * each.call_ms / 1e3, rel=0.1)
        assert each.power.sm_mhz == 1500
        assert each.calls * each.call_ms >= 300
    assert "100 W at rest are subtracted" in found.sampling()


def test_a_counter_that_stands_still_is_an_error():
    still = SimpleNamespace(energy_joules=lambda: 1.0, sm_mhz=lambda: 0)
    with pytest.raises(RuntimeError, match="counter must move while it is watched; it moved 0 times"):
        energy.measure(still, {}, seconds=0.1, idle_seconds=0.05)


class NVMLError(Exception):
    pass


def library(**changes):
    """What of pynvml is asked, for GPUs named by number and by UUID."""
    answers = {
        "NVMLError": NVMLError, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda number: f"number {number}",
        "nvmlDeviceGetHandleByUUID": lambda name: f"name {name}",
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5000,
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1500 * kind,
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlSystemGetDriverVersion": lambda: b"570.1",
    }  # fmt: skip
    return SimpleNamespace(**answers | changes)


@pytest.fixture
def gpu(monkeypatch):
    """One GPU for JAX, its third."""
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", local_hardware_id=2)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_what_the_gpu_is_found_to_be(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", library())
    found, reason = nvml.find()
    assert reason == ""
    assert found.energy_joules() == 5.0
    assert found.record() == {
        "driver": "570.1", "sm_mhz": 1500, "memory_mhz": 3000, "most_sm_mhz": 1980,
        "power_limit_watts": 700.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, "number 2"), ("4,5,6", "number 6"), ("GPU-a, GPU-b, GPU-c", "name GPU-c")]
)
def test_the_gpu_is_the_one_that_jax_runs_on(gpu, monkeypatch, visible, asked):
    handles = []
    energy_of = lambda handle: handles.append(handle) or 1  # noqa: E731
    monkeypatch.setitem(sys.modules, "pynvml", library(nvmlDeviceGetTotalEnergyConsumption=energy_of))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.find()
    assert handles == [asked]


def test_without_the_package_it_says_how_to_get_it(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found, reason = nvml.find()
    assert found is None
    assert "need the package nvidia-ml-py, which is not installed: pip install 'sparse-lm[nvml]'" in reason


def test_what_nvml_refuses_is_said(gpu, monkeypatch):
    def refuse(handle):
        raise NVMLError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", library(nvmlDeviceGetTotalEnergyConsumption=refuse))
    assert nvml.find() == (None, "energy and clocks need NVML, which answers: Not Supported")


def test_without_a_gpu_there_is_one_sentence():
    assert nvml.find() == (None, "energy and clocks are those of an NVIDIA GPU; this is cpu")
