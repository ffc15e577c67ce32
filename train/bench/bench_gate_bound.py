"""What a low-precision gate with a proven bound would save in a model: ``sparse-lm bench gate-bound``."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import reference
from pallas_kernels.activations import Rule
from pallas_kernels.errors import RequestError
from train.bench import gate_bounds, order_counts, results
from train.bench.gate_bounds import SCHEMES
from train.bench.text_layers import TextLayers
from train.config_json import to_dict
from train.output import JsonFile, print_table

_FIT_TOKENS = 8192
_CLUSTERS = 64


@dataclasses.dataclass(frozen=True)
class BenchGateBoundOptions:
    """Counts, on a trained model's held-out text, the neurons that a gate in FP8 or int8 with a proven bound
    cannot exclude, and models what a gate stage would take that computes only those in bf16. Nothing is
    timed: it runs on any device.

    Attributes:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      tokens: tokens of a call, for which one order is made: more of them are more alike in a panel.
      panel: tokens of a panel.
      sample: panels of each order that are counted, evenly spread over the call.
      layers: numbers of the layers, from 0 (default: all).
      as_d_model: widen every bound as if D were this: by the square root of their ratio.
      quantise: what the pass that quantises x takes, as a share of the bf16 gate.
      gather_rate: rate of the gathered bf16 product, as a share of the whole one's.
      json: also write all figures to this file.
      debug: show the traceback of an error.
    """

    checkpoint: str
    tokens: int = 16384
    panel: int = 128
    sample: int = 8
    layers: tuple[int, ...] = ()
    as_d_model: int | None = None
    quantise: float = 0.05
    gather_rate: float = 0.7
    json: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "panel", "sample"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.as_d_model is not None and self.as_d_model < 1:
            raise RequestError(f"as-d-model must be at least 1; got {self.as_d_model}")
        if not self.quantise >= 0:
            raise RequestError(f"quantise must be at least 0; got {self.quantise}")
        if not 0 < self.gather_rate <= 1:
            raise RequestError(f"gather-rate must be over 0 and at most 1; got {self.gather_rate}")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one scheme leaves to compute; of the gates themselves, what is active.

    Attributes:
      name: of the scheme.
      candidates: share of all (token, neuron) that are not excluded.
      undecided: share that the bound proves neither inactive nor active.
      union_text: share of the neurons that are candidates of some token of a panel, tokens as they come.
      union_order: the same with alike tokens side by side.
      time_text: modelled time of the gate stage over that of the bf16 gate; None for the gates themselves.
      time_order: likewise.
    """

    name: str
    candidates: float
    undecided: float
    union_text: float
    union_order: float
    time_text: float | None = None
    time_order: float | None = None


def run(options: BenchGateBoundOptions) -> None:
    """Counts and prints, and writes what ``json`` asks for.

    Raises:
      UserError: no such checkpoint, no text, or no place for the file.
      RequestError: no such layer, or a call of less than a panel.
    """
    console, file = Console(highlight=False, soft_wrap=True), JsonFile(options.json)
    layers = TextLayers(options.checkpoint, options.tokens, _FIT_TOKENS)
    wanted = _wanted(options, layers)
    order, places = _places(options, layers)
    config = layers.model.config
    document: dict[str, Any] = {
        "options": to_dict(options),
        **results.machine_record(),
        "step": layers.step,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "tokens": len(layers.tokens),
        "order": order,
        "layers": [],
    }
    console.print(
        f"D {config.d_model}, F {config.d_ff}, {len(layers.tokens):,} tokens; panels of {options.panel}; "
        f"order: {order}\n{_model_sentence(options)}",
        markup=False,
    )
    for layer in wanted:
        rows = count(layers, layer, places, options)
        print_table(console, table(rows, layer, options))
        document["layers"].append({"layer": layer, "rows": [dataclasses.asdict(row) for row in rows]})
        file.write(document)


def _wanted(options: BenchGateBoundOptions, layers: TextLayers) -> list[int]:
    wanted = sorted(set(options.layers)) or list(range(layers.num_layers))
    if wanted[0] < 0 or wanted[-1] >= layers.num_layers:
        raise RequestError(
            f"layers must be from 0 to {layers.num_layers - 1}, which the model has; got "
            f"{', '.join(map(str, wanted))}"
        )
    return wanted


def _places(options: BenchGateBoundOptions, layers: TextLayers) -> tuple[str, np.ndarray]:
    """The order's name, and which tokens are counted: (2, N), whole panels of the text and of the order."""
    panel, whole = options.panel, len(layers.tokens) // options.panel
    if not whole:
        raise RequestError(f"panel must be at most the {len(layers.tokens)} tokens of the call; got {panel}")
    name, make = order_counts.own_order(layers) or _clusters(layers)
    ordered = np.asarray(make(layers.tokens, layers.entering(0)).order)
    sample = min(options.sample, whole)
    chosen = np.arange(sample) * whole // sample
    rows = (chosen[:, None] * panel + np.arange(panel)).reshape(-1)
    return name, np.stack([rows, ordered[rows]])


