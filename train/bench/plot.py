"""Break-even curves: what `pallas_kernels.bench.layers` measured, against nnz and against tokens."""

import dataclasses
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from pallas_kernels.errors import RequestError
from train.errors import UserError
from train.picture import check_ending, check_matplotlib, check_picture, save_picture


@dataclasses.dataclass(frozen=True)
class CurvesOptions:
    """Draws how long the formats take against nnz and against tokens, and where they break even with dense.

    Attributes:
      results: files that bench layers --json has written, of one GPU.
      out: the picture to write: .png, .svg or .pdf.
      debug: show the traceback of an error.
    """

    results: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE [FILE ...]")]
    out: str
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.results:
            raise RequestError("bench curves needs at least one file of results; got none")
        check_ending(self.out, option="--out")


_LAYERS = re.compile(r"(dense|twell|hybrid|panel|auto)(-\d+)?")  # other rows are stages of one
_COLORS = {
    "dense": "black",
    "twell": "tab:orange",
    "hybrid": "tab:purple",
    "panel": "tab:blue",
    "auto": "tab:green",
}
_STYLES = ("-", "--", ":", "-.")
_DIRECTIONS = {"forward": "forward", "train": "forward and backward"}
_WIDE = 3


@dataclasses.dataclass(frozen=True)
class Point:
    """One time: which layer, in which case, and the samples in ms.

    Attributes:
      kind: the case but for what a curve runs over: direction, shape, type, and what the activity is like.
      tokens, nnz: what curves run over; nnz as measured.
      asked: names the case's activity, the same at every number of tokens.
    """

    kind: tuple[str, ...]
    tokens: int
    nnz: float
    asked: str
    format: str
    median: float
    lowest: float
    highest: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """One pair of axes: a title, what runs along x, and points by format."""

    title: str
    along: str
    curves: dict[str, list[Point]]

    def x(self, point: Point) -> float:
        return point.nnz if self.along == "nnz" else point.tokens


def plot(results: Sequence[str | Path], out: str | Path) -> list[str]:
    """Draws the curves of some result files into one picture.

    Args:
      results: files written by ``bench layers --json``.
      out: the picture, its kind by its ending.

    Returns:
      What to print: where the picture is, and where each curve crosses the dense layer's.

    Raises:
      UserError: matplotlib is missing, a file is no such result, files are of different GPUs, no case differs
        from another in nnz or tokens alone, or the picture cannot be written.
    """
    check_matplotlib("bench curves")
    check_picture(out, option="--out")
    from matplotlib.figure import Figure

    loaded = [_load(Path(path)) for path in results]
    devices = sorted({device for device, _ in loaded})
    if len(devices) > 1:
        raise UserError(f"bench curves draws results of one GPU; the files are of {' and '.join(devices)}")
    charts = _charts([point for _, points in loaded for point in points])
    if not charts:
        raise UserError(
            "a curve needs cases that differ in nnz alone or in tokens alone; found no two such: run "
            "bench layers with several values of --nnz or --tokens"
        )
    columns = min(len(charts), _WIDE)
    rows = math.ceil(len(charts) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.8 * rows), layout="constrained")
    figure.suptitle(f"Feed-forward layers on one {devices[0]}")
    lines = []
    for nth, chart in enumerate(charts, start=1):
        lines += _draw(figure.add_subplot(rows, columns, nth), chart)
    save_picture(figure, out, option="--out")
    return [*lines, f"picture: {out}"]


def _load(path: Path) -> tuple[str, list[Point]]:
    """The GPU's name and all points of a file.

    Raises:
      UserError: it is no result of ``bench layers``.
    """
    wanted = "expected a file that bench layers --json has written"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        points = [point for case in loaded["cases"] for point in _points(case)]
        return str(loaded["device"]["kind"]), points
    except OSError as error:
        raise UserError(f"{wanted}; {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{wanted}; {path} is none") from error


