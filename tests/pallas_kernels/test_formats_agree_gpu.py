"""The worst patterns of activity for each format, on an NVIDIA GPU: on every backend that the GPU has."""

import pytest
from worst_patterns import check, worst

from pallas_kernels import Auto, FFNOptions, Hybrid, Panel, Twell, device

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

TOKENS, WIDTH = 2048, 384
WORST = worst(TOKENS, WIDTH, panel=128)
_TWELL, _HYBRID, _ROOM = Twell(compression=8), Hybrid(width=8), Panel(capacity=1.0)
OPTIONS = [
    FFNOptions(layout, backend=backend)
    for layout, backend in (
        (_TWELL, "triton"), (_TWELL, "mosaic_gpu"), (_HYBRID, "triton"), (Panel(), "triton"),
        (_ROOM, "triton"), (Panel(), "mosaic_gpu"), (_ROOM, "mosaic_gpu"), (Auto(), "auto"),
    )
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.layout}-{o.backend}")
@pytest.mark.parametrize("pattern", WORST)
def test_worst_patterns(pattern, options):
    if options.backend == "mosaic_gpu" and device.current().capability != 90:
        pytest.skip("needs a Hopper GPU")
    check(WORST[pattern], options, "bfloat16")