def _clusters(layers: TextLayers) -> tuple[str, order_counts.MakeOrder]:
    orders = order_counts.forward_orders(layers, (_CLUSTERS,))
    name = f"{_CLUSTERS} clusters of the first layer's input, then id"
    return name, orders[name]


def count(layers: TextLayers, layer: int, places: np.ndarray, options: BenchGateBoundOptions) -> list[Row]:
    """The gates of one layer themselves, then what each scheme leaves of them.

    Args:
      layers: a model and its text.
      layer: which one.
      places: (2, N) tokens, whole panels: as they come, and in the order.
      options: the panel's size and what the model of the time assumes.
    """
    ffn, rule = layers.block(layer).ffn, layers.model.config.ffn_options.rule
    gate = ffn.w_up if ffn.w_gate is None else ffn.w_gate
    x, weight = (
        layers.entering(layer)[places.reshape(-1)].astype(jnp.bfloat16),
        gate[...].astype(jnp.bfloat16),
    )
    active = np.asarray(_active(x, weight, rule))
    wide_x, wide_weight = np.asarray(x, np.float32), np.asarray(weight, np.float32)
    directions = gate_bounds.directions_of(np.asarray(layers.entering(layer, fit=True), np.float32))
    threshold, last = float(np.asarray(rule.threshold, jnp.bfloat16)), rule.last_inactive(jnp.bfloat16)
    rows = [_row("the gates themselves", active, np.zeros_like(active), options)]
    for scheme in SCHEMES:
        low, bound = gate_bounds.approximate(
            scheme, wide_x, wide_weight, panel=options.panel, directions=directions
        )
        if options.as_d_model is not None:
            bound *= math.sqrt(options.as_d_model / x.shape[1])
        left = gate_bounds.candidates(low, bound, threshold)
        assert not np.any(active & ~left), f"{scheme.name}: a bound excludes an active neuron"
        undecided = left & ~gate_bounds.decided_active(low, bound, last)
        row = _row(scheme.name, left, undecided, options)
        d_ff, d_model = weight.shape
        product = scheme.product_time(d_model, d_ff, options.panel)
        rows.append(_with_times(row, product, options))
    return rows


@partial(jax.jit, static_argnames="rule")
def _active(x: jax.Array, weight: jax.Array, rule: Rule) -> jax.Array:
    return rule.active(reference.project(x, weight))


def _row(name: str, left: np.ndarray, undecided: np.ndarray, options: BenchGateBoundOptions) -> Row:
    text, ordered = np.split(left, 2)
    unions = (gate_bounds.mean_union(half, options.panel) for half in (text, ordered))
    return Row(name, float(left.mean()), float(undecided.mean()), *unions)


def _with_times(row: Row, product: float, options: BenchGateBoundOptions) -> Row:
    text, ordered = (
        stage_time(product, union, quantise=options.quantise, gather_rate=options.gather_rate)
        for union in (row.union_text, row.union_order)
    )
    return dataclasses.replace(row, time_text=text, time_order=ordered)


def stage_time(product: float, union: float, *, quantise: float, gather_rate: float) -> float:
    """Time of the gate stage over that of the bf16 gate: quantising x, the low-precision products, and the
    candidates of each panel, a share ``union`` of the neurons, in bf16 at ``gather_rate``."""
    return product + quantise + union / gather_rate


def _model_sentence(options: BenchGateBoundOptions) -> str:
    widened = "" if options.as_d_model is None else f"; bounds as if D were {options.as_d_model}"
    return (
        f"time of the gate stage over the bf16 gate's: the low-precision products, {options.quantise:g} for "
        f"quantising x, the union at {options.gather_rate:g} of the bf16 rate{widened}"
    )


def table(rows: list[Row], layer: int, options: BenchGateBoundOptions) -> Table:
    """For people: a row a scheme."""
    found = Table(title=f"layer {layer}: shares of (token, neuron), of the neurons of a panel, modelled time")
    found.add_column("scheme")
    for name in ("candidates", "undecided", "union: text", "union: order", "time: text", "time: order"):
        found.add_column(name, justify="right")
    for row in rows:
        shares = (row.candidates, row.undecided, row.union_text, row.union_order)
        times = ("" if time is None else f"{time:.2f}" for time in (row.time_text, row.time_order))
        found.add_row(row.name, *(f"{share:.1%}" for share in shares), *times)
    return found
