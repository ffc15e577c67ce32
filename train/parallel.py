"""Where state and batches live: one device, a mesh of them, ``pmap``, or several processes."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.config import ParallelConfig, TrainConfig
from train.errors import UserError, short_reason
from train.exchange import WHOLE, Exchange
from train.gradient import Gradient, make_gradient
from train.lost_process import abort_as_sentence
from train.state import Params, Program, TrainState, is_matrix
from train.step import TrainStep, make_order_refresh, make_train_step

_JOIN_SECONDS = 300
_HEARTBEAT_SECONDS = 40  # after so long without a sign of life, a process counts as lost
OrderRefresh = Callable[[int, TrainState, Any], TrainState]
AXIS = "data"  # the one mesh axis: batches are cut along it, and under ZeRO-1 and FSDP state as well
_SEVERAL_DEVICES = {"xla_gpu_experimental_parallel_collective_overlap_limit": 16}
"""XLA's options for a step of several devices. By default one collective is on its way at a time, each beside
the few kernels that are left to it: a layer's sums are several, and its feed-forward backward hid none."""


def initialize_processes() -> None:
    """Joins the other processes of the run, where the environment says that there are any.

    Slurm and Open MPI are recognised by JAX; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.

    Raises:
      UserError: the three variables are not all set, or are not numbers.
    """
    if jax.distributed.is_initialized():
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    tasks = {os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")}
    if given:
        address, count, index = (os.environ.get(name, "") for name in names)
        if not (address and count.isdecimal() and index.isdecimal()):
            raise UserError(
                f"a run of several processes needs {', '.join(names)} (an address, two numbers); "
                f"got {', '.join(f'{name}={os.environ.get(name)!r}' for name in names)}: "
                "set all three or none"
            )
        _join(address, int(count), int(index))
    elif tasks != {"1"}:
        _join()


def _join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    with abort_as_sentence(
        f"sparse-lm: the first process of the run must answer {f'at {address} ' if address else ''}within "
        f"{_JOIN_SECONDS} seconds, and all others must ask for it; not all did: see that every process runs "
        "and can reach that one"
    ):
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )


