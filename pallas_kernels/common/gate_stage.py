"""What a gate stage is, and which of its implementations a call takes.

Every sparse format begins with the rectified gates of x (M, D) and w_gate (F, D), packed in the format's own
way. A format has up to three stages that give the same, and the stages behind do not know which one ran:

``mosaic_gpu``: the product of `hopper_gemm` with a packing epilogue, for compute capability 9.0; that of
    `blackwell_gemm`, for 10.0.
``triton``: Triton's product with a packing epilogue.
``xla``: XLA's product, which writes its (M, F) output, and a Triton kernel that reads and packs it.
"""

from typing import Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.common.products import project
from pallas_kernels.device import Device

Packed = TypeVar("Packed", covariant=True)
Shaped = jax.Array | jax.ShapeDtypeStruct
Implementation = Literal["mosaic_gpu", "triton", "xla"]

_HOPPER = 90
_MOST_PRODUCT_BYTES = 4 << 30
_ALIGNMENT = 16
"""Bytes of a load of one thread: rows that are a multiple of them load at full width."""


class GateStage(Protocol[Packed]):
    """The gates of x (M, D) and w_gate (F, D), both of one type, packed."""

    def __call__(self, x: jax.Array, w_gate: jax.Array) -> Packed: ...


def implementation(backend: str, x: Shaped, w_gate: Shaped, device: Device) -> Implementation:
    """The gate stage for x (M, D) and w_gate (F, D) on a call's backend.

    ``"triton"`` takes Triton's own product in two cases. One is 16-bit types on compute capability 8.x. There
    Triton multiplies with the same instructions as XLA's libraries, and the packing kernel's reading of
    (M, F) values, about a tenth of the product's time, would be lost. Since compute capability 9.0 the
    libraries have instructions and copy engines that Triton's product does not keep up with: at M 65,536,
    D 2048 and F 5632 on an H200 it takes 1.2 ms longer, and the packing kernel of PanelELL 0.25. And IEEE
    f32 has no tensor cores: Triton keeps the operands in registers, where a library's product is several
    times as fast. Neither rule was measured on another device.
    The other case is a product of more than 4 GiB, memory that a call of a sparse format should not need.

    ``"interpret"`` takes XLA's product as well, so that what is interpreted is a small kernel.
    """
    if backend == "mosaic_gpu":
        return "mosaic_gpu"
    large = x.shape[0] * w_gate.shape[0] * x.dtype.itemsize > _MOST_PRODUCT_BYTES
    fused = large or (x.dtype.itemsize == 2 and device.capability < _HOPPER)
    return "triton" if fused and backend != "interpret" else "xla"


def xla_product(x: jax.Array, w_gate: jax.Array) -> jax.Array:
    """Rounded gates (M, F') for a packing kernel, F' the next F whose rows keep 16-byte alignment.

    Columns past F mean nothing: an infinite x makes them NaN. Only a weight of another F is copied, F D
    values.
    """
    extra = -w_gate.shape[0] % (_ALIGNMENT // w_gate.dtype.itemsize)
    return project(x, jnp.pad(w_gate, ((0, extra), (0, 0))) if extra else w_gate)
