"""Is a penalty on unions better than L1? ``python -m train.experiments.panel_l1 --sweep DIR``.

It takes a finished ``sparse-lm sweep`` and trains the same run with `panel_penalty` in the place of L1, once
for each strength, and asks how many neurons 128 tokens activate where both penalties reach the same held-out
cross-entropy. It is resumed as a sweep is.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from sparse_lm.config import SparsityConfig, TokenOrderName
from train.config import TrainConfig, to_dict
from train.config_file import read_config
from train.errors import UserError
from train.experiments.panel_penalty import penalised
from train.output import JsonFile
from train.run import loop, manifest
from train.run.checkpoint import SUBDIRECTORY, complete_steps
from train.sweep.compiled import compiling_once
from train.sweep.figures import PANEL, HeldoutText, Quality, Unions, read_quality, unions_of_run
from train.sweep.results import JSON_NAME
from train.sweep.rows import L1
from train.sweep.sweep import COMPILED

ORDERS = ("text", "alike")
NAME = "panel_l1"


@dataclasses.dataclass(frozen=True)
class Point:
    """A trained model: a row of the sweep, or a run with the other penalty.

    Attributes:
      strength: λ.
      ce: held-out cross-entropy in nats.
      nnz: active neurons of a token, mean over layers.
      unions: of 128 tokens, mean over layers, by the order of the tokens.
    """

    strength: float
    ce: float
    nnz: float
    unions: dict[str, float]

    @classmethod
    def of(cls, strength: float, quality: Quality, unions: Unions) -> "Point":
        """From what a sweep measures of a run."""
        return cls(
            strength, quality.ce, quality.nnz, {"text": mean(unions.text), "alike": mean(unions.alike)}
        )


def run(
    sweep: Path,
    strengths: Sequence[float],
    token_order: TokenOrderName | None = None,
    *,
    figure: bool = True,
) -> dict[str, Any]:
    """Trains each strength, and writes ``panel_l1.json``, ``.md`` and ``.png`` into the sweep's directory.

    Args:
      sweep: its directory.
      strengths: values of λ for the penalty.
      token_order: in which order of the tokens panels are penalised, as ``model.token_order``; the sweep's
        own by default.
      figure: draw it, with matplotlib.

    Raises:
      UserError: there is no sweep with rows of λ.
    """
    sweep = sweep.expanduser().absolute()
    curve, base = _read_sweep(sweep)
    if token_order is not None:
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, token_order=token_order))
    text = HeldoutText(base, sweep / loop.CACHE)
    points: list[Point] = []
    file = JsonFile(sweep / f"{NAME}.json")
    found: dict[str, Any] = {}
    with compiling_once(sweep / COMPILED):
        for strength in strengths:
            config = _run_of(base, sweep, strength)
            if config.steps not in complete_steps(Path(config.workdir) / SUBDIRECTORY):
                result = loop.run(
                    config, cache=sweep / loop.CACHE, build=partial(penalised, panel=PANEL)
                )  # fmt: skip
                if result.outcome == "stopped":
                    break
            quality = read_quality(Path(config.workdir), d_ff=config.model.d_ff)
            points.append(Point.of(strength, quality, unions_of_run(Path(config.workdir), text)))
            found = _document(base, curve, points)
            file.write(found)
            (sweep / f"{NAME}.md").write_text(markdown(curve, points), encoding="utf-8")
            if figure:
                draw(curve, points, sweep / f"{NAME}.png")
    print(markdown(curve, points))
    return found


def _read_sweep(sweep: Path) -> tuple[list[Point], TrainConfig]:
    """Points of the rows that differ in λ alone, and the first one's run."""
    try:
        rows = json.loads((sweep / JSON_NAME).read_text(encoding="utf-8"))["rows"]
        rows = [row for row in rows if row["variant"] == L1 and row["quality"] and row["unions"]]
        config = read_config(sweep / rows[0]["name"] / manifest.CONFIG_NAME)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"--sweep must name the directory of a sweep with rows of λ; {sweep} is none"
        ) from error
    points = []
    for row in rows:
        unions = {order: mean(row["unions"][order]) for order in ORDERS}
        points.append(Point(row["l1"], row["quality"]["ce"], mean(row["quality"]["l0_per_layer"]), unions))
    return points, config


