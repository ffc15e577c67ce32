"""The worst patterns of activity for each format, on an NVIDIA GPU: on every backend that the GPU has."""

import pytest
from worst_patterns import check, worst

from pallas_kernels import FFNOptions, device

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

TOKENS, WIDTH = 2048, 384
WORST = worst(TOKENS, WIDTH, panel=128)
OPTIONS = [
    FFNOptions(format, backend, compression=8, width=8, capacity=capacity)
    for format, backend, capacity in (
        ("twell", "triton", 1.0), ("twell", "mosaic_gpu", 1.0), ("hybrid", "triton", 1.0),
        ("panel", "triton", 0.25), ("panel", "triton", 1.0), ("panel", "mosaic_gpu", 0.25),
        ("panel", "mosaic_gpu", 1.0), ("auto", "auto", 1.0),
    )
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.format}-{o.backend}-{o.capacity}")
@pytest.mark.parametrize("pattern", WORST)
def test_worst_patterns(pattern, options):
    if options.backend == "mosaic_gpu" and device.current().capability != 90:
        pytest.skip("needs a Hopper GPU")
    check(WORST[pattern], options, "bfloat16")
