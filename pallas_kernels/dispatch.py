"""Which path runs a call. A predicate with a reason decides, before anything is traced for a device."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device as device_lib
from pallas_kernels.decode import config as decode_configs
from pallas_kernels.device import Device
from pallas_kernels.errors import RequestError
from pallas_kernels.formats import MAX_INDEX
from pallas_kernels.options import Auto, Decode, Dense, FFNOptions, Layout, Panel, Twell
from pallas_kernels.panel import config as panel_configs

_BACKENDS = {
    "dense": ("xla",),
    "twell": ("mosaic_gpu", "triton", "interpret"),
    "panel": ("mosaic_gpu", "triton", "interpret"),
    "hybrid": ("triton", "interpret"),
    "decode": ("triton", "interpret"),
    "auto": ("mosaic_gpu", "triton", "interpret"),
}  # the first that can is "auto"
_MAX_TILE = 256  # the kernels count a tile's non-zeros in bytes
_TRITON_CAPABILITY = 80
_MOSAIC_CAPABILITIES = (90, 100)
_HOPPER = 90  # where Mosaic GPU's kernels were measured


Shaped = jax.Array | jax.ShapeDtypeStruct


class Call(NamedTuple):
    """What of a call's arguments decides which paths can run it.

    Attributes:
      tokens: M; a symbol where the call is exported for any number.
      d_model, d_ff, dtype: D, F and x's type.
    """

    tokens: int
    d_model: int
    d_ff: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, x: Shaped, w_up: Shaped) -> "Call":
        """The call of x (M, D) and a weight (F, D)."""
        tokens, d_model = x.shape
        return cls(tokens, d_model, w_up.shape[0], jnp.dtype(x.dtype))


class Choice(NamedTuple):
    """The path of one call: what stores the activations, and what runs it."""

    layout: Layout
    backend: str


def unsupported_reason(layout: Layout, backend: str, call: Call, device: Device) -> str | None:
    """Why ``layout`` cannot run on ``backend`` for ``call`` on ``device``, in one sentence;
    None if it can."""
    format = layout.name
    if backend not in _BACKENDS[format]:
        return f"format={format!r} runs on backend {_or(_BACKENDS[format])}; got backend={backend!r}"
    if (reason := device_reason(backend, device)) is not None:
        return reason
    if format == "dense":
        return None
    if not isinstance(call.tokens, int):
        return f"format={format!r} needs a number of tokens that is known; got the symbol {call.tokens}"
    if format == "twell" and call.d_ff > MAX_INDEX:
        return f"format='twell' names neurons in 16 bits, so F is at most {MAX_INDEX}; got F={call.d_ff}"
    if isinstance(layout, Twell) and layout.tile > _MAX_TILE:
        return f"format='twell' packs tiles of at most {_MAX_TILE} columns; got tile={layout.tile}"
    if format == "auto" and (reason := _unmeasured_reason(backend, device)) is not None:
        return reason
    if format == "auto" and backend != "interpret":
        if call.dtype.itemsize != 2:
            return f"format='auto' is dense for types without tensor cores; got {call.dtype.name}"
        on_hopper = backend == "mosaic_gpu"
        least = panel_configs.LEAST_UNASKED_TOKENS if on_hopper else panel_configs.LEAST_PROBED_TOKENS
        if call.tokens < least:
            return f"format='auto' is dense on {backend} under {least} tokens; got {call.tokens}"
    if isinstance(layout, Auto) and call.tokens < layout.tokens:
        return f"format='auto' probes panels of {layout.tokens} tokens; got {call.tokens} tokens"
    if backend == "mosaic_gpu":
        # Imported where it runs: it takes a third of a second.
        size = (call.tokens, call.d_model, call.d_ff, call.dtype)
        if isinstance(layout, Auto | Panel):
            from pallas_kernels.panel import pallas_mosaic_gpu as panel_gpu

            return panel_gpu.unsupported_reason(*size, layout.tokens)
        if isinstance(layout, Twell):
            from pallas_kernels.twell import pallas_mosaic_gpu as twell_gpu

            return twell_gpu.unsupported_reason(*size[1:], layout.tile)
    return None


def device_reason(backend: str, device: Device) -> str | None:
    """Why ``backend`` runs nothing on ``device``, in one sentence; None if it runs something."""
    if backend == "triton" and not (device.is_nvidia and device.capability >= _TRITON_CAPABILITY):
        return (
            "backend='triton' needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; "
            f"got {device.kind} ({device.platform}): use format='dense', or backend='interpret' to test"
        )
    if backend == "mosaic_gpu" and not (device.is_nvidia and device.capability in _MOSAIC_CAPABILITIES):
        return (
            "backend='mosaic_gpu' needs an NVIDIA Hopper GPU (compute capability 9.0) or a B200 (10.0); "
            f"got {device.kind} ({device.platform}): use backend='triton' on other NVIDIA GPUs"
        )
    return None


def _unmeasured_reason(backend: str, device: Device) -> str | None:
    """Why neither a format nor a backend of ``"auto"`` takes ``backend`` on ``device``, in one sentence;
    None if they may."""
    if backend == "mosaic_gpu" and device.capability != _HOPPER:
        return (
            "format='auto' and backend='auto' take mosaic_gpu on Hopper alone, where it was measured; "
            f"got {device.kind} ({device.platform}): ask for format='panel' or format='twell' with "
            "backend='mosaic_gpu'"
        )
    return None


def choose(options: FFNOptions, call: Call) -> Choice:
    """The path of a call under its options.

    ``format="auto"`` on an NVIDIA GPU is a program that finds out by itself whether sparsity pays
    (`auto`), and the dense path where that cannot run or would not be worth its probe. A format asked for
    by name runs, on the first backend that can and was measured on the device, or raises the reason; so does
    a backend.

    Raises:
      RequestError: the format or the backend asked for cannot run this call here.
    """
    considered = _consider(options, call)
    for choice, reason in considered:
        if reason is None:
            return choice
    raise RequestError(considered[-1][1])


def explain(
    x: Shaped,
    w_up: Shaped,
    options: FFNOptions = FFNOptions(),  # noqa: B008 - frozen
) -> str:
    """What `sparse_ffn` or `sparse_mlp` would run for x (..., D) and weights like w_up (F, D), and why,
    in a few lines.

    Nothing runs, and nothing is raised for a path that cannot: the reason is part of the answer.
    """
    tokens = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    call, device = Call.of(tokens, w_up), device_lib.current()
    lines = [
        f"{call.tokens} tokens, D={call.d_model}, F={call.d_ff}, {call.dtype.name}, on {device.kind} "
        f"({device.platform}); format='{options.layout}', backend={options.backend!r}"
    ]
    for choice, reason in _consider(options, call):
        name = f"{choice.layout} on {choice.backend}"
        if reason is None:
            return "\n".join([*lines, f"runs {name}: {_meaning(choice, call)}"])
        lines.append(f"not {name}: {reason}")
    return "\n".join([*lines, "raises: nothing that was asked for can run this call"])


def _meaning(choice: Choice, call: Call) -> str:
    layout, meaning = choice.layout, _MEANING[choice.layout.name]
    if not isinstance(layout, Auto):
        return meaning
    from pallas_kernels.panel.unasked import is_unasked

    x = jax.ShapeDtypeStruct((call.tokens, call.d_model), call.dtype)
    w_up = jax.ShapeDtypeStruct((call.d_ff, call.d_model), call.dtype)
    gated, other = (is_unasked(x, w_up, layout, choice.backend, gated=gated) for gated in (True, False))
    if other:
        small = call.tokens < panel_configs.LEAST_PROBED_TOKENS
        return "PanelELL in a forward; where a gradient is taken " + ("the dense layer" if small else meaning)
    if gated:
        return f"PanelELL in a forward of a gated layer; of another, and where a gradient is taken, {meaning}"
    return meaning


_MEANING = {
    "dense": "the layer as XLA compiles it",
    "twell": "the gate packed in tiles, then one pass over its non-zeros",
    "hybrid": "rows of non-zeros with a dense backup, kept between forward and backward",
    "panel": "tensor cores over the neurons that neighbouring tokens share",
    "decode": "the gate's rows, and up and down rows of active neurons alone, read once for a few tokens",
    "auto": (
        "the program itself takes PanelELL where panels of tokens share few enough neurons, dense elsewhere"
    ),
}


def _consider(options: FFNOptions, call: Call) -> list[tuple[Choice, str | None]]:
    """The paths that would be tried, in order, each with the reason why it cannot run, or None."""
    device, layout = device_lib.current(), options.layout
    if options.backend == "auto":
        backends = tuple(b for b in _BACKENDS[layout.name] if b != "interpret")
    else:
        backends = (options.backend,)
    choices = [Choice(layout, backend) for backend in backends]
    if isinstance(layout, Auto):
        dense, on_device = Choice(Dense(), "xla"), (options.backend, device)
        if options.backend in ("auto", "triton") and _few(call, device):
            choices = [Choice(Decode(), "triton"), *choices]
        if options.backend == "xla":
            choices = [dense]
        elif options.backend == "auto" or not (device_reason(*on_device) or _unmeasured_reason(*on_device)):
            choices.append(dense)
    considered = []
    for choice in choices:
        reason = unsupported_reason(*choice, call, device)
        if reason is None and options.backend == "auto":
            reason = _unmeasured_reason(choice.backend, device)
        considered.append((choice, reason))
    return considered


def _few(call: Call, device: device_lib.Device) -> bool:
    """Whether the decode kernels are taken to be the faster ones."""
    if not isinstance(call.tokens, int) or call.dtype.itemsize != 2:
        return False
    return 0 < call.tokens <= decode_configs.auto_tokens(device)


def _or(names) -> str:
    return " or ".join(map(repr, names))