def check_devices() -> None:
    """Raises UserError where JAX finds no device of the kind that it is told to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter if the platform is known but has no device
        asked = os.environ.get("JAX_PLATFORMS")
        chosen = f"JAX_PLATFORMS={asked}" if asked else "this installation of JAX"
        reason = f" ({short_reason(error)})" if str(error) else ""
        raise UserError(
            f"{chosen} must name a device that is there; JAX found none{reason}: set JAX_PLATFORMS=cpu to "
            "run without one"
        ) from error


def check_batch(config: TrainConfig) -> None:
    """Raises UserError unless the batch divides over devices and accumulation steps."""
    devices, accumulation = jax.device_count(), config.optimizer.accumulation
    unit = devices * accumulation
    if config.batch_size % unit:
        below = config.batch_size // unit * unit
        choices = f"{below} or {below + unit}" if below else f"{unit}"
        raise UserError(
            f"batch-size must be a multiple of devices × optimizer.accumulation = {devices} × {accumulation} "
            f"= {unit}; got {config.batch_size}: choose {choices}"
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Placement of a run over all devices of all processes.

    Attributes:
      config: what is split.
      mesh: the devices, along ``AXIS``: all of them, except where a benchmark takes fewer.
    """

    config: ParallelConfig
    mesh: Mesh

    @classmethod
    def over_all_devices(cls, config: ParallelConfig) -> "Layout":
        return cls(config, jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,)))

    @classmethod
    def over_first_devices(cls, config: ParallelConfig, count: int) -> "Layout":
        """Over some of the devices of a run of one process."""
        devices = jax.devices()[:count]
        return cls(config, jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The ambient mesh that tells the model's feed-forward layers to run under ``shard_map``."""
        return jax.set_mesh(self.mesh)

    def step_scope(self) -> contextlib.AbstractContextManager[Any]:
        """What surrounds the steps: the mesh, except under ``pmap``, which makes its own."""
        return self.scope() if self.config.mode == "jit" else contextlib.nullcontext()

    def state_shardings(self, abstract: TrainState) -> TrainState:
        """A sharding for each leaf of ``abstract``: ZeRO-1 splits the optimizer's, FSDP
        the parameters' too."""
        shard = self.config.shard
        whole: TrainState = jax.tree.map(lambda leaf: self.replicated, abstract)
        return dataclasses.replace(
            whole,
            params=self._pieces(abstract.params) if shard == "fsdp" else whole.params,
            opt_state=whole.opt_state if shard == "none" else self._pieces(abstract.opt_state),
        )

    def _pieces(self, tree: Any) -> Any:
        """The sharding of each leaf where the devices share parameters, or the moments of them."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._piece_specs(tree))

    def _piece_specs(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda axis: PartitionSpec() if axis == WHOLE else PartitionSpec(*(None,) * axis, AXIS),
            self._dimensions(tree),
        )

    def _dimensions(self, tree: Any) -> Any:
        """For each leaf the dimension that the devices share: of a matrix, the largest that they divide."""

        def dimension(path: tuple[Any, ...], leaf: Any) -> int:
            layers = "blocks" in jax.tree_util.keystr(path)  # each stays whole in its stack
            fits = [axis for axis in range(layers, leaf.ndim) if leaf.shape[axis] % self.mesh.size == 0]
            return max(fits, key=lambda axis: leaf.shape[axis]) if fits and is_matrix(path) else WHOLE

        return jax.tree_util.tree_map_with_path(dimension, tree)

    def compile_init(self, program: Program) -> Callable[[], TrainState]:
        """``program.init``, each leaf made where it will live; runs of another λ share what is compiled."""

        def init(coefficient: jax.Array) -> TrainState:
            return dataclasses.replace(program.init(), l1_coefficient=coefficient)

        compiled = jax.jit(init, out_shardings=self.state_shardings(program.abstract_state()))
        return lambda: compiled(np.float32(program.config.model.sparsity.l1))

    def compile_step(self, program: Program) -> TrainStep:
        """The step over all devices. It takes the state's buffers (donated) and what ``place`` returned."""
        abstract = program.abstract_state()
        if self.config.mode == "pmap":
            gradient = make_gradient(program, self._exchange(program, abstract))
            return self._pmap(make_train_step(program, gradient, axis_name=AXIS))
        shardings = self.state_shardings(abstract)
        return jax.jit(
            make_train_step(
                program,
                self._shared_gradient(program, abstract),
                as_moments=partial(self._as_moments, self._pieces(abstract.params)),
            ),
            in_shardings=(shardings, self.batch),
            out_shardings=(shardings, self.replicated),
            donate_argnums=0,
            compiler_options=self._compiler_options(),
        )

    def _compiler_options(self) -> dict[str, Any]:
        return _SEVERAL_DEVICES if self.mesh.size > 1 else {}

    def _shared_gradient(self, program: Program, abstract: TrainState) -> Gradient:
        """The gradient of a batch that the devices share, each taking its own sequences."""
        if self.mesh.size == 1:
            return make_gradient(program)
        pieces, whole = self._piece_specs(abstract.params), PartitionSpec()
        shard = self.config.shard
        return jax.shard_map(
            make_gradient(program, self._exchange(program, abstract)),
            mesh=self.mesh,
            in_specs=(pieces if shard == "fsdp" else whole, whole, PartitionSpec(AXIS), whole),
            out_specs=(whole if shard == "none" else pieces, whole),
            check_vma=False,  # sums are written out, and interpreted kernels would not pass
        )

    def _exchange(self, program: Program, abstract: TrainState) -> Exchange:
        shard = self.config.shard
        return Exchange(
            AXIS,
            shard,
            self._dimensions(abstract.params),
            jnp.dtype(program.config.model.dtype),
            jnp.dtype(self.config.reduce_dtype),
            every_micro_batch=shard == "fsdp" or program.config.optimizer.accumulation == 1,
        )

    def _as_moments(self, pieces: Params, params: Params) -> Params:
        """Parameters as their moments are split: under ZeRO-1 each device then renews its own pieces, which
        are gathered once."""
        return params if self.config.shard == "none" else jax.lax.with_sharding_constraint(params, pieces)

    def order_refresh(self, program: Program) -> OrderRefresh:
        """``(step, state, tokens) -> state``, for every step from 1 before it runs: renews what the model's
        token order keeps, where there is anything and the step's turn has come. It takes what the step takes.
        """
        if not program.abstract_state().buffers:
            return lambda step, state, tokens: state
        if self.config.mode == "pmap":
            refresh: Any = self._pmap(make_order_refresh(program, AXIS))
        else:
            shardings = self.state_shardings(program.abstract_state())
            refresh = jax.jit(
                make_order_refresh(program),
                in_shardings=(shardings, self.batch),
                out_shardings=shardings,
                donate_argnums=0,
            )
        every = program.config.refresh_order_every
        return lambda step, state, tokens: state if (step - 1) % every else refresh(state, tokens)

    def _pmap(self, function: Callable[..., Any]) -> Any:
        """Of the state, which every device holds (and donates), and of what ``place`` returned."""
        some = None if self.mesh.size == jax.device_count() else list(self.mesh.devices.flat)
        return jax.pmap(function, AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=some)

    def compiled_step(
        self,
        program: Program,
        tokens: jax.typing.ArrayLike,
        compiler_options: Mapping[str, Any] | None = None,
    ) -> jax.stages.Compiled:
        """`compile_step`, compiled ahead for what ``place`` returned;
        programs may be compiled side by side."""
        with self.step_scope():
            step: Any = self.compile_step(program)
            lowered = step.lower(program.abstract_state(), tokens)
            chosen = self._compiler_options() | dict(compiler_options or {})
            compiled: jax.stages.Compiled = lowered.compile(compiler_options=chosen)
            return compiled

    def place(self, tokens: np.ndarray) -> jax.typing.ArrayLike:
        """This process's rows (local B, S + 1) as the step wants them:
        a global array, or one block a device."""
        if self.config.mode == "pmap":
            return tokens.reshape(len(self.mesh.local_devices), -1, tokens.shape[-1])
        return self.place_global(tokens)

    def place_global(self, tokens: np.ndarray) -> jax.Array:
        """This process's rows (local B, S + 1) as its part of one global (B, S + 1) array."""
        return jax.make_array_from_process_local_data(self.batch, tokens)
