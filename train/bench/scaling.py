"""How a training step scales over the devices of a host: ``sparse-lm bench scaling``.

Weak scaling: every device has the same number of sequences, so that without a cost of its own a step takes
as long on many devices as on one. What it takes longer is what the devices wait for each other: the part of
their exchange that no computation hides (`train.exchange`), and whatever they share of the host. Under ZeRO-1
and FSDP each device also renews fewer weights than one alone, so that the difference may be negative.

The bytes of the exchange are read from the compiled program. `scaling_checks` times tensor parallelism, and
compares the losses of the same batches on different numbers of devices.
"""

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from pallas_kernels.bench.collectives import bytes_by_kind
from pallas_kernels.errors import RequestError
from sparse_lm import ModelConfig
from train.bench import scaling_checks, synthetic
from train.config import OptimizerConfig, ParallelConfig, TrainConfig
from train.config_json import to_dict as config_to_dict
from train.errors import UserError
from train.output import JsonFile, print_table
from train.parallel import Layout
from train.state import Program, build_program

Mode = Literal["data-parallel", "zero1", "fsdp", "pmap"]
PARALLEL: dict[Mode, ParallelConfig] = {
    "data-parallel": ParallelConfig(),
    "zero1": ParallelConfig(shard="zero1"),
    "fsdp": ParallelConfig(shard="fsdp"),
    "pmap": ParallelConfig(mode="pmap"),
}
WARM_UP = 3
_UNCHANGING = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)
_COMPILERS = 4  # at a time: on a GPU each of them takes memory to try out products in
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ScalingOptions:
    """Times the training step of a preset on one device and on several, each with as many sequences.

    Attributes:
      config: the preset whose model it is.
      batch_size: sequences of a step on each device, each of the model's context length.
      devices: numbers of devices, 1 first; by default 1, 2, 4 and so on to all there are.
      modes: how a step spreads over devices, one case each for every number of them.
      nnz: active neurons that each layer has for a token, on average.
      steps: timed steps of a case, after 3 that are not.
      reduce_dtype: in which gradients are summed over devices.
      compiler_options: options of XLA, each ``name=value``, to try what they change.
      tensor_parallel: also time one feed-forward layer whose neurons the devices share.
      tensor_parallel_model: also time the model, without its output head, whose neurons they share.
      loss_steps: also train so many steps on the same batches of ``batch_size`` sequences in all on every
        number of devices, in every mode, and compare the losses.
      json: also write all figures to this file.
      model: sizes and numerics.
      debug: show the traceback of an error.
    """

    model: ModelConfig
    config: str = "1p5b"
    batch_size: int = 8
    devices: tuple[int, ...] = ()
    modes: tuple[Mode, ...] = ("data-parallel", "zero1", "fsdp", "pmap")
    nnz: float = 30.0
    steps: int = 10
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    compiler_options: tuple[str, ...] = ()
    tensor_parallel: bool = False
    tensor_parallel_model: bool = False
    loss_steps: int = 0
    json: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise RequestError(message)

        require(self.steps >= 1, f"steps must be at least 1; got {self.steps}")
        require(self.loss_steps >= 0, f"loss-steps must be at least 0; got {self.loss_steps}")
        require(self.batch_size >= 1, f"batch-size must be at least 1; got {self.batch_size}")
        require(self.nnz > 0, f"nnz must be above 0; got {self.nnz}")
        require(
            not self.devices or self.devices[0] == 1,
            f"devices must begin with 1, which all others are compared with; got "
            f"{' '.join(map(str, self.devices))}",
        )
        for option in self.compiler_options:
            require("=" in option, f"compiler-options must each be name=value; got {option!r}")

    def parallel(self, mode: Mode) -> ParallelConfig:
        return dataclasses.replace(PARALLEL[mode], reduce_dtype=self.reduce_dtype)

    @property
    def xla(self) -> dict[str, str]:
        return dict(option.split("=", 1) for option in self.compiler_options)

    def counts(self) -> tuple[int, ...]:
        """Numbers of devices to run on.

        Raises:
          UserError: more are asked for than there are.
        """
        there = jax.local_device_count()
        if max(self.devices, default=1) > there:
            raise UserError(f"devices must be at most {there}, which are here; got {max(self.devices)}")
        return self.devices or tuple(2**n for n in range(there.bit_length()))