def _run_of(base: TrainConfig, sweep: Path, strength: float) -> TrainConfig:
    order = base.model.token_order
    name = f"panel-l1-{strength:g}" + ("" if order == "text" else f"-{order}")
    sparse = dataclasses.replace(SparsityConfig(), l1=strength, dead_after=base.model.sparsity.dead_after)
    model = dataclasses.replace(base.model, sparsity=sparse)
    return dataclasses.replace(base, workdir=str(sweep / name), model=model)


def union_at(curve: Sequence[Point], ce: float, order: str) -> float | None:
    """The least union that the curve reaches at a cross-entropy of at most ``ce``, by straight lines between
    its points on a logarithmic axis of unions; None below its least cross-entropy."""
    front: list[Point] = []
    for point in sorted(curve, key=lambda point: point.ce):
        if not front or point.unions[order] < front[-1].unions[order]:
            front.append(point)
    if ce < front[0].ce:
        return None
    for left, right in itertools.pairwise(front):
        if ce < right.ce:
            share = (ce - left.ce) / (right.ce - left.ce)
            logs = math.log(left.unions[order]), math.log(right.unions[order])
            return math.exp(logs[0] + share * (logs[1] - logs[0]))
    return front[-1].unions[order]


def _ratio(curve: Sequence[Point], point: Point, order: str) -> float | None:
    """The point's union as a share of the curve's at the same cross-entropy."""
    beside = union_at(curve, point.ce, order)
    return None if beside is None else point.unions[order] / beside


def markdown(curve: Sequence[Point], points: Sequence[Point]) -> str:
    """A row a model, L1's first; the last two columns set the other penalty beside L1 at the same CE."""
    head = [
        "penalty",
        "λ",
        "held-out CE",
        "nnz",
        "union, text",
        "union, alike",
        "of L1's, text",
        "of L1's, alike",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, each in (("L1", curve), ("panels", points)):
        for point in each:
            ratios = [None if name == "L1" else _ratio(curve, point, order) for order in ORDERS]
            lines.append(
                [
                    name, f"{point.strength:g}", f"{point.ce:.4f}", f"{point.nnz:.1f}",
                    *(f"{point.unions[order]:.0f}" for order in ORDERS),
                    *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                ]
            )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(curve: Sequence[Point], points: Sequence[Point], path: Path) -> None:
    """Unions against held-out CE, a chart for each order of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    titles = "tokens in the order of the text", "alike tokens side by side"
    for axes, order, title in zip(figure.subplots(1, 2), ORDERS, titles, strict=True):
        for name, style, each in (("L1", "o-", curve), ("penalty on panels", "s--", points)):
            ordered = sorted(each, key=lambda point: point.ce)
            x, y = [point.ce for point in ordered], [point.unions[order] for point in ordered]
            axes.plot(
                x, y, style, color="black", markerfacecolor="white" if style == "s--" else "black", label=name
            )
            for point in ordered:
                where = (point.ce, point.unions[order])
                axes.annotate(
                    f"{point.strength:g}", where, textcoords="offset points", xytext=(5, 4), fontsize="small"
                )
        axes.set(
            title=title,
            xlabel="held-out cross-entropy, nats",
            ylabel=f"neurons of {PANEL} tokens",
            yscale="log",
        )
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


def _document(base: TrainConfig, curve: Sequence[Point], points: Sequence[Point]) -> dict[str, Any]:
    return {
        "config": to_dict(base),
        "panel": PANEL,
        "l1": [dataclasses.asdict(point) for point in curve],
        "panel_l1": [
            dataclasses.asdict(point) | {"of_l1": {order: _ratio(curve, point, order) for order in ORDERS}}
            for point in points
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m train.experiments.panel_l1", description=__doc__)
    parser.add_argument("--sweep", type=Path, required=True, help="directory of a finished sweep")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5, 3e-5])
    parser.add_argument(
        "--token-order", choices=("text", "centroids"), help="order in which panels are penalised"
    )
    parser.add_argument("--no-figure", action="store_true", help="draw nothing")
    options = parser.parse_args(argv)
    try:
        run(options.sweep, options.strengths, options.token_order, figure=not options.no_figure)
    except UserError as error:
        print(f"panel_l1: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
