"""The picture of ``bench order``: neurons that P tokens activate together, against P, a curve an order."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from train.bench.order_counts import FLOOR, TEXT, Row
from train.errors import UserError

ENDINGS = (".png", ".svg", ".pdf")


def check_possible(out: str | Path) -> None:
    """Raises UserError where no picture can be drawn, of that ending or in that directory."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--picture needs the package matplotlib, which is not installed: pip install 'sparse-lm[plot]'"
        )
    path = Path(out).absolute()
    if path.suffix not in ENDINGS:
        raise UserError(f"--picture must end with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}; got {out}")
    if not path.parent.is_dir():
        raise UserError(f"--picture must name a file in a directory that is there; {path.parent} is none")


def draw(rows: Sequence[Row], panels: Sequence[int], out: str | Path, *, tokens: int, d_ff: int) -> None:
    """Draws the mean over layers of each order's unions.

    Args:
      rows: the orders: those that a forward can make get full lines, others broken ones.
      panels: P of the rows' columns.
      out: the picture, its kind by its ending.
      tokens: of a call, for the title; ``d_ff``: F, likewise.

    Raises:
      UserError: matplotlib is missing, or the picture cannot be written.
    """
    check_possible(out)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for row in sorted(rows, key=lambda row: -row.unions.mean()):
        style = "k-" if row.name == TEXT else "k:" if row.name == FLOOR else "-" if row.of_forward else "--"
        axes.plot(panels, row.unions.mean(axis=0), style, marker="o", markersize=4, label=row.name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(panels, [str(panel) for panel in panels])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("P, tokens of a panel")
    axes.set_ylabel(f"active neurons of a panel, of {d_ff:,} (mean over layers)")
    axes.set_title(f"Orders of {tokens:,} held-out tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--picture must name a picture that can be written; {out}: {reason}") from error
