"""The picture of ``bench order``: neurons that P tokens activate together, against P, a curve an order."""

from collections.abc import Sequence
from pathlib import Path

from train.bench.order_counts import FLOOR, TEXT, Row
from train.picture import check_matplotlib, check_picture, save_picture


def check_possible(out: str | Path) -> None:
    """Raises UserError where no picture can be drawn, of that ending or in that directory."""
    check_matplotlib("--picture")
    check_picture(out, option="--picture")


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
    save_picture(figure, out, option="--picture")
