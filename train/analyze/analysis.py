"""Everything that ``sparse-lm analyze`` finds out about a checkpoint, in one object."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pallas_kernels.bench import machine
from sparse_lm import order
from train.analyze import activity, on_device, summary, training
from train.analyze.on_device import AutoReport
from train.analyze.summary import LayerSummary, Popularity, TokenExtremes
from train.analyze.training import Training
from train.bench import order_counts
from train.bench.order_times import LayerTimes
from train.bench.text_layers import TextLayers
from train.data.holdout import TextChoice
from train.data.tokenizer import Tokenizer
from train.run.checkpoint_files import find_checkpoint

PANELS = (16, 32, 64, 128, 256)
_TOKEN_ID = "token id"

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was found.

    Attributes:
      checkpoint: which one; ``step``, optimizer steps behind it.
      machine: what it was found on.
      notes: on what the text is, where that is not what training held out.
      tokens: M, of the text; ``context_length``, of a sequence; ``call``, put in order and timed at a time.
      d_ff: F.
      layers: a summary each.
      extremes: tokens of least and of most activity.
      by_position: (L, S), mean nnz.
      popularity: of neurons.
      panels: P of ``unions``, by order of the tokens (L, number of panel sizes).
      own_order: the order among them that the model itself runs in; ``"text"`` if it makes none.
      training: curves, or None; ``training_note`` says which or why not.
      times: of layers, or None; ``times_note`` says on what or why not.
      auto: what ``format="auto"`` would do; None for a text shorter than a panel.
    """

    checkpoint: str
    step: int
    machine: Mapping[str, Any]
    notes: tuple[str, ...]
    tokens: int
    context_length: int
    call: int
    d_ff: int
    layers: tuple[LayerSummary, ...]
    extremes: TokenExtremes
    by_position: np.ndarray
    popularity: Popularity
    panels: tuple[int, ...]
    unions: Mapping[str, np.ndarray]
    own_order: str
    training: Training | None
    training_note: str
    times: LayerTimes | None
    times_note: str
    auto: AutoReport | None

    @property
    def speedups(self) -> tuple[float, ...] | None:
        """How many times as fast as dense each layer is in the order that the model runs in."""
        if self.times is None:
            return None
        sparse = self.times.text if self.own_order == order_counts.TEXT else self.times.ordered
        return tuple(dense / each for dense, each in zip(self.times.dense, sparse, strict=True))

    @property
    def correlations(self) -> dict[str, float | None] | None:
        """Pearson's r over layers between the speed-up and ``"mean_nnz"``, and ``"max_nnz"``."""
        if self.speedups is None:
            return None
        names = ("mean_nnz", "max_nnz")
        return {
            name: summary.correlation([getattr(layer, name) for layer in self.layers], self.speedups)
            for name in names
        }

    def to_dict(self) -> dict[str, Any]:
        """Every figure and what follows from them, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = _plain(values)
        plain["speedups"], plain["correlations"] = _plain(self.speedups), self.correlations
        return plain


def analyze(checkpoint: str, *, tokens: int, call: int, text: TextChoice, on_progress: Progress) -> Analysis:
    """Runs a checkpoint over a text once, and finds out everything about it.

    Args:
      checkpoint: a run's workdir, one step's directory, or a converted model.
      tokens: at most so many, in whole sequences.
      call: tokens that are put in order, probed and timed at a time, as one forward's are.
      text: which text.
      on_progress: told about every part.

    Raises:
      UserError: no such checkpoint, the corpus is gone, or ``tokens`` is less than a sequence.
    """
    layers = TextLayers(
        checkpoint, tokens, 0, text=text, on_progress=lambda *part: on_progress("reading the text", *part)
    )
    own = order_counts.own_order(layers)
    # Beside the text's order stands the model's own, or else one that any model could take.
    name, make = own or (_TOKEN_ID, lambda ids, x: order.by_id(ids))
    call = min(call, len(layers.tokens))
    counted = activity.count(
        layers, {name: make}, panels=PANELS, call=call,
        on_progress=lambda *part: on_progress("counting neurons", *part),
    )  # fmt: skip
    choices = on_device.auto_choices(
        layers, make if own else None, call=call, on_progress=lambda *part: on_progress("probing", *part)
    )
    on_progress("timing layers", 0, 1)
    times, times_note = on_device.layer_times(layers, make, call=call)
    on_progress("timing layers", 1, 1)
    curves, training_note = training.read(find_checkpoint(checkpoint), up_to=layers.step, d_ff=counted.d_ff)
    return Analysis(
        checkpoint=str(find_checkpoint(checkpoint)),
        step=layers.step,
        machine=machine.record(),
        notes=layers.notes,
        tokens=len(layers.tokens),
        context_length=counted.context_length,
        call=call,
        d_ff=counted.d_ff,
        layers=tuple(summary.layers(counted)),
        extremes=summary.tokens(counted, lambda id: token_text(layers.tokenizer, id)),
        by_position=summary.by_position(counted),
        popularity=summary.popularity(counted),
        panels=counted.panels,
        unions=counted.unions,
        own_order=own[0] if own else order_counts.TEXT,
        training=curves,
        training_note=training_note,
        times=times,
        times_note=times_note,
        auto=choices,
    )


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as it can be shown: its text in quotes with blanks and line ends visible, or its number where
    it is no whole text by itself."""
    text = tokenizer.decode([id])
    return f"id {id}" if not text or "\N{REPLACEMENT CHARACTER}" in text else repr(text)


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and mappings as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
