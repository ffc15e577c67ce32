"""Everything that a step changes, as one pytree, and the optimizer that changes it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_lm import LayerPlan, SparseLM
from sparse_lm.sparsity import NeuronActivity
from train.config import OptimizerConfig, TrainConfig

Params = Any  # nested dict of arrays, the model's NNX state without its wrappers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint must hold so that a resumed run is the run that was never stopped.

    Attributes:
      params: nested dict of f32 arrays, the master weights.
      buffers: nested dict of what else the model holds (`sparse_lm.model_order.OrderState`); no gradient
        reaches it.
      opt_state: optax's state for ``params``.
      rng: (2,) uint32, data of the key for anything random in a step (fold ``step`` into it before use).
      step: () int32, optimizer steps done.
      activity: for how many tokens each neuron of each layer has been silent.
      l1_coefficient: () f32, λ where it is constant, so that runs of another λ share a compiled step, or
        steered towards a wanted l0.
    """

    params: Params
    buffers: Params
    opt_state: Any
    rng: jax.Array
    step: jax.Array
    activity: NeuronActivity
    l1_coefficient: jax.Array

    @property
    def variables(self) -> Params:
        """All that the model is made of: what evaluation and generation need."""
        return self.params | self.buffers


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a run: what is traced into the step and never changes.

    Attributes:
      config: the run.
      graphdef: the model's structure, split from its parameters once.
      optimizer: AdamW with clipping.
      schedule: step -> learning rate.
      init: () -> TrainState, pure; jit it with the shardings wanted.
    """

    config: TrainConfig
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    init: Callable[[], TrainState]

    def with_plan(self, plan: LayerPlan | None) -> "Program":
        """The same run, its layers in the formats of ``plan``."""
        return dataclasses.replace(self, graphdef=_structure(self.config, plan))

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, at no memory."""
        return jax.eval_shape(self.init)


def build_program(config: TrainConfig) -> Program:
    """Splits the model once and ties it to its optimizer; allocates no parameter."""
    graphdef = _structure(config)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    optimizer = build_optimizer(config.optimizer, schedule)

    def init() -> TrainState:
        init_key, step_key = jax.random.split(jax.random.key(config.seed))
        model = SparseLM(config.model, rngs=nnx.Rngs(init_key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(
            params=params,
            buffers=nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))),
            opt_state=optimizer.init(params),
            rng=jax.random.key_data(step_key),
            step=jnp.zeros((), jnp.int32),
            activity=NeuronActivity.start(config.model.num_layers, config.model.d_ff),
            l1_coefficient=jnp.float32(config.model.sparsity.l1),
        )

    return Program(config, graphdef, optimizer, schedule, init)


def _structure(config: TrainConfig, plan: LayerPlan | None = None) -> nnx.GraphDef:
    model = nnx.eval_shape(lambda: SparseLM(config.model, rngs=nnx.Rngs(0), plan=plan))
    return nnx.split(model)[0]


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine that reaches ``final_fraction`` of the peak at ``steps``."""
    cosine = optax.cosine_decay_schedule(
        config.learning_rate, max(1, steps - config.warmup_steps), alpha=config.final_fraction
    )
    if not config.warmup_steps:
        return cosine
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, cosine], [config.warmup_steps])


def build_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW whose decay touches matrices only (paper's recipe)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule, config.beta1, config.beta2, config.eps,
            weight_decay=config.weight_decay, mask=weight_decay_mask,
        ),
    )  # fmt: skip


def weight_decay_mask(params: Params) -> Any:
    """True where the parameter is a matrix: not a norm's scale, not a bias.

    Names decide and not ranks, because layers under ``scan`` stack a vector into a matrix.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether the path of a parameter, or of the optimizer's moments of it, is a matrix's."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return "norm" not in name and "bias" not in name
