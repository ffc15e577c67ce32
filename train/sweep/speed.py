"""How fast the rows of a sweep are with sparse layers, beside dense ones in the same process."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from pallas_kernels.bench import timing
from pallas_kernels.options import Format
from sparse_lm import ModelConfig, SparsityConfig
from train import parallel
from train.bench import nvml
from train.bench.energy import measure as measure_energy
from train.config import OptimizerConfig, ParallelConfig, TrainConfig
from train.state import Params, Program, build_program

DENSE: Literal["dense"] = "dense"
_COMPILERS = 4  # at a time: on a GPU each of them takes memory to try out products in
_ROUNDS = 3
_CHAIN_MS = 40.0
_ENERGY_SECONDS = 1.0  # some tens of the counter's steps
_UNCHANGING = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one format takes.

    Attributes:
      forward_ms: samples of a forward of the model without its output head.
      train_ms: samples of a training step on one micro-batch, its optimizer included.
      train_bytes: temporary memory of that step, as its compiler plans it.
      forward_joules: energy of the forward, with what the device takes at rest subtracted; None without
        a counter.
    """

    forward_ms: tuple[float, ...]
    train_ms: tuple[float, ...]
    train_bytes: int
    forward_joules: float | None


@dataclasses.dataclass(frozen=True)
class Speed:
    """Costs of one row's model by format, ``"dense"`` among them.

    Attributes:
      device: what it was measured on.
      forward_tokens, train_tokens: tokens of a forward and of a step.
    """

    device: str
    forward_tokens: int
    train_tokens: int
    costs: dict[str, Cost]

    @property
    def sparse_formats(self) -> list[str]:
        """The formats that stand beside the dense one."""
        return [name for name in self.costs if name != DENSE]

    def forward(self, format: str) -> float:
        """How many times as fast as dense."""
        return _median(self.costs[DENSE].forward_ms) / _median(self.costs[format].forward_ms)

    def train(self, format: str) -> float:
        """How many times as fast as dense."""
        return _median(self.costs[DENSE].train_ms) / _median(self.costs[format].train_ms)

    def memory(self, format: str) -> float:
        """Temporary memory of a training step as a share of dense."""
        return self.costs[format].train_bytes / max(1, self.costs[DENSE].train_bytes)

    def energy(self, format: str) -> float | None:
        """Energy of a forward as a share of dense."""
        joules, dense = self.costs[format].forward_joules, self.costs[DENSE].forward_joules
        return joules / dense if joules and dense else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Speed":
        """The inverse of ``dataclasses.asdict``, for what went through JSON."""
        costs = {
            name: Cost(
                tuple(c["forward_ms"]), tuple(c["train_ms"]), c["train_bytes"], c["forward_joules"]
            )
            for name, c in values["costs"].items()
        }  # fmt: skip
        return cls(**{**values, "costs": costs})