def _points(result: dict[str, Any]) -> Iterable[Point]:
    case, nnz = result["case"], float(result["measured"]["mean_nnz"])
    shape, activity = case["shape"], case.get("activity")
    size = (
        f"D {shape['d_model']}, F {shape['d_ff']}{'' if shape['gated'] else ', non-gated'}, {case['dtype']}"
    )
    kind = (_DIRECTIONS[result["direction"]], size, str(result.get("source", "like trained layers")))
    asked = f"layer {case['layer']}" if activity is None else f"nnz {activity['mean_nnz']:g}"
    for row in result["rows"]:
        if _LAYERS.fullmatch(row["name"]):
            samples, median = row["timing"]["samples_ms"], float(row["median_ms"])
            yield Point(
                kind, int(case["tokens"]), nnz, asked, row["name"], median, min(samples), max(samples)
            )


def _charts(points: Sequence[Point]) -> list[Chart]:
    """A chart for all points that differ in nnz alone, and for all that differ in tokens alone."""
    by_tokens: dict[Any, list[Point]] = defaultdict(list)
    by_activity: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        by_tokens[point.kind, point.tokens].append(point)
        by_activity[point.kind, point.asked].append(point)
    charts = [
        *(_chart(kind, "nnz", f"{tokens:,} tokens", group) for (kind, tokens), group in by_tokens.items()),
        *(_chart(kind, "tokens", asked, group) for (kind, asked), group in by_activity.items()),
    ]
    return [chart for chart in charts if any(len(curve) > 1 for curve in chart.curves.values())]


def _chart(kind: tuple[str, ...], along: str, fixed: str, points: Iterable[Point]) -> Chart:
    direction, size, source = kind
    chart = Chart(f"{direction}, {fixed}, {source}\n{size}", along, {})
    newest: dict[tuple[str, float], Point] = {(point.format, chart.x(point)): point for point in points}
    for _, point in sorted(newest.items(), key=lambda item: item[0][1]):
        chart.curves.setdefault(point.format, []).append(point)
    return chart


def _draw(axes: Any, chart: Chart) -> list[str]:
    """Draws a chart; returns a line on each curve's place next to dense's."""
    lines = []
    for nth, (name, points) in enumerate(sorted(chart.curves.items(), key=_order)):
        base = name.partition("-")[0]
        x, label = [chart.x(point) for point in points], name
        if name != "dense" and "dense" in chart.curves:
            where = _against_dense(chart, name)
            label += f" ({where})"
            lines.append(f"{chart.title.splitlines()[0]}: {name} {where}")
        style = _STYLES[nth % len(_STYLES)] if name != base else "-"
        axes.plot(
            x, [p.median for p in points], style, marker="o", markersize=4, color=_COLORS[base], label=label
        )
        lowest, highest = [p.lowest for p in points], [p.highest for p in points]
        axes.fill_between(x, lowest, highest, color=_COLORS[base], alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("mean active neurons of a token (nnz)" if chart.along == "nnz" else "tokens of a call")
    axes.set_ylabel("time of a call, ms (median; band: all samples)")
    axes.set_title(chart.title, fontsize="medium")
    ticks: list[float] = []
    for value in sorted({chart.x(point) for points in chart.curves.values() for point in points}):
        if not ticks or value > 1.1 * ticks[-1]:  # labels of nearer values would overlap
            ticks.append(value)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=45)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    rungs = (m * 10.0**e for e in range(-4, 6) for m in (1, 1.5, 2, 3, 5, 7))
    ticks = [tick for tick in rungs if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return lines


def _order(curve: tuple[str, list[Point]]) -> tuple[int, str]:
    return list(_COLORS).index(curve[0].partition("-")[0]), curve[0]


def _against_dense(chart: Chart, name: str) -> str:
    """Where a curve crosses the dense layer's, on straight lines between points on logarithmic axes."""
    dense = {chart.x(point): point.median for point in chart.curves["dense"]}
    ratios = [(chart.x(p), p.median / dense[chart.x(p)]) for p in chart.curves[name] if chart.x(p) in dense]
    if not ratios:
        return "not beside dense"
    crossings = []
    for (x0, r0), (x1, r1) in itertools.pairwise(ratios):
        if (r0 < 1) != (r1 < 1):
            share = math.log(r0) / (math.log(r0) - math.log(r1))
            crossings.append(f"{math.exp(math.log(x0) + share * math.log(x1 / x0)):,.0f}")
    if crossings:
        return f"even at {' and '.join(crossings)} {chart.along}"
    return "faster throughout" if ratios[0][1] < 1 else "slower throughout"
