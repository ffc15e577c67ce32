"""Which path runs a call. A predicate with a reason decides, before anything is traced for a device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device as device_lib
from pallas_kernels.device import Device
from pallas_kernels.formats import MAX_INDEX
from pallas_kernels.options import FFNOptions

_BACKENDS = {
    "dense": ("xla",),
    "twell": ("mosaic_gpu", "triton", "interpret"),
    "panel": ("mosaic_gpu", "triton", "interpret"),
}  # the first that can is "auto"
_MAX_TILE = 256  # the kernels count a tile's non-zeros in bytes
_TRITON_CAPABILITY = 80
_MOSAIC_CAPABILITY = 90


class Call(NamedTuple):
    """What of a call's arguments decides which paths can run it."""

    tokens: int
    d_model: int
    d_ff: int
    dtype: jnp.dtype
    tile: int
    panel: int = 128

    @classmethod
    def of(cls, x: jax.Array, w_up: jax.Array, options: FFNOptions) -> "Call":
        """The call of x (M, D) and a weight (F, D)."""
        tokens, d_model = x.shape
        return cls(tokens, d_model, w_up.shape[0], jnp.dtype(x.dtype), options.tile, options.panel)


class Choice(NamedTuple):
    """The path of one call: what stores the activations, and what runs it."""

    format: str
    backend: str


def unsupported_reason(format: str, backend: str, call: Call, device: Device) -> str | None:
    """Why ``format`` cannot run on ``backend`` for ``call`` on ``device``, in one sentence; None if it can."""
    if backend not in _BACKENDS[format]:
        return f"format={format!r} runs on backend {_or(_BACKENDS[format])}; got backend={backend!r}"
    if format == "twell" and call.d_ff > MAX_INDEX:
        return f"format='twell' names neurons in 16 bits, so F is at most {MAX_INDEX}; got F={call.d_ff}"
    if format == "twell" and call.tile > _MAX_TILE:
        return f"format='twell' packs tiles of at most {_MAX_TILE} columns; got tile={call.tile}"
    if backend == "triton" and not (device.is_nvidia and device.capability >= _TRITON_CAPABILITY):
        return (
            "backend='triton' needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; "
            f"got {device.kind} ({device.platform}): use format='dense', or backend='interpret' to test"
        )
    if backend == "mosaic_gpu":
        if not (device.is_nvidia and device.capability == _MOSAIC_CAPABILITY):
            return (
                "backend='mosaic_gpu' needs an NVIDIA Hopper GPU (compute capability 9.0); "
                f"got {device.kind} ({device.platform}): use backend='triton' on other NVIDIA GPUs"
            )
        # Imported where it runs: it takes a third of a second.
        size = (call.tokens, call.d_model, call.d_ff, call.dtype)
        if format == "panel":
            from pallas_kernels.panel import pallas_mosaic_gpu as panel_gpu

            return panel_gpu.unsupported_reason(*size, call.panel)
        from pallas_kernels.twell import pallas_mosaic_gpu as twell_gpu

        return twell_gpu.unsupported_reason(*size, call.tile)
    return None


def choose(options: FFNOptions, call: Call) -> Choice:
    """The path of a call under its options.

    ``format="auto"`` is the dense path: it needs no knowledge of how sparse the activations are, and it is the
    only one that is never slower than dense. A format asked for by name runs, on the first backend that can, or
    raises the reason; so does a backend.

    Raises:
      ValueError: the format or the backend asked for cannot run this call here.
    """
    device = device_lib.current()
    format = "dense" if options.format == "auto" else options.format
    candidates: tuple[str, ...] = (options.backend,)
    if options.backend == "auto":
        candidates = tuple(b for b in _BACKENDS[format] if b != "interpret")
    reasons = [unsupported_reason(format, backend, call, device) for backend in candidates]
    for backend, reason in zip(candidates, reasons, strict=True):
        if reason is None:
            return Choice(format, backend)
    raise ValueError(reasons[-1])


def _or(names) -> str:
    return " or ".join(map(repr, names))
