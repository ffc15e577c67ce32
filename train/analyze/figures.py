"""The figures of an analysis. Each reads in grey too: curves differ in lightness, marker and line style, bars
in lightness and hatching."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.analyze.analysis import Analysis
from train.analyze.summary import TokenSummary
from train.bench.order_counts import TEXT
from train.errors import UserError
from train.picture import check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = ("layers", "speed", "tokens", "position", "training", "popularity", "unions", "auto")
FILE_NAMES = tuple(f"{name}.png" for name in _NAMES)
"""Of every figure that an analysis may have."""
_DPI = 150
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#141414", "marker": "o", "linestyle": "-"},
    {"color": "#7a2e86", "marker": "s", "linestyle": "--"},
    {"color": "#c8553d", "marker": "^", "linestyle": "-."},
    {"color": "#4f9fc4", "marker": "D", "linestyle": ":"},
    {"color": "#e3b23c", "marker": "v", "linestyle": (0, (6, 1, 1, 1, 1, 1))},
)
"""From dark to light."""
_DARK, _LIGHT = "#274c77", "#e3b23c"
_CURVES = len(_STYLES)
_MARKS = 12
_LATIN = 0x250


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure that was drawn: its name, what it shows in a few words, and its file."""

    name: str
    title: str
    path: Path


def draw(analysis: Analysis, out: Path) -> list[Picture]:
    """Writes every figure that there are numbers for into the directory ``out``, as PNG.

    Raises:
      UserError: matplotlib is missing, or a picture cannot be written.
    """
    check_matplotlib("analyze")
    from matplotlib.figure import Figure

    wanted: list[tuple[str, Callable[[Analysis, Figure], None], bool]] = [
        ("Active neurons by layer", _layers, True),
        ("Speed-up by layer against active neurons", _speed, analysis.speedups is not None),
        ("Tokens of least and most activity", _tokens, True),
        ("Active neurons by position in the sequence", _position, True),
        ("Active and dead neurons over training", _training, analysis.training is not None),
        ("How much of all activity the most popular neurons have", _popularity, True),
        ("Neurons that the tokens of a panel activate together", _unions, True),
        ("What format=auto would do in each layer", _auto, _has_probed_size(analysis)),
    ]
    pictures = []
    for name, (title, fill, there) in zip(_NAMES, wanted, strict=True):
        if there:
            figure = Figure(figsize=(8.4, 4.4), layout="constrained")
            fill(analysis, figure)
            path = out / f"{name}.png"
            try:
                figure.savefig(path, dpi=_DPI)
            except OSError as error:
                raise UserError(
                    f"--out must be a directory that can be written to; {path}: {error.strerror}"
                ) from error
            pictures.append(Picture(name, title, path))
    return pictures


