"""Draws the pictures of docs/images: ``python docs/_site/draw.py``. Needs the extra ``plot``.

Speed is read from the stored results, what PanelELL holds from `PanelELL.from_dense` of a small gate. Colours
differ in lightness as well, so that pictures read in grey.
"""

import hashlib
import json
import statistics
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from pallas_kernels import PanelELL

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
GAIN = ROOT / "pallas_kernels" / "results" / "nvidia_h100_80gb_hbm3" / "layers_nnz.json"

ACTIVE, UNION, EMPTY, LINE = "#1f4e79", "#bcd4ea", "#ffffff", "#444444"
WEIGHTS, SECOND = "#e6a04b", "#c05a2e"
PAPER_NNZ = (24, 39)
"""Mean active neurons a token of the paper's models at its λ."""
P, F = 8, 24
"""Tokens of a panel and neurons of the drawn layer."""


def main() -> None:
    mpl.rcParams.update({"svg.hashsalt": "sparse-lm", "font.size": 11, "font.family": "sans-serif"})
    IMAGES.mkdir(exist_ok=True)
    for draw in (gain, panel_format, panel_stages):
        figure = draw()
        name = draw.__name__.replace("_", "-")
        metadata = {"Date": None, "Source": source_of_gain() if draw is gain else None}
        figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata=metadata, facecolor="white")
        plt.close(figure)


def source_of_gain() -> str:
    """The file that `gain` shows, with a hash by which a test knows that the picture is of it."""
    return f"{GAIN.name} sha256 {hashlib.sha256(GAIN.read_bytes()).hexdigest()}"


def gain() -> plt.Figure:
    """How many times as fast as the dense layer a forward is, over the activity."""
    stored = json.loads(GAIN.read_text())
    nnz = [case["measured"]["mean_nnz"] for case in stored["cases"]]
    figure, axes = plt.subplots(figsize=(8, 3.6))
    axes.axvspan(*PAPER_NNZ, color="#dddddd", lw=0)
    axes.text(np.sqrt(PAPER_NNZ[0] * PAPER_NNZ[1]), 0.13, "the paper's\nmodels", ha="center", color=LINE)
    axes.axhline(1, color="black", lw=1.5)
    axes.text(11, 1.04, "dense layer (XLA)", va="bottom")
    for name, label, style in (
        ("panel", "PanelELL", {"color": ACTIVE, "marker": "o", "lw": 2.5}),
        ("twell", "TwELL, the paper's format", {"color": SECOND, "marker": "s", "lw": 1.8, "ls": "--"}),
    ):
        speed = [_median(case, "dense") / _median(case, name) for case in stored["cases"]]
        axes.plot(nnz, speed, label=label, **style)
    axes.set(xscale="log", xlim=(9, 1000), ylim=(0, 3.0))
    axes.set_xticks(ticks := [10, 30, 60, 125, 250, 500, 900], [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlabel("active neurons of a token, mean, of 5,632")
    axes.set_ylabel("times as fast as dense")
    axes.set_title(
        f"Forward of a feed-forward layer, 65,536 tokens, {stored['device']['kind'].removeprefix('NVIDIA ')}",
        fontsize=11,
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _median(case: dict, name: str) -> float:
    (row,) = [row for row in case["rows"] if row["name"] == name]
    return statistics.median(row["timing"]["samples_ms"])


def panel_format() -> plt.Figure:
    """The gates of two panels, and what PanelELL holds of them."""
    gate = _gates()
    packed = PanelELL.from_dense(jnp.asarray(gate), panel=P, chunk=4)
    figure, axes = plt.subplots(figsize=(9.5, 5.6))
    top = 2 * P + 7
    for panel in range(2):
        rows = gate[panel * P : (panel + 1) * P]
        union = np.flatnonzero(rows.any(0))
        y0 = top - panel * (P + 1)
        for token in range(P):
            for neuron in range(F):
                colour = ACTIVE if rows[token, neuron] else UNION if neuron in union else EMPTY
                _cell(axes, neuron, y0 - token, colour)
        axes.text(-0.6, y0 - P / 2 + 1, f"panel {panel}:\n{P} tokens", ha="right", va="center")
    axes.text(F / 2, top + 1.9, f"gates: a row a token, a column a neuron, F = {F}", ha="center")

    first, counts = np.asarray(packed.offsets), np.asarray(packed.counts)
    neurons, values = np.asarray(packed.neurons), np.asarray(packed.values)
    x0 = F + 7
    for slot in range(int(first[-1])):
        panel = int(np.searchsorted(first[1:], slot, side="right"))
        y = top + 1 - slot - panel
        used = slot - first[panel] < counts[panel]
        axes.text(x0 - 0.4, y + 0.5, str(neurons[slot]) if used else "–", ha="right", va="center", fontsize=9)
        for token in range(P):
            colour = ACTIVE if values[slot, token] else UNION if used else "#eeeeee"
            _cell(axes, x0 + token, y, colour)
    axes.text(x0 + 3, top + 4.2, "PanelELL", ha="center", weight="bold")
    axes.text(x0 - 0.4, top + 2.6, "neurons", ha="right", va="center")
    axes.text(x0 + P / 2 + 1, top + 2.6, "values (slots, P)", ha="center", va="center")
    for panel in range(2):
        y = top + 1 - (first[panel] + first[panel + 1]) / 2 - panel + 1
        axes.text(x0 + P + 0.6, y, f"panel {panel}\n{counts[panel]} neurons", va="center")
    _arrow(axes, (F + 0.5, top - P / 2), (x0 - 2.6, top - P / 2))
    for nth, (colour, label) in enumerate(
        [
            (ACTIVE, "active gate"),
            (UNION, "silent gate of a neuron that another token of the panel activates: computed, and zero"),
            (EMPTY, "neuron that no token of the panel activates: not stored, and left out of up and down"),
            ("#eeeeee", "slot that fills up the panel's last chunk"),
        ]
    ):
        _cell(axes, 0, 3.4 - 1.6 * nth, colour)
        axes.text(1.6, 3.9 - 1.6 * nth, label, va="center")
    axes.set(xlim=(-5, x0 + P + 7), ylim=(-2, top + 5.4), aspect="equal")
    axes.axis("off")
    return figure


def _gates() -> np.ndarray:
    """(2 P, F): tokens of a panel share most of their neurons."""
    generator = np.random.default_rng(3)
    gate = np.zeros((2 * P, F), np.float32)
    for panel, favourites in enumerate(([2, 3, 9, 14, 20], [0, 5, 9, 12, 17, 18, 22])):
        for token in range(P):
            chosen = generator.choice(favourites, size=3, replace=False)
            gate[panel * P + token, chosen] = 1
    gate[5, 11] = 1  # one token alone
    return gate


def _cell(axes, x: float, y: float, colour: str) -> None:
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="#999999", lw=0.5))


def _arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=LINE, lw=1.4))


