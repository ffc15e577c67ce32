"""The table and the figure of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from train.errors import UserError
from train.sweep.figures import PANEL, Quality
from train.sweep.results import Result, Results
from train.sweep.rows import L1, Row

Point = tuple[Row, float, float]
_MARKERS = {"silu": "*", "reset": "^", "keep": "v", "non-gated": "s", "relu2": "D"}


def label(row: Row) -> str:
    """A row in words."""
    match row.variant:
        case "l1":
            return f"λ {row.l1:g}"
        case "silu":
            return "SiLU, dense"
        case "reset":
            return f"λ {row.l1:g}, dead neurons re-initialised, moments reset"
        case "keep":
            return f"λ {row.l1:g}, dead neurons re-initialised, moments kept"
        case "non-gated":
            return f"λ {row.l1:g}, non-gated, d_ff {row.config.model.d_ff}"
        case "relu2":
            return f"λ {row.l1:g}, ReLU²"
    return f"λ {row.l1:g}, {row.variant}"


def markdown(results: Results) -> str:
    """A table with a row a run, below a sentence on its scale."""
    finished = sorted(results.finished, key=lambda r: (r.row.variant != L1, r.row.variant == L1 and r.row.l1))
    dense = next((r.quality for r in finished if r.row.variant == L1 and r.row.l1 == 0), None)
    rows = {label(result.row): _cells(result, dense) for result in finished}
    head = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = [["run", *head], ["---", *["---:"] * len(head)]]
    lines += [[name, *(cells.get(column, "") for column in head)] for name, cells in rows.items()]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n{note}.\n" for note in results.notes)
    return f"{results.scale()}.\n\n{body}\n{notes}"


def _cells(result: Result, dense: Quality | None) -> dict[str, str]:
    """A row by column. Speeds are times as fast as dense, memory and energy shares of dense."""
    quality, unions, speed = result.quality, result.unions, result.speed
    cells: dict[str, str] = {}
    if quality is not None:
        cells["held-out CE"] = f"{quality.ce:.4f}"
        if dense is not None:
            cells["of λ 0"] = f"{quality.ce / dense.ce - 1:+.2%}"
        cells["nnz"] = f"{quality.nnz:.1f}"
        cells["active"] = f"{quality.nnz / result.row.config.model.d_ff:.1%}"
    if unions is not None:
        cells[f"union of {PANEL}"] = f"{mean(unions.text):.0f}"
        cells["alike tokens"] = f"{mean(unions.alike):.0f}"
    if quality is not None:
        cells["dead"] = f"{quality.dead:.1%}"
    if speed is not None:
        for name in speed.sparse_formats:
            cells[f"forward, {name}"] = f"{speed.forward(name):.2f}×"
            cells[f"train, {name}"] = f"{speed.train(name):.2f}×"
            cells[f"memory, {name}"] = f"{speed.memory(name):.0%}"
            energy = speed.energy(name)
            if energy is not None:
                cells[f"energy, {name}"] = f"{energy:.0%}"
    return cells


def draw(results: Results, path: Path) -> None:
    """Draws held-out CE, unions and, where there are speeds, these against nnz.

    Curves are of the rows that differ in λ alone; variants are marks. Shapes tell them apart, no colour does.

    Raises:
      UserError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    finished = [(result, result.quality) for result in results.finished if result.quality is not None]
    charts: dict[str, list[Point]] = {
        "held-out cross-entropy, nats": [(r.row, q.nnz, q.ce) for r, q in finished],
        f"neurons that {PANEL} tokens activate": [
            (r.row, q.nnz, mean(r.unions.text)) for r, q in finished if r.unions is not None
        ],
    }
    timed = [(r.row, q.nnz, r.speed) for r, q in finished if r.speed is not None]
    for format in dict.fromkeys(name for *_, speed in timed for name in speed.sparse_formats):
        charts[f"forward, times as fast as dense ({format})"] = [
            (row, nnz, speed.forward(format)) for row, nnz, speed in timed
        ]
    figure = Figure(figsize=(5.2 * len(charts), 4.8), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(charts)), charts.items(), strict=True):
        _chart(axes, title, points)
    figure.axes[0].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} must be a picture that can be written: {error.strerror}") from error


def _chart(axes: Any, title: str, points: Sequence[Point]) -> None:
    curve = sorted((x, y, row.l1) for row, x, y in points if row.variant == L1)
    axes.plot([x for x, _, _ in curve], [y for _, y, _ in curve], "o-", color="black", label="λ, gated ReLU")
    for x, y, l1 in curve:
        axes.annotate(f"{l1:g}", (x, y), textcoords="offset points", xytext=(4, 5), fontsize="small")
    for row, x, y in points:
        if row.variant != L1:
            axes.plot(
                [x], [y], _MARKERS.get(row.variant, "x"), markersize=9, markerfacecolor="white",
                markeredgecolor="0.35", linestyle="none", label=label(row),
            )  # fmt: skip
    axes.set(title=title, xlabel="active neurons of a token (nnz), mean over layers", xscale="log")
    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-2, 6) for m in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
