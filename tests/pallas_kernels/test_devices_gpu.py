"""Several NVIDIA GPUs give what one gives: every format, on the backend that it takes by itself."""

import jax
import pytest
from across_devices import FORMATS, AcrossDevices
from op_checks import Path

from pallas_kernels import FFNOptions, Panel

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


def _path(format):
    layout = Panel(capacity=1.0) if format == "panel" else format
    options = FFNOptions(layout, backend="xla" if format == "dense" else "auto")
    return Path(options, d_model=256, d_ff=1024, many_tokens=8192, dtype="bfloat16")


class TestGPUs(AcrossDevices):
    """2,048 tokens a device at least: ``auto`` is dense under that."""

    paths = {format: _path(format) for format in FORMATS}  # noqa: RUF012 - as the base class declares it
    tokens = 8192

    @pytest.fixture
    def devices(self):
        if jax.device_count() < 2:
            pytest.skip(f"needs at least 2 GPUs; found {jax.device_count()}")
        return jax.devices()[:4]
