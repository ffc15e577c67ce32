"""What the forward of a whole model costs with sparse layers: ``sparse-lm bench model``.

The core is timed, embedding to last norm, without the output head: on one micro-batch, with weights in the
compute type, and with dense layers beside the sparse ones in the same run. Contestants take turns
(`timing.measure`). A dense contestant counts nothing; a sparse one returns its statistics, as it always does.

Activity is synthetic, ``--nnz`` active neurons a token in every layer (`synthetic`), or that of a checkpoint
on its own text (``--checkpoint``).
"""

import dataclasses
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels import dispatch
from pallas_kernels.bench import machine, timing
from pallas_kernels.bench.timing import Call, Ceilings
from pallas_kernels.errors import RequestError
from sparse_lm import ModelConfig
from train.bench import core, nvml, results
from train.bench.contestants import Contestant, model_of
from train.bench.core import Counts, Source
from train.bench.energy import Energy, EnergyReport
from train.bench.energy import measure as measure_energy
from train.data.holdout import TextChoice
from train.errors import UserError
from train.output import print_table

_BATCH = 64
_CEILING_SIZE = {"gpu": 8192}
_SMALL_CEILING = 512
_CHAIN_MS = 200.0
_NNZ = 30.0
_ALWAYS = ("layers", "ms (low–high)", "tokens/ms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchModelOptions:
    """Times the forward of a model's core, sparse layers against dense ones: speed, memory and energy.

    Attributes:
      config: the preset whose model it is.
      checkpoint: a run's work directory, one checkpoint in it, or a converted model: time that model, as
        active as it is on text, in place of a preset's.
      data: the text for --checkpoint.
      batch_size: sequences of the micro-batch, each of the model's context length (default: 64; of a
        checkpoint's text as many as there are, up to 64).
      formats: how the feed-forward layers run, one case each; silu is dense layers with SiLU in place of the
        model's activation.
      nnz: active neurons that each layer has for a token, on average (default: 30); not with --checkpoint.
      rounds: samples of each time.
      energy: also measure energy where the GPU's counters can be read.
      energy_seconds: how long each case runs for that.
      peaks: first run each case in a process of its own and report its allocator's peak; on a GPU only.
      common: what all benchmarks of models have.
      model: sizes and numerics; ``formats`` stand in for its own choice.
    """

    config: str = "1p5b"
    checkpoint: str | None = None
    data: TextChoice = dataclasses.field(default_factory=TextChoice)
    batch_size: int | None = None
    formats: tuple[Contestant, ...] = ("dense", "silu", "panel", "auto")
    nnz: float | None = None
    rounds: int = 5
    energy: bool = True
    energy_seconds: float = 4.0
    peaks: bool = False
    common: Annotated[results.CommonOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=results.CommonOptions
    )
    model: ModelConfig

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise RequestError(f"rounds must be at least 1; got {self.rounds}")
        if not self.formats:
            raise RequestError("formats must name at least one; got none")
        if self.batch_size is not None and self.batch_size < 1:
            raise RequestError(f"batch-size must be at least 1; got {self.batch_size}")
        if self.nnz is not None and not self.nnz > 0:
            raise RequestError(f"nnz must be above 0; got {self.nnz}")
        if self.nnz is not None and self.checkpoint is not None:
            raise RequestError("nnz is for synthetic activity: --checkpoint brings its own; leave one out")
        if self.peaks and self.checkpoint is not None:
            raise RequestError(
                "peaks is for --config: memory depends on sizes alone, so name the config.json of the run"
            )
        if not self.energy_seconds > 0:
            raise RequestError(f"energy-seconds must be above 0; got {self.energy_seconds}")


@dataclasses.dataclass(frozen=True)
class Row:
    """What a case was found to take.

    Attributes:
      name: the contestant.
      samples_ms: milliseconds of a forward; none where the case failed.
      tokens: of a forward.
      flops: what it must compute (`core.flops`).
      ceiling_share: share of the FLOP/s that a large product reaches in the same run.
      program_bytes: what the compiled program holds at once: parameters, tokens, result, temporary buffers.
      temporary_bytes: its temporary buffers alone.
      peak_bytes: the most that a process of its own held on its device; None if not asked for.
      counts: of the layers; None of a dense case.
      difference: of its hidden states from the dense case's, relative; None of dense and SiLU.
      energy: of a forward, where it was measured.
      failure: why there are no times, in one sentence.
    """

    name: Contestant
    tokens: int
    samples_ms: tuple[float, ...] = ()
    flops: float | None = None
    ceiling_share: float | None = None
    program_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    counts: Counts | None = None
    difference: float | None = None
    energy: Energy | None = None
    failure: str | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def tokens_per_ms(self) -> float | None:
        return None if self.median_ms is None else self.tokens / self.median_ms

    @property
    def millijoules_per_token(self) -> float | None:
        """With what the device takes at rest subtracted."""
        return None if self.energy is None else 1e3 * self.energy.joules / self.tokens

    @property
    def dense_share(self) -> float | None:
        """Of (token, layer) pairs, those that a sparse format computed densely."""
        if self.counts is None:
            return None
        return sum(self.counts.dense_tokens) / (self.tokens * len(self.counts.dense_tokens))

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and what follows from them, ready for JSON."""
        derived = ("median_ms", "tokens_per_ms", "millijoules_per_token", "dense_share")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


def run(options: BenchModelOptions, *, console: Console | None = None) -> list[Row]:
    """Measures every case, prints a table, and writes the JSON file asked for.

    Raises:
      UserError: no such checkpoint or text, ``peaks`` on a device that does not count its memory, a file that
        cannot be written, or a case slower than ``tolerance`` allows.
      RequestError: a format cannot run here, or the model cannot have so many active neurons.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    file = options.common.open_files()
    peaks = _peaks(options) if options.peaks else {}
    source = _source(options)
    _check_formats(options, source)
    for note in source.notes:
        console.print(note, markup=False)
    limits = timing.ceilings(
        source.model.dtype, size=_CEILING_SIZE.get(jax.default_backend(), _SMALL_CEILING)
    )
    found, calls = _run_once(options, source, console)
    found = [dataclasses.replace(row, peak_bytes=peaks.get(row.name)) for row in found]
    rows = _timed(options, source, found, calls, limits)
    file.write(_document(options, source, rows, limits, None))
    used = _energy(options, calls, console) if options.energy and calls else None
    if used is not None:
        rows = [dataclasses.replace(row, energy=used.calls.get(row.name)) for row in rows]
    document = _document(options, source, rows, limits, used)
    file.write(document)
    print_table(console, table(options, source, rows, limits))
    if used is not None:
        console.print(used.sampling(), markup=False)
    options.common.print_against(console, document)
    return rows


def _document(
    options: BenchModelOptions,
    source: Source,
    rows: Sequence[Row],
    limits: Ceilings,
    used: EnergyReport | None,
) -> dict[str, Any]:
    """Everything of a run, samples included, ready for JSON."""
    more: dict[str, Any] = {"ceilings": dataclasses.asdict(limits), "tokens": source.tokens.size}
    if used is not None:
        more["energy"] = {"idle": dataclasses.asdict(used.idle), "sampling": used.sampling()}
    said = dataclasses.replace(options, model=source.model, batch_size=len(source.tokens))
    return results.document(said, [row.to_dict() for row in rows], results.machine_record(), **more)


def _source(options: BenchModelOptions) -> Source:
    if options.checkpoint is not None:
        return core.checkpoint_source(options.checkpoint, options.data, batch_size=options.batch_size)
    return core.synthetic_source(
        options.model, batch_size=options.batch_size or _BATCH, nnz=options.nnz or _NNZ
    )


def _check_formats(options: BenchModelOptions, source: Source) -> None:
    """Raises RequestError where a format cannot run here, before anything is compiled."""
    model = source.model
    x = jax.ShapeDtypeStruct((source.tokens.size, model.d_model), model.dtype)
    w = jax.ShapeDtypeStruct((model.d_ff, model.d_model), model.dtype)
    for name in options.formats:
        dispatch.choose(model_of(model, name).ffn, dispatch.Call.of(x, w))


def _run_once(
    options: BenchModelOptions, source: Source, console: Console
) -> tuple[list[Row], dict[Contestant, Call]]:
    """Compiles all cases and runs each once: rows without times, and calls of the cases that have room."""
    models = {name: model_of(source.model, name) for name in options.formats}
    arguments = {name: core.shapes(source, model) for name, model in models.items()}
    compiled = timing.compile_all(
        {name: (core.forward(model), arguments[name]) for name, model in models.items()}
    )
    rows = {name: Row(name, source.tokens.size) for name in models}
    params, tokens = source.make(), jnp.asarray(source.tokens)
    calls: dict[Contestant, Call] = {}
    hidden = stats = dense = None
    for name, model in sorted(models.items(), key=lambda item: item[0] != "dense"):
        program = compiled[name]
        try:
            if isinstance(program, Exception):
                raise program
            call = partial(program, params, core.buffers_of(model, params, tokens), tokens)
            hidden, stats = jax.block_until_ready(call())
        except jax.errors.JaxRuntimeError as error:
            rows[name] = dataclasses.replace(rows[name], failure=results.out_of_memory(error))
            console.print(f"{name}: {rows[name].failure}", markup=False)
            continue
        dense = hidden if name == "dense" else dense
        calls[name] = call
        rows[name] = dataclasses.replace(
            rows[name],
            program_bytes=results.program_bytes(program),
            temporary_bytes=timing.temporary_bytes(program),
            counts=None if stats is None else Counts.of(stats),
            difference=None if dense is None or name in ("dense", "silu") else core.difference(hidden, dense),
        )
    return list(rows.values()), calls


def _timed(
    options: BenchModelOptions,
    source: Source,
    rows: Sequence[Row],
    calls: Mapping[Contestant, Call],
    limits: Ceilings,
) -> list[Row]:
    """The rows with the times of their calls, which take turns, and the work that they must do."""
    times = timing.measure(calls, rounds=options.rounds, chain_ms=_CHAIN_MS, least_calls=1)
    done = []
    for row in rows:
        if row.name in times:
            timed = times[row.name]
            flops = core.flops(model_of(source.model, row.name), row.tokens, row.counts)
            share = flops / limits.flops / (timed.median_ms / 1e3)
            row = dataclasses.replace(row, samples_ms=timed.samples_ms, flops=flops, ceiling_share=share)
        done.append(row)
    return done


def _energy(
    options: BenchModelOptions, calls: Mapping[Contestant, Call], console: Console
) -> EnergyReport | None:
    gpu, reason = nvml.find()
    if gpu is None:
        console.print(f"energy is left out: {reason}", markup=False)
        return None
    try:
        return measure_energy(gpu, calls, seconds=options.energy_seconds)
    except RuntimeError as error:
        console.print(f"energy is left out: {error}", markup=False)
        return None


# -- peaks, each in a process of its own ---------------------------------------------------------------------


def _peaks(options: BenchModelOptions) -> dict[Contestant, int]:
    """Each case's peak. This process must not have touched the device yet, whose memory the others need."""
    found: dict[Contestant, int] = {}
    for name in options.formats:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peak = pool.submit(_peak, options, name).result()
        if peak is not None:
            found[name] = peak
    return found


def _peak(options: BenchModelOptions, name: Contestant) -> int | None:
    """The most that the device's allocator held for one forward of zeros: what a program takes does not
    depend on its numbers. None where there was no room."""
    device = jax.local_devices()[0]
    if device.memory_stats() is None:
        raise UserError(
            f"--peaks needs a device that counts its memory; {device.device_kind} does not: leave it out"
        )
    source = _source(options)
    model = model_of(source.model, name)
    try:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), core.shapes(source, model))
        jax.block_until_ready(jax.jit(core.forward(model))(*zeros))
    except RequestError as error:
        raise UserError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        results.out_of_memory(error)
        return None
    return int(device.memory_stats()["peak_bytes_in_use"])


