"""What a step takes of a device's memory, known from its compiled program before the first one runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from train.config import TrainConfig
from train.errors import UserError
from train.parallel import Layout
from train.state import Program

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device.

    Attributes:
      state: parameters, optimizer and the tokens of the step: what enters it.
      temporary: activations, gradients and all else that the step makes.
      limit: what the device gives to this process; None where it does not say, as a CPU.
    """

    state: int
    temporary: int
    limit: int | None

    @classmethod
    def of(cls, step: jax.stages.Compiled, limit: int | None) -> "StepMemory | None":
        """Of a compiled step; None where the compiler does not say."""
        memory = step.memory_analysis()
        if memory is None:
            return None
        made = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        return cls(int(memory.argument_size_in_bytes), int(made), limit)

    @property
    def total(self) -> int:
        return self.state + self.temporary

    @property
    def fits(self) -> bool:
        """Whether the device has room for it, as far as is known."""
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" of {_gib(self.limit)}"
        parts = f"state {_gib(self.state)}, temporary {_gib(self.temporary)}"
        return f"{_gib(self.total)}{limit} on a device ({parts})"

    def check(self, config: TrainConfig) -> None:
        """Raises UserError if the step does not fit, with what would make it smaller."""
        if self.fits:
            return
        raise UserError(
            f"a step must fit into the memory that a device gives; it would take {self}: "
            f"{' or '.join(_remedies(config))}"
        )


def device_limit() -> int | None:
    """Bytes that a device gives to this process, if it says so."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def step_memory(layout: Layout, program: Program, limit: int | None) -> StepMemory | None:
    """Of the step that ``layout`` compiles for ``program``; None where the compiler does not say.

    The step itself is compiled again, or rather taken from where compiled programs are kept.
    """
    config = program.config
    shape = config.batch_size, config.model.context_length + 1
    if config.parallel.mode == "pmap":
        local = np.zeros((config.batch_size // jax.process_count(), shape[1]), np.int32)
        tokens = jax.eval_shape(lambda: jnp.asarray(layout.place(local)))
    else:
        tokens = jax.ShapeDtypeStruct(shape, np.int32)
    return StepMemory.of(layout.compiled_step(program, tokens), limit)


def _remedies(config: TrainConfig) -> list[str]:
    """Options that lower a step's memory, the one that costs least first."""
    devices = jax.device_count()
    rows = config.batch_size // devices
    now = rows // config.optimizer.accumulation
    found = []
    if smaller := max((n for n in range(1, now) if rows % n == 0), default=0):
        found.append(f"set --parallel.batch-per-device {smaller} (now {now})")
    if config.model.remat == "none":
        found.append("set --model.remat full")
    if devices > 1 and config.parallel.mode == "jit" and config.parallel.shard != "fsdp":
        found.append("set --parallel.shard fsdp")
    return found or ["take a smaller model or context"]


def _gib(count: int) -> str:
    return f"{count / _GIB:.3g} GiB"