def panel_stages() -> plt.Figure:
    """The forward of one panel: gate, list, up projection and down projection."""
    gate = _gates()[:P]
    union = np.flatnonzero(gate.any(0))
    figure, axes = plt.subplots(figsize=(12, 4.6))
    _panel_stage_gate(axes, gate, union)
    _panel_stage_up(axes, gate, union, x0=F + 8)
    _panel_stage_down(axes, union, x0=F + 37)
    axes.set(xlim=(-1.5, F + 60), ylim=(-10.5, P + 3.5), aspect="equal")
    axes.axis("off")
    return figure


def _panel_stage_gate(axes, gate: np.ndarray, union: np.ndarray) -> None:
    axes.text(0, P + 2, "1  gate: x Wgᵀ, all neurons", weight="bold")
    for token in range(P):
        for neuron in range(F):
            colour = ACTIVE if gate[token, neuron] else UNION if neuron in union else EMPTY
            _cell(axes, neuron, P - 1 - token, colour)
    axes.text(0, -8.5, "2  list: all that are active", weight="bold")
    for nth, neuron in enumerate(union):
        x = F / 2 - len(union) * 1.5 + 3 * nth
        axes.add_patch(Rectangle((x, -6), 3, 2, facecolor=UNION, edgecolor="#999999"))
        axes.text(x + 1.5, -5, str(neuron), ha="center", va="center")
        axes.plot([neuron + 0.5, x + 1.5], [0, -4], color="#aaaaaa", lw=0.7, zorder=0)


def _panel_stage_up(axes, gate: np.ndarray, union: np.ndarray, x0: float) -> None:
    """The panel's tokens by the gathered rows of Wu, and their product with the gates."""
    axes.text(x0, P + 2, "3  up: gathered rows of Wu", weight="bold")
    _weights(axes, x0, union, "Wu")
    x = x0 + 9
    axes.text(x + 1.2, P / 2, "·", fontsize=20, ha="center", va="center")
    axes.add_patch(Rectangle((x + 3, P - 6), P, 6, facecolor="#d9d9d9", edgecolor="#999999"))
    axes.text(x + 3 + P / 2, P - 3, "xᵀ\n(D, P)", ha="center", va="center")
    y = -9
    axes.text(x0 - 0.5, y + len(union) / 2, "h =", ha="right", va="center")
    for nth, neuron in enumerate(union):
        for token in range(P):
            _cell(axes, x0 + token, y + len(union) - 1 - nth, ACTIVE if gate[token, neuron] else UNION)
    axes.text(x0 + P + 0.8, y + len(union) / 2, "gate ∘ up,\n(union, P)", va="center")
    _arrow(axes, (x0 + 4, P - F / 2 * 0.62 - 0.8), (x0 + 4, y + len(union) + 0.5))


def _panel_stage_down(axes, union: np.ndarray, x0: float) -> None:
    """The sum over the union of h and the gathered rows of Wd."""
    axes.text(x0, P + 2, "4  down: gathered rows of Wd", weight="bold")
    axes.add_patch(Rectangle((x0, P - len(union)), P, len(union), facecolor=UNION, edgecolor="#999999"))
    axes.text(x0 + P / 2, P - len(union) / 2, "h", ha="center", va="center")
    axes.text(x0 + P + 1.6, P / 2, "ᵀ ·", fontsize=16, ha="center", va="center")
    _weights(axes, x0 + P + 3.6, union, "Wd")
    axes.add_patch(Rectangle((x0 + 4, -9), 8, P * 0.8, facecolor="#d9d9d9", edgecolor="#999999"))
    axes.text(x0 + 8, -9 + P * 0.4, "y  (P, D)", ha="center", va="center")
    _arrow(axes, (x0 + 8, P - F / 2 * 0.62 - 0.8), (x0 + 8, -9 + P * 0.8 + 0.5))


def _weights(axes, x0: float, union: np.ndarray, name: str) -> None:
    """A weight (F, D), of which the rows of the list are read."""
    height = 0.31
    for neuron in range(F):
        colour = WEIGHTS if neuron in union else EMPTY
        axes.add_patch(
            Rectangle(
                (x0, P - height * (neuron + 1)), 8, height, facecolor=colour, edgecolor="#bbbbbb", lw=0.4
            )
        )
    axes.text(x0 + 8.4, P - height * F - 0.2, f"{name}", va="top", ha="right", color=LINE)


if __name__ == "__main__":
    main()
