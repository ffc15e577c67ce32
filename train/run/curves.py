"""Curves of runs from their metrics files: loss, sparsity, dead neurons and speed against tokens."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError, short_reason
from train.picture import check_matplotlib, check_picture, save_picture
from train.run import manifest, metrics

_DASHES, _MARKERS = ("-", (0, (4, 1.5)), "-.", (0, (1, 1))), "osvD"  # runs are told apart without colours too
_SMOOTHED = 200  # points of a curve at most; each is the mean of the steps between two


@dataclasses.dataclass(frozen=True)
class Curves:
    """Figures of one run, each as (tokens, values).

    Attributes:
      name: of the run's directory.
      lines: by name: ``"cross-entropy"``, ``"active neurons"``, ``"dead neurons"``, ``"tokens per second"``.
      heldout: cross-entropy on held-out text.
    """

    name: str
    lines: dict[str, tuple[list[float], list[float]]]
    heldout: tuple[list[float], list[float]]


def plot(runs: Sequence[str], out: str) -> list[str]:
    """Draws the runs into one picture, a chart for each figure.

    Args:
      runs: their work directories.
      out: the picture, its kind by its ending.

    Returns:
      What to print: a line for each run with its last figures, and where the picture is.

    Raises:
      UserError: matplotlib is missing, a directory holds no run, or the picture cannot be written.
    """
    check_matplotlib("plot")
    check_picture(out, option="--out")
    from matplotlib.figure import Figure

    found = [read(Path(run)) for run in runs]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    charts = figure.subplots(2, 2).ravel()
    for axes, figure_name in zip(charts, found[0].lines, strict=True):
        for number, run in enumerate(found):
            color, dashes, marker = (
                f"C{number}",
                _DASHES[number % len(_DASHES)],
                _MARKERS[number % len(_MARKERS)],
            )
            axes.plot(*run.lines[figure_name], color=color, linestyle=dashes, label=run.name)
            if figure_name == "cross-entropy" and run.heldout[0]:
                axes.plot(*run.heldout, ":", marker=marker, color=color, label=f"{run.name}, held out")
        axes.set(title=figure_name, xlabel="tokens")
        axes.grid(alpha=0.3)
    charts[0].legend()
    save_picture(figure, out, option="--out")
    return [*map(_last_figures, found), f"picture: {out}"]


def read(workdir: Path) -> Curves:
    """The curves of the run in a work directory.

    Raises:
      UserError: there is no run in it, or it has no step yet, or its records are not what a run writes.
    """
    with understood(workdir):
        return _read(workdir)


def _read(workdir: Path) -> Curves:
    per_step, facts, records = read_records(workdir)
    steps = [record for record in records if record.get("ce") is not None]
    evaluated = [record for record in records if "evaluation" in record]
    neurons = facts["config"]["model"]["num_layers"] * facts["config"]["model"]["d_ff"]
    timed = [record for record in steps if "tokens_per_second" in record]

    def curve(records: list[dict[str, Any]], values: list[float]) -> tuple[list[float], list[float]]:
        return thinned([record["step"] * per_step for record in records], values)

    return Curves(
        name=workdir.name or str(workdir),
        lines={
            "cross-entropy": curve(steps, [record["ce"] for record in steps]),
            "active neurons": curve(steps, [record["l0"] for record in steps]),
            "dead neurons": curve(steps, [sum(record["dead_per_layer"]) / neurons for record in steps]),
            "tokens per second": curve(timed, [record["tokens_per_second"] for record in timed]),
        },
        heldout=curve(evaluated, [record["evaluation"]["ce"] for record in evaluated]),
    )


def read_records(workdir: Path) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Tokens of a step, the run's manifest and the records of its metrics file, at least one of them of a
    step.

    Raises:
      UserError: there is no run in the directory, its manifest is broken, or it has no step yet.
    """
    try:
        lines = (workdir / metrics.FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
        facts = json.loads((workdir / manifest.FILE_NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{workdir} must be the work directory of a run; {error.filename}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{workdir} must be the work directory of a run; its {manifest.FILE_NAME} is no JSON: {error}"
        ) from error
    records = [record for line in lines if (record := _record(line))]
    if not any(record.get("ce") is not None for record in records):
        raise UserError(f"{workdir} must hold a run of at least one step; found none in {metrics.FILE_NAME}")
    return facts["tokens_per_step"], facts, records


@contextlib.contextmanager
def understood(workdir: Path) -> Iterator[None]:
    """Turns what records of another program, or edited ones, make of the code that reads them into a
    sentence."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{manifest.FILE_NAME} and {metrics.FILE_NAME} in {workdir} must hold what a run writes; found "
            f"other fields or types ({type(error).__name__}: {short_reason(error)}): restore the files"
        ) from error


def _record(line: str) -> dict[str, Any] | None:
    """A line of a metrics file; None for one that is cut off, as while the run writes it."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return None


def thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Points of a curve as means over stretches of equal length, so that a long run is no wall of noise."""
    size = -(-len(x) // _SMOOTHED)
    if size <= 1:
        return x, y
    parts = [slice(at, at + size) for at in range(0, len(x), size)]
    return [sum(x[p]) / len(x[p]) for p in parts], [sum(y[p]) / len(y[p]) for p in parts]


def _last_figures(run: Curves) -> str:
    tokens = run.lines["cross-entropy"][0][-1]
    figures = [f"{name} {_number(values[-1])}" for name, (_, values) in run.lines.items() if values]
    return f"{run.name}: at {_number(tokens)} tokens {', '.join(figures)}"


def _number(value: float) -> str:
    """In four figures, and large ones whole."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
