"""Two NVIDIA GPUs that share the arrays of one call: every way to split it, with the kernels of a GPU.

What crosses devices is counted on simulated ones: for GPUs, XLA joins and widens collectives as it likes.
"""

import jax
import pytest
from jax.sharding import AxisType
from on_meshes import modes, run

from pallas_kernels import FFNOptions, Panel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("mode", modes(2))
@pytest.mark.parametrize("format", ["dense", "hybrid", Panel(tokens=16, capacity=1.0)], ids=str)
def test_two_gpus(format, mode, kind):
    if jax.device_count() < 2:
        pytest.skip(f"needs at least 2 GPUs; found {jax.device_count()}")
    run(FFNOptions(format=format), modes(2)[mode], kind, jax.devices()[:2], traffic=False)