@dataclasses.dataclass(frozen=True)
class Row:
    """What a step was found to take.

    Attributes:
      mode: how it spreads over devices; one device alone is none of these.
      devices: how many.
      samples_ms: milliseconds of each timed step; none where the case failed.
      tokens: of a step, on all devices.
      of_linear: tokens a second, as a share of the devices' number times what one device does.
      waiting_ms: how much longer a step takes than on one device.
      exchanged: bytes that arrive on each device in a step, by ``"kind type"`` of collective.
      program_bytes: what the compiled step holds at once on a device: state, tokens and temporary buffers.
      temporary_bytes: its temporary buffers alone.
      l0: mean active neurons per token over all layers in the last step.
      loss: of the last step.
      failure: why there are no times, in one sentence.
    """

    mode: Mode | None
    devices: int
    tokens: int
    samples_ms: tuple[float, ...] = ()
    of_linear: float | None = None
    waiting_ms: float | None = None
    exchanged: dict[str, int] = dataclasses.field(default_factory=dict)
    program_bytes: int = 0
    temporary_bytes: int = 0
    l0: float | None = None
    loss: float | None = None
    failure: str | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def tokens_per_second(self) -> float | None:
        return 1e3 * self.tokens / self.median_ms if self.median_ms else None

    def beside(self, alone: "Row | None") -> "Row":
        """With what a comparison with one device says."""
        if alone is None or alone.median_ms is None or self.median_ms is None:
            return self
        return dataclasses.replace(
            self, of_linear=alone.median_ms / self.median_ms, waiting_ms=self.median_ms - alone.median_ms
        )

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, the median and the rate, ready for JSON."""
        rates = {"median_ms": self.median_ms, "tokens_per_second": self.tokens_per_second}
        return dataclasses.asdict(self) | rates


def run(options: ScalingOptions, *, console: Console | None = None) -> dict[str, Any]:
    """Times every case, prints a line for each and a table of all, and writes the JSON file asked for.

    Returns:
      Everything measured, as the JSON file has it.

    Raises:
      UserError: there are fewer devices than asked for, or the file cannot be written.
      RequestError: a format cannot run here, or the model cannot have so many active neurons.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    file = JsonFile(options.json)
    counts = options.counts()
    found: dict[str, Any] = {
        "options": config_to_dict(options),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": [],
    }

    def keep(name: str, values: Any, line: str) -> None:
        found[name] = values
        file.write(found)
        console.print(line, markup=False)

    rows: list[Row] = []
    for row in measure(options, counts):
        rows.append(row.beside(rows[0] if rows else None))
        keep("rows", [row.to_dict() for row in rows], _line(rows[-1]))
    sizes = options.model, options.batch_size, options.nnz, options.steps, counts
    if options.tensor_parallel:
        layers: list[dict[str, Any]] = []
        for layer in scaling_checks.tensor_parallel(*sizes):
            layers.append(layer)
            keep("tensor_parallel", layers, scaling_checks.layer_line(layer))
    if options.tensor_parallel_model:
        cases: list[dict[str, Any]] = []
        for case in scaling_checks.tensor_parallel_model(*sizes):
            cases.append(case)
            keep("tensor_parallel_model", cases, scaling_checks.model_line(case))
    if options.loss_steps:
        losses = scaling_checks.compare_losses(
            options.model, options.batch_size, options.loss_steps, counts,
            {mode: options.parallel(mode) for mode in options.modes},
        )  # fmt: skip
        keep("losses", losses, scaling_checks.losses_line(losses))
    print_table(console, table(options, rows))
    return found


def measure(options: ScalingOptions, counts: Sequence[int]) -> Iterator[Row]:
    """Compiles all cases, side by side, then times one after the other."""
    cases: list[tuple[Mode | None, int]] = [(None, 1)]
    cases += [(mode, count) for count in counts if count > 1 for mode in options.modes]
    with ThreadPoolExecutor(_COMPILERS) as pool:
        steps = list(pool.map(lambda case: _compiled(options, *case), cases))
    for case, step in zip(cases, steps, strict=True):
        yield _measured(options, *case, step)
        gc.collect()  # what a step held must be free for the next


