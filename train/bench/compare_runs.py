"""The runs that ``sparse-lm compare`` sets against each other: all from one configuration, trained alike."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from pallas_kernels.errors import RequestError
from sparse_lm import model_order
from sparse_lm.config import TokenOrderName
from train.bench import synthetic
from train.config import TrainConfig
from train.parallel import Layout, OrderRefresh
from train.run.metrics import to_record
from train.run.plan import Planner, Terrain
from train.run.planned_step import PlannedStep
from train.state import Program, TrainState, build_program
from train.step import TrainStep

Contestant = Literal["auto", "panel", "hybrid", "twell", "order", "plan"]
Run = Contestant | Literal["dense"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run, a figure a step.

    Attributes:
      loss: CE and L1 term.
      l0: mean over layers of the active neurons per token.
      overflow_share: share of (token, layer) pairs that did not fit the format and were computed densely.
      pairs: (panel, neuron) pairs with an active token, of all layers; 0 where no panels are made or counted.
      token_order: the order in which the feed-forward layers took the tokens.
      plans: of ``plan``, the formats of the layers, by the step from which they ran so; else empty.
    """

    loss: tuple[float, ...]
    l0: tuple[float, ...]
    overflow_share: tuple[float, ...]
    pairs: tuple[int, ...]
    token_order: TokenOrderName
    plans: dict[int, str]


def config_of(name: Run, base: TrainConfig) -> TrainConfig:
    """The run of one contestant; the dense ones take their tokens as they come."""
    model = base.model
    plan: Literal["auto", "off"] = "off"
    ffn, order = model.ffn, model.token_order
    match name:
        case "dense":
            ffn, order = ffn.with_format("dense", "auto"), "text"
        case "order":
            order = "centroids" if order == "text" else order
        case "plan":
            ffn, plan = ffn.with_format("auto", ffn.backend), "auto"
        case _:
            ffn = ffn.with_format(name, ffn.backend)
    return dataclasses.replace(base, plan=plan, model=dataclasses.replace(model, ffn=ffn, token_order=order))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains one contestant from a first state, as often as asked, by the means of a training run.

    Attributes:
      layout: where state and batches live.
      program: the run.
      refresh_order: renews what its token order keeps.
      token_order: the order in which its feed-forward layers take the tokens.
      terrain: what its plans are made for; None for what has no plan.
    """

    layout: Layout
    program: Program
    refresh_order: OrderRefresh
    token_order: TokenOrderName
    terrain: Terrain | None

    @classmethod
    def of(cls, name: Run, base: TrainConfig, nnz: float, layout: Layout) -> "Trainer":
        """Of a contestant whose layers have ``nnz`` active neurons in the first step, 0 for half of all.

        Raises:
          RequestError: it cannot run here, or would be none: no token changes its place, or no plan is made.
        """
        config = config_of(name, base)
        program = build_program(config)
        if nnz:
            program = synthetic.sparse_from_the_start(program, nnz)
        order, terrain = _chosen_order(config), Terrain.of(config)
        if name == "order" and order == "text":
            raise RequestError(_why_no_order(config))
        if name == "plan" and terrain is None:
            raise RequestError(
                "formats: plan needs a device and sizes for which format=auto decides between panels and "
                f"dense; on {jax.devices()[0].device_kind} it does not for {_tokens(config)} tokens, "
                f"D={config.model.d_model} and F={config.model.d_ff}: leave plan out"
            )
        return cls(layout, program, layout.order_refresh(program), order, terrain)

    @property
    def kept_order(self) -> TokenOrderName:
        """The model's option, which decides what its state keeps beside the parameters."""
        return self.program.config.model.token_order

    def compiled_step(self, tokens: jax.typing.ArrayLike) -> jax.stages.Compiled:
        """The step that a run begins with, for what ``layout.place`` returned."""
        program = self.program.with_plan(self.terrain.start) if self.terrain else self.program
        return self.layout.compiled_step(program, tokens)

    def train(
        self,
        compiled: TrainStep,
        state: TrainState,
        batches: Iterable[Any],
        *,
        say: Callable[[Any], None],
    ) -> Curve:
        """All steps, from ``compiled_step``. A planned run reads what a step counts while the next one runs,
        as trainings do; any other reads nothing before its last step has been started.

        Args:
          compiled: what ``compiled_step`` has returned.
          state: the first one; it is donated.
          batches: (B, S + 1) int32 of every step, as ``layout.place`` returns them.
          say: takes what a change of plan should say.
        """
        config = self.program.config
        planner = Planner(self.terrain, config.plan_every) if self.terrain else None
        step = PlannedStep(
            self.layout, self.program, planner, self.terrain.start if self.terrain else None,
            say=say, agree_every=1, compiled=compiled, wait=True,
        )  # fmt: skip
        history: list[Any] = []
        plans: dict[int, str] = {}
        plan = None
        with self.layout.step_scope(), contextlib.closing(step):
            for number, tokens in enumerate(batches, start=1):
                state, metrics = step(number, self.refresh_order(number, state, tokens), tokens)
                if step.plan != plan:
                    plan, plans[number] = step.plan, str(step.plan)
                history.append(metrics)
                # A plan that is proposed here is taken by the next step, if there is one.
                if planner is not None and 1 < number < config.steps:
                    step.observe(to_record(number - 1, history[-2]))
        history = jax.device_get(history)
        rows = config.batch_size * config.model.context_length * config.model.num_layers
        return Curve(
            loss=tuple(float(metrics["loss"]) for metrics in history),
            l0=tuple(float(metrics["l0"]) for metrics in history),
            overflow_share=tuple(float(metrics["overflow_rows"]) / rows for metrics in history),
            pairs=tuple(int(np.sum(metrics["pairs_per_layer"])) for metrics in history),
            token_order=self.token_order,
            plans=plans,
        )


def _tokens(config: TrainConfig) -> int:
    """Of a micro-batch on a device."""
    calls = jax.device_count() * config.optimizer.accumulation
    return config.batch_size // calls * config.model.context_length


def _chosen_order(config: TrainConfig) -> TokenOrderName:
    """The order in which a device takes the tokens of a micro-batch: never ``"auto"``."""
    model = config.model
    order = nnx.eval_shape(lambda: model_order.ModelOrder(model, rngs=nnx.Rngs(0)))
    return order.choose((_tokens(config) // model.context_length, model.context_length))


def _why_no_order(config: TrainConfig) -> str:
    tokens, model = _tokens(config), config.model
    if tokens < (least := model_order.LEAST_TOKENS):
        return (
            f"formats: order needs at least {least} tokens of a micro-batch on each device, fewer are taken "
            f"as they come; got {tokens}: ask for a larger batch-size, or leave order out"
        )
    return (
        f"formats: order needs layers that take tokens in an order; on {jax.devices()[0].device_kind} those "
        f"of model.ffn.format={model.ffn.layout} and model.activation={model.activation} do not with "
        f"model.token-order={model.token_order}: name another order, or leave order out"
    )