class SpeedTest:
    """Compiled programs of one shape of model; weights are their arguments.

    Args:
      model: rows that differ from it in their training alone share its programs.
      formats: sparse ones.
      forward: (N, C + 1) int32, tokens of a forward and one more in each row.
      train: the same of a training step's micro-batch.

    Attributes:
      no_energy: why there is no energy, in one sentence; empty if there is.

    Raises:
      ValueError: a format cannot run here.
    """

    def __init__(
        self, model: ModelConfig, formats: Sequence[Format], forward: np.ndarray, train: np.ndarray
    ) -> None:
        self._layout = parallel.Layout.over_all_devices(ParallelConfig())
        self._forward_tokens = self._layout.place_global(forward[:, :-1])
        self._train_tokens = self._layout.place_global(train)
        self._gpu, self.no_energy = nvml.find()
        names: list[Format] = [DENSE, *(format for format in formats if format != DENSE)]
        self._programs = {name: build_program(_run_of(model, name, len(train))) for name in names}
        self._inits = {name: self._layout.compile_init(build) for name, build in self._programs.items()}
        with ThreadPoolExecutor(_COMPILERS) as pool:
            steps = pool.map(self._compile_step, self._programs.values())
            forwards = pool.map(self._compile_forward, self._programs.values())
            self._steps = dict(zip(names, steps, strict=True))
            self._forwards = dict(zip(names, forwards, strict=True))

    def measure(self, variables: Params) -> Speed:
        """Times the model with the weights of a checkpoint, formats taking turns."""
        forwards = {
            name: partial(forward, self._own(name, variables), self._forward_tokens)
            for name, forward in self._forwards.items()
        }
        with self._layout.scope():
            forward_times = timing.measure(forwards, rounds=_ROUNDS, chain_ms=_CHAIN_MS)
            joules = self._joules(forwards)
            steps = {name: self._step(name, variables) for name in self._steps}
            train_times = timing.measure(steps, rounds=_ROUNDS, chain_ms=_CHAIN_MS)
        return Speed(
            device=jax.devices()[0].device_kind,
            forward_tokens=int(self._forward_tokens.size),
            train_tokens=int(self._train_tokens[:, :-1].size),
            costs={
                name: Cost(
                    forward_times[name].samples_ms,
                    train_times[name].samples_ms,
                    timing.temporary_bytes(step),
                    joules.get(name),
                )
                for name, step in self._steps.items()
            },
        )

    def _joules(self, calls: Mapping[Format, Callable[[], Any]]) -> dict[Format, float]:
        """Energy of a call; empty without a counter that moves."""
        if self._gpu is None:
            return {}
        try:
            report = measure_energy(self._gpu, calls, seconds=_ENERGY_SECONDS, idle_seconds=_ENERGY_SECONDS)
        except RuntimeError as error:
            self.no_energy = str(error)
            return {}
        return {name: energy.joules for name, energy in report.calls.items()}

    def _own(self, name: Format, variables: Params) -> Params:
        """What this format's model has of them: a dense one keeps no order of tokens."""
        names = self._programs[name].abstract_state().variables
        return jax.device_put({name: variables[name] for name in names}, self._layout.replicated)

    def _step(self, name: Format, variables: Params) -> Callable[[], Any]:
        """A call that takes a step; each takes the state that the one before left, and changes no weight."""
        step, state = self._steps[name], self._inits[name]()
        # Steps reuse their state's buffers, and each format needs its own.
        own = jax.tree.map(lambda leaf: leaf.copy(), self._own(name, variables))
        state = dataclasses.replace(
            state,
            params={name: own[name] for name in state.params},
            buffers={name: own[name] for name in state.buffers},
        )

        def call() -> Any:
            nonlocal state
            state, metrics = step(state, self._train_tokens)
            return metrics

        return call

    def _compile_step(self, program: Program) -> Any:
        return self._layout.compiled_step(program, self._train_tokens)

    def _compile_forward(self, program: Program) -> Any:
        def forward(variables: Params, tokens: jax.Array) -> jax.Array:
            return nnx.merge(program.graphdef, variables).hidden_states(tokens)[0]

        variables = program.abstract_state().variables
        with self._layout.scope():
            in_shardings = self._layout.replicated, self._layout.batch
            compiled: Any = jax.jit(forward, in_shardings=in_shardings)
            return compiled.lower(variables, self._forward_tokens).compile()


def shape_of(model: ModelConfig) -> ModelConfig:
    """The model without what makes no difference to its programs."""
    return dataclasses.replace(model, sparsity=SparsityConfig())


def _run_of(model: ModelConfig, format: Format, batch_size: int) -> TrainConfig:
    backend = "auto" if format == DENSE else model.ffn.backend
    ffn = model.ffn.with_format(format, backend)
    order = "text" if format == DENSE else model.token_order
    return TrainConfig(
        steps=1000,
        batch_size=batch_size,
        model=dataclasses.replace(model, ffn=ffn, token_order=order),
        optimizer=_UNCHANGING,
    )


def _median(samples: Sequence[float]) -> float:
    return statistics.median(samples)