def program(options: ScalingOptions, devices: int) -> Program:
    """The run whose step it is, the same initial state for every number of devices."""
    config = TrainConfig(
        steps=WARM_UP + options.steps,
        batch_size=options.batch_size * devices,
        model=options.model,
        optimizer=_UNCHANGING,
    )
    return synthetic.sparse_from_the_start(build_program(config), options.nnz)


def _compiled(options: ScalingOptions, mode: Mode | None, devices: int) -> jax.stages.Compiled | str:
    layout = _layout(options, mode, devices)
    try:
        return layout.compiled_step(program(options, devices), _tokens(options, layout), options.xla)
    except jax.errors.JaxRuntimeError as error:
        return scaling_checks.out_of_memory(error)


def _measured(
    options: ScalingOptions, mode: Mode | None, devices: int, step: jax.stages.Compiled | str
) -> Row:
    row = Row(mode, devices, options.batch_size * devices * options.model.context_length)
    if isinstance(step, str):
        return dataclasses.replace(row, failure=step)
    row = dataclasses.replace(row, exchanged=bytes_by_kind(step.as_text() or "") if devices > 1 else {})
    if memory := step.memory_analysis():
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        row = dataclasses.replace(
            row,
            program_bytes=memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
        )
    try:
        return _timed(options, row, step)
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(row, failure=scaling_checks.out_of_memory(error))


def _timed(options: ScalingOptions, row: Row, step: Any) -> Row:
    layout, build = _layout(options, row.mode, row.devices), program(options, row.devices)
    tokens = _tokens(options, layout)
    with layout.step_scope():
        state = layout.order_refresh(build)(1, layout.compile_init(build)(), tokens)
        samples = []
        for _ in range(WARM_UP + options.steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, tokens))
            samples.append(1e3 * (time.perf_counter() - start))
    metrics = jax.device_get(metrics)
    if not math.isfinite(metrics["loss"]):
        return dataclasses.replace(row, failure=f"its loss is {metrics['loss']}, which must be finite")
    return dataclasses.replace(
        row, samples_ms=tuple(samples[WARM_UP:]), l0=float(metrics["l0"]), loss=float(metrics["loss"])
    )


def _layout(options: ScalingOptions, mode: Mode | None, devices: int) -> Layout:
    return Layout.over_first_devices(options.parallel(mode or "data-parallel"), devices)


def _tokens(options: ScalingOptions, layout: Layout) -> Any:
    return layout.place(synthetic.random_tokens(options.model, options.batch_size * layout.mesh.size))


def _line(row: Row) -> str:
    name = f"{row.devices} devices, {row.mode}" if row.mode else "1 device"
    if row.failure:
        return f"{name}: {row.failure}"
    linear = f", {row.of_linear:.1%} of linear" if row.mode and row.of_linear else ""
    return f"{name}: {row.median_ms:.1f} ms a step, {row.tokens_per_second:,.0f} tokens/s{linear}"


def table(options: ScalingOptions, rows: Sequence[Row]) -> Table:
    """For people: a line a case."""
    table = Table(
        title=f"{options.config}, {options.model.num_layers} layers, {options.batch_size} × "
        f"{options.model.context_length} tokens a device and step, {jax.devices()[0].device_kind}, "
        f"JAX {jax.__version__}"
    )
    table.add_column("devices", justify="right", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    for name in ("ms (low–high)", "tokens/s", "of linear", "waiting ms", "GiB", "temporary", "exchanged"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        time = "failed"
        if row.samples_ms:
            time = f"{row.median_ms:.1f} ({min(row.samples_ms):.1f}–{max(row.samples_ms):.1f})"
        table.add_row(
            str(row.devices),
            row.mode or "alone",
            time,
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "",
            f"{row.of_linear:.1%}" if row.of_linear else "",
            f"{row.waiting_ms:.1f}" if row.waiting_ms is not None else "",
            *(f"{count / _GIB:.2f}" for count in (row.program_bytes, row.temporary_bytes)),
            f"{sum(row.exchanged.values()) / _GIB:.2f}",
        )
    return table
