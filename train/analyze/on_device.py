"""What the activity means for speed: a layer's time on this device, and what ``format="auto"`` would do."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from pallas_kernels import Auto, FFNOptions, auto, dispatch
from pallas_kernels import device as device_lib
from pallas_kernels.device import Device
from pallas_kernels.panel import config as panel_config
from pallas_kernels.panel.unasked import is_unasked
from train.bench import order_times
from train.bench.order_counts import MakeOrder
from train.bench.order_times import LayerTimes
from train.bench.text_layers import TextLayers

_HOPPER = Device("gpu", "an NVIDIA Hopper GPU", 90, 132)
_BACKEND = "mosaic_gpu"


@dataclasses.dataclass(frozen=True)
class AutoChoice:
    """What a layer's probe decides, call by call.

    Attributes:
      panel_forward: share of the calls in which the forward takes PanelELL, not the dense layer.
      panel_train: the same where a gradient is taken.
    """

    panel_forward: float
    panel_train: float


@dataclasses.dataclass(frozen=True)
class AutoReport:
    """What ``format="auto"`` would do.

    Attributes:
      device: whose break-even shares these are.
      panel_tokens: P of the probe.
      forward_is_asked: false where a forward of a call's tokens is PanelELL whatever a probe would find.
      break_even_forward, break_even_train: share of its neurons up to which a panel is taken.
      layers: one choice each.
      here: what runs a call of these tokens on this machine's device, and why, in a few lines.
    """

    device: str
    panel_tokens: int
    forward_is_asked: bool
    break_even_forward: float
    break_even_train: float
    layers: tuple[AutoChoice, ...]
    here: str


def layer_times(layers: TextLayers, make: MakeOrder, *, call: int) -> tuple[LayerTimes | None, str]:
    """Every layer's forward as ``"panel"``, in the text's order and in another, and dense, on a call of so
    many tokens; and one sentence.

    Without an NVIDIA GPU there are no times, and the sentence says so.
    """
    device = device_lib.current()
    if not device.is_nvidia:
        return None, (
            "Layers were not timed: speed-ups are measured on an NVIDIA GPU, and this analysis ran on "
            f"{device.kind}."
        )
    call = min(call, len(layers.tokens))
    try:
        times = order_times.layer_times(layers, make, format="panel", tokens=call, train=False)
    except ValueError as error:  # no kernel for this GPU, type or size
        return None, f"Layers were not timed: {error}."
    return times, f"Forward of PanelELL beside the dense layer, {call:,} tokens a call, on {device.kind}."


def auto_choices(
    layers: TextLayers,
    make: MakeOrder | None,
    *,
    call: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> AutoReport | None:
    """What each layer's probe decides for the text's calls; None if a call is shorter than a panel.

    The break-even shares are those of this device, and without an NVIDIA GPU those of Hopper.
    """
    options = _auto_options(layers.config.model.ffn_options)
    layout = options.layout
    assert isinstance(layout, Auto)
    call = min(call, len(layers.tokens))
    if call < layout.tokens:
        return None
    device = device_lib.current()
    gated = layers.model.config.gated
    x = jax.ShapeDtypeStruct((call, layers.model.config.d_model), layers.entering(0).dtype)
    w = jax.ShapeDtypeStruct((layers.model.config.d_ff, layers.model.config.d_model), x.dtype)
    if device.is_nvidia:
        chosen = dispatch.choose(options, dispatch.Call.of(x, w))
        backend = chosen.backend if chosen.layout.name == "auto" else _BACKEND
    else:
        device, backend = _HOPPER, _BACKEND
    limits = panel_config.break_even(device, backend, gated=gated)

    @jax.jit
    def probe(x: jax.Array, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
        return auto.pays(x, gate, options, limits.forward), auto.pays(x, gate, options, limits.train)

    calls = [slice(at, at + call) for at in range(0, len(layers.tokens) - call + 1, call)]
    first = layers.entering(0)
    orders = [make(layers.tokens[part], first[part]).order for part in calls] if make else None
    found = []
    for layer in range(layers.num_layers):
        ffn, entering = layers.block(layer).ffn, layers.entering(layer)
        gate = (ffn.w_up if ffn.w_gate is None else ffn.w_gate)[...]
        decisions = []
        for nth, part in enumerate(calls):
            tokens = entering[part] if orders is None else entering[part][orders[nth]]
            decisions.append(jax.device_get(probe(tokens, gate)))
        forward, train = np.mean(np.asarray(decisions, np.float64), axis=0)
        found.append(AutoChoice(float(forward), float(train)))
        on_progress(layer + 1, layers.num_layers)
    here = dispatch.explain(x, w, options)
    return AutoReport(
        device=device.kind,
        panel_tokens=layout.tokens,
        forward_is_asked=not is_unasked(x, w, layout, backend, gated=gated),
        break_even_forward=limits.forward,
        break_even_train=limits.train,
        layers=tuple(found),
        here=here,
    )


def _auto_options(options: FFNOptions) -> FFNOptions:
    """The layer's options with ``format="auto"``, as it is if it has that one."""
    layout = options.layout
    return dataclasses.replace(options, format=layout if isinstance(layout, Auto) else Auto(), backend="auto")
