"""``sparse-lm sweep``: trains every row, measures each, and writes table, figure and numbers as it goes.

Each row is an ordinary run in a directory of its own, so that a sweep that was stopped goes on where it was:
rows that are finished are read, the one that was cut off resumes, figures that were measured stay. All rows
are trained by one process and share what was made from text and compiled. λ is an argument of the compiled
step, so that rows that differ in it alone are compiled once.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
from flax import nnx
from rich.console import Console

from sparse_lm.config import SILU, ModelConfig
from train import parallel
from train.config import TrainConfig
from train.config_file import read_config
from train.config_json import changed_fields
from train.errors import UserError
from train.run import compilation_cache, loop, manifest
from train.run.checkpoint_errors import check_writable, making
from train.run.checkpoint_files import SUBDIRECTORY, check_local, complete_steps
from train.run.checkpoint_reading import load_for_inference
from train.sweep import report
from train.sweep.figures import HeldoutText, read_quality, unions_of_run
from train.sweep.results import FIGURE_NAME, JSON_NAME, TABLE_NAME, Result, Results
from train.sweep.rows import Row, Sweep
from train.sweep.speed import SpeedTest, shape_of

FormatName = Literal["auto", "panel", "hybrid", "twell"]
_COMPILED = "compiled"
_FORWARD_TOKENS = 65_536
# What a row may differ in from the run that its directory holds: nothing that its figures depend on, but for
# the order of sums, which plans may change.
_MAY_DIFFER = (
    "workdir", "plan", "compilation_cache", "checkpoint.",
    "report.every", "report.tensorboard", "report.wandb",
)  # fmt: skip


def run(
    sweep: Sweep,
    *,
    preset: str,
    formats: Sequence[FormatName] = ("auto",),
    times: bool = True,
    figure: bool = True,
    console: Console | None = None,
) -> Results:
    """Trains and measures what is not there yet.

    Args:
      sweep: the rows.
      preset: the name of what they are made from.
      formats: sparse ones to be timed beside the dense one.
      times: measure speed, memory and energy, after the last run; on a GPU only.
      figure: draw it, with matplotlib.
      console: where to print.

    Raises:
      UserError: the corpus is missing, a row's directory holds another run, a figure is wanted without
        matplotlib, or what `train.run.loop.run` raises.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if figure and importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "the figure of a sweep needs the package matplotlib, which is not installed: "
            "pip install 'sparse-lm[plot]', or leave it out with --no-figure"
        )
    _check(sweep)
    with making(sweep.workdir):
        check_writable(sweep.workdir)
        text = HeldoutText(sweep.base, sweep.workdir / loop.CACHE, say=console.print)
        sweep.workdir.mkdir(parents=True, exist_ok=True)
    results = Results(sweep, preset)
    with compilation_cache.kept(_compiled(sweep)):
        for number, result in enumerate(results.rows, start=1):
            name = report.label(result.row)
            console.print(f"row {number} of {len(results.rows)}: {name}", markup=False)
            if not _train(sweep, result.row, console):
                console.print("the sweep is stopped: the same command goes on from there", markup=False)
                return results
            result.quality = read_quality(result.row.workdir, d_ff=result.row.config.model.d_ff)
            if result.unions is None and result.row.config.model.activation != SILU:
                result.unions = unions_of_run(result.row.workdir, text)
            _show(sweep, results, figure=figure)
        for timed in _time(results, text, formats, times):
            console.print(f"timed {report.label(timed.row)}", markup=False)
            _show(sweep, results, figure=figure)
    _show(sweep, results, figure=figure)
    console.print(report.markdown(results), markup=False)
    for name in (TABLE_NAME, FIGURE_NAME, JSON_NAME) if figure else (TABLE_NAME, JSON_NAME):
        console.print(f"{sweep.workdir / name}", markup=False)
    return results


def _check(sweep: Sweep) -> None:
    """Raises UserError for what would stop the sweep later."""
    check_local("workdir", sweep.base.workdir)
    parallel.initialize_processes()
    parallel.check_devices()
    if jax.process_count() > 1:
        raise UserError(f"sweep needs one process; got {jax.process_count()}: start it alone")
    for row in sweep.rows():
        parallel.check_batch(row.config)
        path = row.workdir / manifest.CONFIG_NAME
        if not path.exists():
            continue
        changed = changed_fields(read_config(path), _absolute(row))
        changed = {name: values for name, values in changed.items() if not name.startswith(_MAY_DIFFER)}
        for name, (there, here) in changed.items():
            raise UserError(
                f"{row.workdir} must hold the same row of an earlier start; found one with "
                f"{name.replace('_', '-')} {there!r} where {here!r} is asked for: choose another --workdir"
            )


def _compiled(sweep: Sweep) -> str:
    """Where rows keep what they compile, so that the next ones take it from there: as the options or the
    environment say, else beside them."""
    asked = sweep.base.compilation_cache
    return asked if asked or compilation_cache.where() else str(sweep.workdir / _COMPILED)


def _absolute(row: Row) -> TrainConfig:
    """The row's configuration as its run writes it."""
    return dataclasses.replace(row.config, data=row.config.data.absolute())


def _train(sweep: Sweep, row: Row, console: Console) -> bool:
    """Trains the row to its end, unless it is there; whether no signal stopped it."""
    if row.config.steps in complete_steps(row.workdir / SUBDIRECTORY):
        console.print(f"{row.workdir} was finished before", markup=False)
        return True
    return loop.run(row.config, cache=sweep.workdir / loop.CACHE).outcome != "stopped"


def _show(sweep: Sweep, results: Results, *, figure: bool) -> None:
    """Writes what there is so far."""
    results.write()
    (sweep.workdir / TABLE_NAME).write_text(report.markdown(results), encoding="utf-8")
    if figure:
        report.draw(results, sweep.workdir / FIGURE_NAME)


def _time(
    results: Results, text: HeldoutText, formats: Sequence[FormatName], times: bool
) -> Iterator[Result]:
    """Measures speed, memory and energy of the rows that have silent neurons, those of one shape together."""
    if not times:
        results.notes.append("Speed, memory and energy were not asked for")
        return
    if jax.default_backend() == "cpu":
        results.notes.append("Speed, memory and energy are measured on a GPU, and left out here on a CPU")
        return
    missing: dict[ModelConfig, list[Result]] = {}
    for result in results.rows:
        timed = result.speed is not None and set(formats) <= result.speed.costs.keys()
        if result.row.config.model.activation != SILU and not timed:
            missing.setdefault(shape_of(result.row.config.model), []).append(result)
    for shape, rows in missing.items():
        config = rows[0].row.config
        micro_batch = config.batch_size // config.optimizer.accumulation
        whole = max(1, _FORWARD_TOKENS // shape.context_length)
        test = SpeedTest(shape, formats, text.batch(whole), text.batch(micro_batch))
        for result in rows:
            model = load_for_inference(result.row.workdir)[0]
            result.speed = test.measure(nnx.to_pure_dict(nnx.split(model)[1]))
            if test.no_energy and (note := f"Energy is left out: {test.no_energy}") not in results.notes:
                results.notes.append(note)
            yield result