def _layers(analysis: Analysis, figure: "Figure") -> None:
    axes = figure.add_subplot()
    at = np.arange(len(analysis.layers))
    kinds = (("mean", "mean_nnz", _DARK, ""), ("99th percentile", "p99_nnz", "#8d99ae", "///"),
             ("largest", "max_nnz", _LIGHT, "..."))  # fmt: skip
    for nth, (label, name, color, hatch) in enumerate(kinds):
        values = [getattr(layer, name) for layer in analysis.layers]
        axes.bar(
            at + 0.27 * (nth - 1), values, 0.27, label=f"{label} of a token", color=color, hatch=hatch,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    axes.axhline(analysis.d_ff, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"all {analysis.d_ff:,} neurons", (0, analysis.d_ff), xytext=(4, 3), textcoords="offset points",
        fontsize="small", xycoords=("axes fraction", "data"),
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(top=analysis.d_ff * 2)
    axes.set(xlabel="layer", ylabel="active neurons (nnz)")
    _layer_ticks(axes, len(at))
    _legend_above(axes, 3)


def _speed(analysis: Analysis, figure: "Figure") -> None:
    speedups, correlations = analysis.speedups, analysis.correlations
    assert speedups is not None and correlations is not None  # noqa: PT018
    by_layer, by_nnz = figure.subplots(1, 2)
    by_layer.bar(range(len(speedups)), speedups, color=_DARK)
    by_layer.axhline(1, color="black", linewidth=0.8, linestyle=":")
    by_layer.set(xlabel="layer", ylabel="times as fast as dense")
    _layer_ticks(by_layer, len(speedups))
    names = {"mean_nnz": "mean", "max_nnz": "largest"}
    for style, (name, label) in zip(_STYLES[::3], names.items(), strict=False):
        r = correlations[name]
        shown = f"{label} nnz" + ("" if r is None else f", r = {r:.2f}")
        x = [getattr(layer, name) for layer in analysis.layers]
        by_nnz.plot(x, speedups, color=style["color"], marker=style["marker"], linestyle="", label=shown)
    by_nnz.axhline(1, color="black", linewidth=0.8, linestyle=":")
    by_nnz.set_xscale("log")
    by_nnz.set(xlabel="active neurons of the layer (nnz)", ylabel="times as fast as dense")
    _legend_above(by_nnz, 2)


def _tokens(analysis: Analysis, figure: "Figure") -> None:
    left, right = figure.subplots(1, 2)
    figure.set_figheight(4.8)
    _token_bars(left, analysis.extremes.least, "least active", _LIGHT)
    _token_bars(right, analysis.extremes.most, "most active", _DARK)


def _token_bars(axes: "Axes", tokens: Sequence[TokenSummary], title: str, color: str) -> None:
    at = range(len(tokens))
    axes.barh(at, [token.mean_nnz for token in tokens], color=color, edgecolor="black", linewidth=0.4)
    axes.set_yticks(at, [_shown(token.text) for token in tokens], fontsize="small", parse_math=False)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="mean active neurons (nnz), over layers")


def _shown(text: str) -> str:
    """What matplotlib's own font can show of a token; other letters by their codes."""
    return "".join(c if ord(c) < _LATIN else ascii(c)[1:-1] for c in text)


def _position(analysis: Analysis, figure: "Figure") -> None:
    axes = figure.add_subplot()
    positions = np.arange(1, analysis.context_length + 1)
    curves = {"mean over layers": analysis.by_position.mean(axis=0)}
    curves |= {f"layer {layer}": analysis.by_position[layer] for layer in _chosen(analysis, _CURVES - 1)}
    for style, (label, curve) in zip(_STYLES, curves.items(), strict=False):
        # A mean of zero has no place on a logarithmic axis: the curve has a gap there.
        axes.plot(
            positions, np.where(curve > 0, curve, np.nan), label=label, markersize=4,
            markevery=_octave_starts(analysis.context_length), **style,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    starts = [start + 1 for start in _octave_starts(analysis.context_length)]
    axes.set_xticks(starts, [f"{start:,}" for start in starts])
    axes.set(xlabel="position in the sequence, from 1", ylabel="mean active neurons (nnz)")
    axes.grid(alpha=0.3)
    _legend_above(axes, _CURVES)


def _octave_starts(length: int) -> list[int]:
    return [2**nth - 1 for nth in range(length.bit_length())]


def _training(analysis: Analysis, figure: "Figure") -> None:
    training = analysis.training
    assert training is not None
    active, dead = figure.subplots(1, 2)
    lines = (
        (active, training.nnz, "mean active neurons (nnz)"),
        (dead, training.dead_share, f"dead: silent for {training.dead_after:,} tokens"),
    )
    for axes, curves, ylabel in lines:
        for style, layer in zip(_STYLES, _chosen(analysis, _CURVES), strict=False):
            axes.plot(
                training.tokens, curves[layer], label=f"layer {layer}", markersize=4,
                markevery=max(1, len(training.tokens) // _MARKS), **style,
            )  # fmt: skip
        axes.set(xlabel="tokens of training", ylabel=ylabel)
        axes.xaxis.set_major_formatter(_quantities())
        axes.grid(alpha=0.3)
    active.set_yscale("log")
    dead.set_ylim(bottom=0)
    if not np.any(training.dead_share):
        dead.set_ylim(top=1)
    dead.yaxis.set_major_formatter(_percent())
    figure.legend(*active.get_legend_handles_labels(), fontsize="small", frameon=False, ncols=_CURVES,
                  loc="outside upper left")  # fmt: skip


def _popularity(analysis: Analysis, figure: "Figure") -> None:
    axes = figure.add_subplot()
    shares = analysis.popularity.shares
    for style, layer in zip(_STYLES, _chosen(analysis, _CURVES), strict=False):
        axes.plot(
            shares, analysis.popularity.held[layer], label=f"layer {layer}", markersize=4,
            markevery=max(1, len(shares) // _MARKS), **style,
        )  # fmt: skip
    axes.plot(shares, shares, color="grey", linewidth=0.8, label="all alike")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_percent())
    axes.yaxis.set_major_formatter(_percent())
    for share in (0.01, 0.05, 0.1):
        axes.axvline(share, color="grey", linewidth=0.6, linestyle=":")
    axes.set_xticks([0.01, 0.05, 0.1, 0.5, 1.0])
    axes.minorticks_off()
    axes.set(xlabel="most popular share of the neurons", ylabel="share of all activity")
    axes.grid(axis="y", alpha=0.3)
    _legend_above(axes, 6)


def _unions(analysis: Analysis, figure: "Figure") -> None:
    axes = figure.add_subplot()
    for style, (name, unions) in zip(_STYLES[::3], analysis.unions.items(), strict=False):
        label = "order of the text" if name == TEXT else f"order: {name}"
        axes.plot(analysis.panels, unions.mean(axis=0), label=f"{label}, mean over layers", **style)
        low, high = unions.min(axis=0), unions.max(axis=0)
        hatch = "" if name == TEXT else "////"
        axes.fill_between(
            analysis.panels, low, high, facecolor=style["color"], alpha=0.15, hatch=hatch, linewidth=0,
            edgecolor=style["color"], label="least to most of a layer",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(analysis.panels, [str(panel) for panel in analysis.panels])
    axes.set_ylim(0, analysis.d_ff)
    axes.set(xlabel="P, tokens of a panel", ylabel=f"neurons that a panel activates, of {analysis.d_ff:,}")
    axes.grid(alpha=0.3)
    _legend_above(axes, 2)


def _has_probed_size(analysis: Analysis) -> bool:
    return analysis.auto is not None and analysis.auto.panel_tokens in analysis.panels


def _auto(analysis: Analysis, figure: "Figure") -> None:
    auto = analysis.auto
    assert auto is not None
    axes = figure.add_subplot()
    unions = analysis.unions[analysis.own_order][:, analysis.panels.index(auto.panel_tokens)]
    for layer, (union, choice) in enumerate(zip(unions, auto.layers, strict=True)):
        sparse = choice.panel_forward >= 0.5
        axes.bar(
            layer, union / analysis.d_ff, color=_DARK if sparse else _LIGHT, hatch="" if sparse else "///",
            edgecolor="white",
        )  # fmt: skip
    for kind, color, hatch in (("PanelELL", _DARK, ""), ("dense", _LIGHT, "///")):
        axes.bar(0, 0, color=color, hatch=hatch, edgecolor="white", label=f"forward takes {kind}")
    for limit, kind, style in (
        (auto.break_even_forward, "forward", "--"), (auto.break_even_train, "forward and backward", ":"),
    ):  # fmt: skip
        axes.axhline(limit, color="black", linestyle=style, linewidth=1, label=f"break-even, {kind}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(_percent())
    axes.set(xlabel="layer", ylabel=f"neurons that {auto.panel_tokens} tokens activate")
    _layer_ticks(axes, len(unions))
    _legend_above(axes, 2)


def _chosen(analysis: Analysis, count: int) -> list[int]:
    """Layers spread from the first to the last."""
    last = len(analysis.layers) - 1
    return sorted(set(np.linspace(0, last, min(count, last + 1)).round().astype(int).tolist()))


def _layer_ticks(axes: "Axes", layers: int) -> None:
    axes.set_xticks(range(0, layers, max(1, layers // 16)))


def _legend_above(axes: "Axes", columns: int) -> None:
    axes.legend(
        fontsize="small", frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
    )  # fmt: skip


def _quantities() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=None)
