"""Which format each layer should run in, from what the steps count anyway.

A step reports for each layer how many (panel, neuron) pairs were active and how many tokens were computed
densely (`FFNStats`); dense layers count the pairs that they would have had. So the share of the neurons that
a panel activates, its *union*, is known for every layer, and with it what each format would take, in units of
the dense layer's forward and backward:

    dense              1
    panel, union u     0.18 + 0.82 u / (break-even)     0.18 is the gate's
    panel, no room     1.3                              its gate, then the dense layer, block by block

(On one NVIDIA H200, D 2048 and F 5632, panels of a union of 0.11, 0.29, 0.44 and 0.79 took 0.28, 0.45, 0.60
and 0.97.) The break-even is the one that ``format="auto"`` has (`pallas_kernels.panel.config.break_even`),
but no layer probes or decides while it runs. What remains is the panel's own question, whether its lists had
room: one conditional in the forward and one in the backward, whose dense side keeps every result exact.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device, dispatch
from pallas_kernels.options import Auto, Dense, Layout, Panel
from pallas_kernels.panel import config as panel_config
from sparse_lm import LayerPlan
from sparse_lm.config import SILU
from sparse_lm.layer_loop import is_unrolled
from train.config import TrainConfig

_FIXED = 0.18
_NO_ROOM = 1.3
_PER_CAPACITY = 0.1
"""What memory is worth: that of what a dense layer keeps for its backward, in units of its time."""
_PER_SEGMENT = 0.03
"""What compiling one more loop over layers is worth, where layers are loops."""
_HEADROOM = 1.2
"""Room beside what a window needed on average: steps, micro-batches and devices differ."""
_CAPACITIES = (0.125, 0.25, 0.5, 1.0)
"""Few, since the kernels of each are compiled by themselves, which takes some ten seconds; and far apart, so
that activity may move on without another plan."""
_MARGIN = 0.02
_PATIENCE = 2


@dataclasses.dataclass(frozen=True)
class Terrain:
    """What a plan is made for.

    Attributes:
      num_layers, d_ff: L and F.
      tokens: of a step, on all devices.
      panel: P, tokens of a panel.
      panels: of a step, on all devices.
      chunk: what the slots of a panel's list are a multiple of.
      break_even: share of the neurons that a panel activates, up to which it is faster than dense.
      unrolled: whether layers run one after the other, so that each may have a format of its own for nothing;
        else consecutive layers of one format are a loop (`sparse_lm.layer_loop`).
    """

    num_layers: int
    d_ff: int
    tokens: int
    panel: int
    panels: int
    chunk: int
    break_even: float
    unrolled: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> "Terrain | None":
        """Of a run on the devices that there are; None where no plan is wanted, or ``format="auto"`` would
        not decide between panels and dense when it trains."""
        model, devices = config.model, jax.device_count()
        if config.plan == "off" or model.activation == SILU:
            return None
        tokens = config.batch_size * model.context_length
        calls = devices * config.optimizer.accumulation
        x: Any = jax.ShapeDtypeStruct((max(1, tokens // calls), model.d_model), jnp.dtype(model.dtype))
        weight: Any = jax.ShapeDtypeStruct((model.d_ff, model.d_model), x.dtype)
        layout, backend = dispatch.choose(model.ffn, dispatch.Call.of(x, weight))
        if not isinstance(layout, Auto):
            return None
        if backend != "interpret" and x.shape[0] < panel_config.LEAST_PROBED_TOKENS:
            return None  # such a call may run in panels in a forward, and trains densely
        choice = panel_config.choose(x, weight, layout.tokens)
        return cls(
            num_layers=model.num_layers,
            d_ff=model.d_ff,
            tokens=tokens,
            panel=layout.tokens,
            panels=calls * -(-x.shape[0] // choice.panel),
            chunk=choice.chunk,
            break_even=panel_config.break_even(device.current(), backend, gated=model.gated).train,
            unrolled=is_unrolled(model),
        )

    @property
    def per_segment(self) -> float:
        """What it costs that a layer has another format than the one before it."""
        return 0.0 if self.unrolled else _PER_SEGMENT

    @property
    def start(self) -> LayerPlan:
        """All layers dense, which is the fastest as long as nothing is silent."""
        return LayerPlan((Dense(self.panel),) * self.num_layers)

    def saved(self, texts: Sequence[str] | None) -> LayerPlan:
        """The plan that a checkpoint has, where it fits; else the first one."""
        if texts is None or len(texts) != self.num_layers:
            return self.start
        plan = LayerPlan.parse(texts)
        fits = all(isinstance(each, Dense | Panel) and each.tokens == self.panel for each in plan.layouts)
        return plan if fits else self.start


@dataclasses.dataclass(frozen=True)
class Activity:
    """What some steps counted, on average.

    Attributes:
      nnz: (L,) active neurons of a token.
      union: (L,) neurons that a panel activates.
      dense: (L,) share of the tokens that were computed densely.
    """

    nnz: np.ndarray
    union: np.ndarray
    dense: np.ndarray

    @classmethod
    def of(cls, record: Mapping[str, Any], terrain: Terrain) -> "Activity":
        """Of one step, from its metrics."""
        return cls(
            nnz=np.asarray(record["l0_per_layer"]),
            union=np.asarray(record["pairs_per_layer"]) / terrain.panels,
            dense=np.asarray(record["dense_tokens_per_layer"]) / terrain.tokens,
        )

    @classmethod
    def mean(cls, steps: list["Activity"]) -> "Activity":
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.mean([getattr(step, name) for step in steps], axis=0) for name in fields})


def cost(plan: LayerPlan, activity: Activity, terrain: Terrain) -> float:
    """What a plan that ran takes, by what its layers counted: in units of a dense layer."""
    layers = zip(plan.layouts, activity.union / terrain.d_ff, activity.dense, strict=True)
    each = [
        _PER_CAPACITY * _capacity(layout)
        + (1.0 if isinstance(layout, Dense) else (1 - dense) * _panel(union, terrain) + dense * _NO_ROOM)
        for layout, union, dense in layers
    ]
    return sum(each) + terrain.per_segment * len(plan.segments(first_alone=False))


def forecast(plan: LayerPlan, activity: Activity, terrain: Terrain) -> float:
    """What a plan would take that has not run, in the units of `cost`."""
    layers = zip(plan.layouts, activity.union / terrain.d_ff, strict=True)
    each = [_expected(layout, union, terrain) for layout, union in layers]
    return sum(each) + terrain.per_segment * len(plan.segments(first_alone=False))


def best(activity: Activity, terrain: Terrain) -> tuple[LayerPlan, float]:
    """The plan that would take the least with such activity, and what it would take."""
    layouts: list[Layout] = [Dense(terrain.panel), *(Panel(terrain.panel, each) for each in _CAPACITIES)]
    # The cheapest way through the layers so far that ends in each layout.
    paths: dict[Layout, tuple[float, tuple[Layout, ...]]] = {}
    for union in activity.union / terrain.d_ff:
        cheapest, layers = min(paths.values(), key=_first, default=(0.0, ()))
        changed = cheapest + terrain.per_segment, layers
        ways = {layout: min(paths.get(layout, changed), changed, key=_first) for layout in layouts}
        paths = {
            layout: (before + _expected(layout, union, terrain), (*layers, layout))
            for layout, (before, layers) in ways.items()
        }
    total, chosen = min(paths.values(), key=_first)
    return LayerPlan(chosen), total


def _first(path: tuple[float, Any]) -> float:
    return path[0]


def _expected(layout: Layout, union: float, terrain: Terrain) -> float:
    """Of a layer that has not run in this format."""
    room = _capacity(layout)
    memory = _PER_CAPACITY * room
    if isinstance(layout, Dense):
        return 1.0 + memory
    fits = room >= min(1.0, _HEADROOM * union + terrain.chunk / terrain.d_ff)
    return (_panel(union, terrain) if fits else _NO_ROOM) + memory


def _panel(union: float, terrain: Terrain) -> float:
    return _FIXED + (1 - _FIXED) * union / terrain.break_even


def _capacity(layout: Layout) -> float:
    """Share of all (panel, neuron) pairs that it keeps for its backward."""
    return layout.capacity if isinstance(layout, Panel) else 1.0


class Planner:
    """Proposes another plan once it would have been faster by a margin for some windows in a row, in each of
    them about as fast as the best.

    Args:
      terrain: what plans are for.
      window: steps that are averaged.
    """

    def __init__(self, terrain: Terrain, window: int) -> None:
        self.terrain, self._window = terrain, window
        self._refused: set[LayerPlan] = set()
        self.restart()

    def restart(self) -> None:
        """Forgets what another plan's steps counted."""
        self._steps: list[Activity] = []
        self._favoured: LayerPlan | None = None
        self._windows_in_favour = 0

    def refuse(self, plan: LayerPlan) -> None:
        """Never proposes ``plan`` again, which cannot run here."""
        self._refused.add(plan)

    def observe(self, step: Activity, plan: LayerPlan) -> tuple[LayerPlan, Activity] | None:
        """Takes what a step counted that ran ``plan``: another plan that is worth its compilation and the
        activity that speaks for it, or None."""
        self._steps.append(step)
        if len(self._steps) < self._window:
            return None
        activity, self._steps = Activity.mean(self._steps), []
        proposed, expected = best(activity, self.terrain)
        if expected >= (1 - _MARGIN) * cost(plan, activity, self.terrain):
            self._favoured, self._windows_in_favour = None, 0
            return None
        # Early in a training the best plan of a window is not that of the next: none is worth compiling yet.
        settled = self._favoured is not None and (
            self._favoured == proposed
            or forecast(self._favoured, activity, self.terrain) < (1 + _MARGIN) * expected
        )
        self._favoured = proposed
        self._windows_in_favour = self._windows_in_favour + 1 if settled else 1
        if self._windows_in_favour < _PATIENCE or proposed == plan or proposed in self._refused:
            return None
        return proposed, activity