# -- what is printed -----------------------------------------------------------------------------------------


def table(options: BenchModelOptions, source: Source, rows: Sequence[Row], limits: Ceilings) -> Table:
    """For people: a line a case, each beside the dense one."""
    batch, length = source.tokens.shape
    activity = "activity of its own text" if options.checkpoint else f"nnz {options.nnz or _NNZ:g}"
    table = Table(
        title=f"forward of {options.checkpoint or options.config} without its head, "
        f"{source.model.num_layers} layers, {batch} × {length} tokens, {activity}, {machine.title()}; "
        f"a large product reaches {limits.flops / 1e12:.3g} TFLOP/s"
    )
    columns = {
        "layers": lambda row: row.name,
        "ms (low–high)": _time,
        "dense / this": lambda row: _ratio(rows, row),
        "tokens/ms": lambda row: _number(row.tokens_per_ms, ".4g"),
        "of ceiling": lambda row: _number(row.ceiling_share, ".0%"),
        "MiB": lambda row: results.mebibytes(row.program_bytes),
        "temporary": lambda row: results.mebibytes(row.temporary_bytes),
        "peak": lambda row: results.mebibytes(row.peak_bytes),
        "mJ/token": lambda row: _number(row.millijoules_per_token, ".3f"),
        "l0": lambda row: "" if row.counts is None else f"{statistics.mean(row.counts.l0):.1f}",
        "done densely": lambda row: _number(row.dense_share, ".1%"),
        "difference": lambda row: _number(row.difference, ".1e"),
    }
    shown = [name for name in columns if name in _ALWAYS or any(columns[name](row) for row in rows)]
    for name in shown:
        table.add_column(name, justify="left" if name == "layers" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(columns[name](row) for name in shown))
    return table


def _time(row: Row) -> str:
    if row.median_ms is None:
        return "failed"
    return f"{row.median_ms:.1f} ({min(row.samples_ms):.1f}–{max(row.samples_ms):.1f})"


def _ratio(rows: Sequence[Row], row: Row) -> str:
    dense = next((each.median_ms for each in rows if each.name == "dense"), None)
    return f"{dense / row.median_ms:.2f}" if dense and row.median_ms else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
