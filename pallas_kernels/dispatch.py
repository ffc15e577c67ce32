"""Which path runs a call. A predicate with a reason decides, before anything is traced for a device."""

from typing import NamedTuple

from pallas_kernels import device as device_lib
from pallas_kernels.device import Device
from pallas_kernels.formats import MAX_INDEX
from pallas_kernels.options import FFNOptions

_BACKENDS = {"dense": ("xla",), "twell": ("triton", "interpret")}
_MIN_CAPABILITY = 80


class Choice(NamedTuple):
    """The path of one call: what stores the activations, and what runs it."""

    format: str
    backend: str


def unsupported_reason(format: str, backend: str, *, d_ff: int, device: Device) -> str | None:
    """Why ``format`` cannot run on ``backend`` for F = ``d_ff`` on ``device``, in one sentence; None if it can."""
    if format not in _BACKENDS:
        known = " or ".join(map(repr, _BACKENDS))
        return f"format={format!r} has no kernels in this version; choose {known}"
    if backend not in _BACKENDS[format]:
        known = " or ".join(map(repr, _BACKENDS[format]))
        return f"format={format!r} runs on backend {known}; got backend={backend!r}"
    if format == "twell" and d_ff > MAX_INDEX:
        return f"format='twell' names neurons in 16 bits, so F is at most {MAX_INDEX}; got F={d_ff}"
    if backend == "triton" and not (device.is_nvidia and device.capability >= _MIN_CAPABILITY):
        return (
            "backend='triton' needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; "
            f"got {device.kind} ({device.platform}): use format='dense', or backend='interpret' to test"
        )
    return None


def choose(options: FFNOptions, *, d_ff: int) -> Choice:
    """The path for a call with F = ``d_ff``.

    ``format="auto"`` is the dense path: it needs no knowledge of how sparse the activations are, and it is the
    only one that is never slower than dense. A format asked for by name runs, or raises the reason.

    Raises:
      ValueError: the format or the backend asked for cannot run this call here.
    """
    device = device_lib.current()
    format = "dense" if options.format == "auto" else options.format
    backend = options.backend
    if backend == "auto":
        backend = _BACKENDS.get(format, ("auto",))[0]
    reason = unsupported_reason(format, backend, d_ff=d_ff, device=device)
    if reason is not None:
        raise ValueError(reason)
    return Choice(format, backend)
