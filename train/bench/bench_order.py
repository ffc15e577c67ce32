"""The orders of a trained model's tokens, side by side: ``sparse-lm bench order``."""

import dataclasses
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from pallas_kernels import dispatch
from pallas_kernels.errors import RequestError
from sparse_lm import ModelConfig
from train.bench import order_counts, order_plot, order_times, results
from train.bench.order_counts import TEXT, Row
from train.bench.order_times import LayerTimes, MoveCosts
from train.bench.text_layers import TextLayers
from train.output import JsonFile, print_table
from train.picture import check_ending

_FIT_TOKENS = 32768


@dataclasses.dataclass(frozen=True)
class BenchOrderOptions:
    """Counts how many neurons panels of tokens activate together in each layer of a trained model, by the
    order of the tokens, on its held-out text; and what each order costs.

    Attributes:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      tokens: tokens of a call, each number a table of its own; text that is shorter gives one shorter call.
      panels: sizes of a panel.
      clusters: how many clusters of the first layer's input, or of the embedding, are told apart; orders of
        one layer alone take the first number.
      times: also time all feed-forward layers with these formats, tokens as they come and in the best order
        that a forward can make, against dense ones: forward on the most tokens, forward and backward on the
        fewest.
      json: also write all figures to this file.
      picture: also draw the unions of the largest call against P: a .png, .svg or .pdf; needs matplotlib.
      debug: show the traceback of an error.
    """

    checkpoint: str
    tokens: tuple[int, ...] = (16384, 65536)
    panels: tuple[int, ...] = (64, 128, 256)
    clusters: tuple[int, ...] = (64,)
    times: tuple[Literal["auto", "panel", "hybrid", "twell"], ...] = ()
    json: str | None = None
    picture: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "panels", "clusters"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                given = " ".join(map(str, values)) or "none"
                raise RequestError(f"{name} must be numbers of at least 1; got {given}")
        if self.picture is not None:
            check_ending(self.picture, option="--picture")


def run(options: BenchOrderOptions) -> None:
    """Counts, times and prints, and writes what ``json`` asks for.

    Raises:
      UserError: no such checkpoint, no text, or no place for the file.
      RequestError: a format cannot run here.
    """
    console, file = Console(highlight=False, soft_wrap=True), JsonFile(options.json)
    if options.picture is not None:
        order_plot.check_possible(options.picture)
    layers = TextLayers(options.checkpoint, max(options.tokens), _FIT_TOKENS)
    _check_formats(options, layers.model.config)
    orders = order_counts.forward_orders(layers, options.clusters)
    document: dict[str, Any] = {
        **results.machine_record(),
        "step": layers.step,
        "d_ff": layers.model.config.d_ff,
        "panels": options.panels,
        "clusters": options.clusters,
        "tables": [],
        "times": [],
    }
    if not layers.fit_on_other_text:
        console.print("the held-out text is short: clusters are fitted to the tokens that are counted")
    sizes = sorted({min(tokens, len(layers.tokens)) for tokens in options.tokens})
    best: dict[int, str] = {}
    order_us: dict[int, float] = {}
    for tokens in sizes:
        rows = order_counts.count_unions(
            layers, orders, tokens=tokens, panels=options.panels, count=options.clusters[0]
        )
        costs = order_times.order_costs(layers, orders, tokens)
        best[tokens] = order_counts.best_of_forward(rows)
        order_us[tokens] = costs[best[tokens]]
        moves = order_times.move_costs(layers, orders[best[tokens]], tokens)
        print_table(console, union_table(rows, costs, tokens, options.panels))
        console.print(_moves_sentence(moves), markup=False)
        document["tables"].append(_table_document(rows, costs, moves, tokens, options.panels))
        file.write(document)
    if options.picture is not None:
        d_ff = layers.model.config.d_ff
        order_plot.draw(rows, options.panels, options.picture, tokens=sizes[-1], d_ff=d_ff)
        console.print(f"picture: {options.picture}", markup=False)
    for format in options.times:
        for train, tokens in ((False, sizes[-1]), (True, sizes[0])):
            times = order_times.layer_times(
                layers, orders[best[tokens]], format=format, tokens=tokens, train=train
            )
            order_ms = order_us[tokens] / 1e3
            speeds = order_times.speedups(times, order_ms)
            print_table(console, times_table(times, best[tokens], order_ms, speeds))
            document["times"].append(
                dataclasses.asdict(times)
                | {"order": best[tokens], "order_us": order_us[tokens], "speedups": speeds}
            )
            file.write(document)


