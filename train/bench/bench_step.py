"""What a training step of a whole model costs with the sparse kernels: ``sparse-lm bench step``.

Every pair of a format and a remat policy is one case: the step that ``train`` runs, on one micro-batch of
random tokens. Each layer has the same chosen number of active neurons a token, from the first step to the
last: initial weights make it so (`synthetic.sparse_from_the_start`), and a learning rate too small to change
a weight keeps it so. The number that the timed steps then count, l0, is reported beside their times.

Memory is what the compiled program holds at once: the state, which it updates in place, its tokens, and its
temporary buffers, which is where formats and policies differ. With ``--peaks`` every case has a process of
its own, whose allocator says the most that it ever held.
"""

import dataclasses
import gc
import math
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels.bench import timing
from pallas_kernels.errors import RequestError
from sparse_lm import ModelConfig
from sparse_lm.config import RematPolicy
from train import parallel
from train.bench import results, synthetic
from train.bench.contestants import Contestant, model_of
from train.config import OptimizerConfig, ParallelConfig, TrainConfig
from train.errors import UserError
from train.output import print_table
from train.state import Program, build_program

Record = dict[str, Any]

WARM_UP = 3
_UNCHANGING = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)
_COMPILERS = 4  # at a time: on a GPU each of them takes memory to try out products in


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchStepOptions:
    """Times training steps of a preset, and says what memory they take, sparse formats against the dense one.

    Attributes:
      config: the preset whose model it is.
      batch_size: sequences of the micro-batch, each of the model's context length.
      formats: how the feed-forward layers store activations, one case each; silu is dense layers with SiLU
        in place of the model's activation.
      remats: what the backward recomputes, one case each.
      nnz: active neurons that each layer has for a token, on average.
      steps: timed steps of a case, after 3 that are not.
      peaks: run each case in a process of its own and report its allocator's peak; on a GPU only.
      common: what all benchmarks of models have.
      model: sizes and numerics; ``formats`` and ``remats`` stand in for its own choices.
    """

    config: str = "0p5b"
    batch_size: int = 8
    formats: tuple[Contestant, ...] = ("dense", "auto", "panel", "hybrid")
    remats: tuple[RematPolicy, ...] = ("none", "full", "sparse")
    nnz: float = 45.0
    steps: int = 10
    peaks: bool = False
    common: Annotated[results.CommonOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=results.CommonOptions
    )
    model: ModelConfig

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RequestError(f"batch-size must be at least 1; got {self.batch_size}")
        if self.steps < 1:
            raise RequestError(f"steps must be at least 1; got {self.steps}")
        if not self.formats or not self.remats:
            raise RequestError("formats and remats must each name at least one; got none")
        if not self.nnz > 0:
            raise RequestError(f"nnz must be above 0; got {self.nnz}")


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to time."""

    format: Contestant
    remat: RematPolicy

    def __str__(self) -> str:
        return f"{self.format}, remat {self.remat}"

    def program(self, options: BenchStepOptions) -> Program:
        """The run whose step it is.

        All cases of the same options and the same order of tokens have the same initial state.
        """
        model = dataclasses.replace(model_of(options.model, self.format), remat=self.remat)
        config = TrainConfig(
            steps=WARM_UP + options.steps, batch_size=options.batch_size, model=model, optimizer=_UNCHANGING
        )
        return synthetic.sparse_from_the_start(build_program(config), options.nnz)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a case was found to take.

    Attributes:
      case: format and remat policy.
      device: what it ran on.
      samples_ms: milliseconds of each timed step; none where the case failed.
      program_bytes: what the compiled step holds at once on a device: state, tokens and temporary buffers.
      temporary_bytes: its temporary buffers alone.
      peak_bytes: the most that a process of its own held on its first device; None if not asked for.
      l0_per_layer: mean active neurons per token of each layer in the last step.
      overflow_share: share of (token, layer) pairs that did not fit the format and were computed densely.
      failure: why there are no times, in one sentence.
    """

    case: Case
    device: str
    samples_ms: tuple[float, ...] = ()
    program_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    l0_per_layer: tuple[float, ...] = ()
    overflow_share: float | None = None
    failure: str | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, a name and the median, ready for JSON."""
        values = dataclasses.asdict(self)
        return {"name": str(self.case), **values.pop("case"), "median_ms": self.median_ms, **values}


def run(options: BenchStepOptions, *, console: Console | None = None) -> list[Row]:
    """Times every case, prints a line for each and a table of all, and writes the JSON file asked for.

    Raises:
      UserError: the batch does not divide over the devices, or the file cannot be written.
      RequestError: a format cannot run here, or the model cannot have so many active neurons.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    file = options.common.open_files()
    cases = [Case(format, remat) for remat in options.remats for format in options.formats]
    rows: list[Row] = []
    document: dict[str, Any] = {}
    for row, record in _alone(options, cases) if options.peaks else _here(options, cases):
        rows.append(row)
        document = to_dict(options, rows, record)
        file.write(document)
        console.print(_line(row), markup=False)
    print_table(console, table(options, rows))
    options.common.print_against(console, document)
    return rows


def _here(options: BenchStepOptions, cases: Sequence[Case]) -> Iterator[tuple[Row, Record]]:
    """Measures all cases in this process; each with what it ran on."""
    for row in measure(options, cases):
        yield row, results.machine_record()


