"""The GEMM on Mosaic GPU with the caller's epilogue, of the device at hand: Hopper's or Blackwell's.

Both give an epilogue 64 rows of a tile at a time, in one layout, and say in a `Place` which rows they are: an
epilogue is written once.
"""

from types import ModuleType

from pallas_kernels.common import blackwell_gemm, hopper_gemm
from pallas_kernels.device import Device


def for_device(found: Device) -> ModuleType:
    """The module whose ``gemm`` and ``stages_for`` are for a device."""
    return blackwell_gemm if found.capability == blackwell_gemm.CAPABILITY else hopper_gemm