def _check_formats(options: BenchOrderOptions, model: ModelConfig) -> None:
    """Raises RequestError where a format cannot run here, before anything is counted."""
    x = jax.ShapeDtypeStruct((max(options.tokens), model.d_model), model.dtype)
    w = jax.ShapeDtypeStruct((model.d_ff, model.d_model), model.dtype)
    for format in options.times:
        dispatch.choose(model.ffn.with_format(format, "auto"), dispatch.Call.of(x, w))


def union_table(rows: list[Row], costs: dict[str, float], tokens: int, panels: tuple[int, ...]) -> Table:
    """For people: a row an order, a column a panel size with one number a layer, and their mean as a share of
    the text's."""
    table = Table(title=f"neurons that P tokens activate together, by layer; calls of {tokens:,} tokens")
    table.add_column("order")
    table.add_column("µs", justify="right")
    for panel in panels:
        table.add_column(f"P {panel}", justify="right")
        table.add_column("of text", justify="right")
    text = next(row for row in rows if row.name == TEXT)
    for row in sorted(rows, key=lambda row: not row.of_forward):
        cost = costs.get(row.name)
        cells = [row.name, "" if cost is None else f"{cost:.0f}"]
        for at in range(len(panels)):
            share = row.unions[:, at].mean() / max(text.unions[:, at].mean(), 1e-9)
            cells += [", ".join(f"{union:.0f}" for union in row.unions[:, at]), f"{share:.2f}"]
        table.add_row(*cells)
    return table


def times_table(times: LayerTimes, name: str, order_ms: float, speeds: dict[str, float]) -> Table:
    """For people: a row a layer, then all of them with the making of the order."""
    what = "forward" if times.direction == "forward" else "forward and backward"
    table = Table(title=f"ms of {what}, {times.tokens:,} tokens, format {times.format}; order: {name}")
    for column in ("layer", "dense", "as they come", "in the order"):
        table.add_column(column, justify="right")
    rows = zip(times.dense, times.text, times.ordered, strict=True)
    for layer, each in enumerate(rows):
        table.add_row(str(layer), *(f"{value:.3f}" for value in each))
    table.add_section()
    totals = sum(times.dense), sum(times.text), sum(times.ordered) + order_ms
    table.add_row("all, with making the order", *(f"{total:.3f}" for total in totals))
    table.add_row("times as fast as dense", "1", *(f"{speeds[key]:.2f}" for key in ("text", "ordered")))
    return table


def _moves_sentence(moves: MoveCosts) -> str:
    return (
        f"a layer in an order: its norm takes {moves.ordered_norm:.0f} µs and not {moves.norm:.0f}, the sum "
        f"behind it {moves.ordered_sum:.0f} and not {moves.sum:.0f}: {moves.of_order:+.0f} µs"
    )


def _table_document(
    rows: list[Row], costs: dict[str, float], moves: MoveCosts, tokens: int, panels: tuple[int, ...]
) -> dict[str, Any]:
    unions = {row.name: {str(p): row.unions[:, at].tolist() for at, p in enumerate(panels)} for row in rows}
    return {
        "tokens": tokens,
        "unions": unions,
        "of_forward": [row.name for row in rows if row.of_forward],
        "cost_us": costs,
        "move_us": dataclasses.asdict(moves),
    }