def _alone(options: BenchStepOptions, cases: Sequence[Case]) -> Iterator[tuple[Row, Record]]:
    """Measures each case in a fresh process. This one never touches the device, whose memory they need."""
    record: Record = {}
    for case in cases:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                row, record = pool.submit(_peak, options, case).result()
            except BrokenProcessPool:
                row = Row(case, "unknown", failure="its process died: out of the host's memory, most likely")
            yield row, record


def _peak(options: BenchStepOptions, case: Case) -> tuple[Row, Record]:
    try:
        (row,) = measure(options, [case])
    except RequestError as error:
        raise UserError(str(error)) from error
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is None:
        raise UserError(f"--peaks needs a device that counts its memory; {row.device} does not: leave it out")
    return dataclasses.replace(row, peak_bytes=statistics["peak_bytes_in_use"]), results.machine_record()


def measure(options: BenchStepOptions, cases: Sequence[Case]) -> Iterator[Row]:
    """Compiles all cases, side by side, then times one after the other in this process."""
    layout = parallel.Layout.over_all_devices(ParallelConfig())
    programs = [case.program(options) for case in cases]
    parallel.check_batch(programs[0].config)
    tokens = layout.place(synthetic.random_tokens(options.model, options.batch_size))
    inits = {
        order: layout.compile_init(build)
        for order, build in {program.config.model.token_order: program for program in programs}.items()
    }

    def compile_step(program: Program) -> Any:
        try:
            return layout.compiled_step(program, tokens)
        except jax.errors.JaxRuntimeError as error:
            return results.out_of_memory(error)

    with ThreadPoolExecutor(_COMPILERS) as pool:
        steps = list(pool.map(compile_step, programs))
    for case, program, step in zip(cases, programs, steps, strict=True):
        row = Row(case, jax.devices()[0].device_kind)
        if isinstance(step, str):
            yield dataclasses.replace(row, failure=step)
            continue
        row = dataclasses.replace(
            row, program_bytes=results.program_bytes(step), temporary_bytes=timing.temporary_bytes(step)
        )
        try:
            state = inits[program.config.model.token_order]()
            state = layout.order_refresh(program)(1, state, tokens)
            row = _time(row, step, state, tokens, options)
        except jax.errors.JaxRuntimeError as error:
            row = dataclasses.replace(row, failure=results.out_of_memory(error))
        gc.collect()  # what a failed step held must be free for the next
        yield row


def _time(row: Row, step: Any, state: Any, tokens: Any, options: BenchStepOptions) -> Row:
    steps = _Steps(step, state, tokens)
    timed = timing.one_by_one(steps, warm_up=WARM_UP, samples=options.steps)
    metrics = jax.device_get(steps.metrics)
    if not math.isfinite(metrics["loss"]):
        return dataclasses.replace(row, failure=f"its loss is {metrics['loss']}, which must be finite")
    pairs = options.batch_size * options.model.context_length * options.model.num_layers
    return dataclasses.replace(
        row,
        samples_ms=timed.samples_ms,
        l0_per_layer=tuple(map(float, metrics["l0_per_layer"])),
        overflow_share=float(metrics["overflow_rows"]) / pairs,
    )


class _Steps:
    """Step after step: each takes the state that the one before has left."""

    def __init__(self, step: Any, state: Any, tokens: Any) -> None:
        self._step, self._state, self._tokens = step, state, tokens
        self.metrics: Any = None

    def __call__(self) -> Any:
        self._state, self.metrics = self._step(self._state, self._tokens)
        return self._state, self.metrics


def _line(row: Row) -> str:
    result = row.failure or f"{row.median_ms:.1f} ms a step"
    return f"{row.case}: {result}"


def table(options: BenchStepOptions, rows: Sequence[Row]) -> Table:
    """For people: a line a case, each beside the dense case of the same remat policy."""
    table = Table(
        title=f"{options.config}, {options.model.num_layers} layers, {options.batch_size} × "
        f"{options.model.context_length} tokens a step, {rows[0].device}, JAX {jax.__version__}"
    )
    for name in ("remat", "format"):
        table.add_column(name, no_wrap=True)
    for name in ("ms (low–high)", "of dense", "MiB", "temporary", "peak", "l0", "overflow"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = {row.case.remat: row.median_ms for row in rows if row.case.format == "dense"}
    for row in rows:
        median, beside = row.median_ms, dense.get(row.case.remat)
        time = "failed" if row.failure else ""
        if median is not None:
            time = f"{median:.1f} ({min(row.samples_ms):.1f}–{max(row.samples_ms):.1f})"
        table.add_row(
            row.case.remat,
            row.case.format,
            time,
            f"{median / beside:.2f}" if median and beside else "",
            *map(results.mebibytes, (row.program_bytes, row.temporary_bytes, row.peak_bytes)),
            f"{statistics.mean(row.l0_per_layer):.1f}" if row.l0_per_layer else "",
            "" if row.overflow_share is None else f"{row.overflow_share:.1%}",
        )
    return table


def to_dict(options: BenchStepOptions, rows: Sequence[Row], record: Record) -> dict[str, Any]:
    """Everything of a run on the machine of ``record``, samples included, ready for JSON."""
    return results.document(
        options,
        [row.to_dict() for row in rows],
        record,
        tokens_per_step=options.batch_size * options.model.context_length,
    )
