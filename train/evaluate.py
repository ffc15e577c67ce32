"""How good and how sparse a model is on text that it was not trained on."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pallas_kernels import FFNStats
from sparse_lm import sparsity
from train.data.batches import heldout_batches
from train.data.holdout import TextChoice
from train.errors import UserError
from train.heldout import MORE_TEXT, read_heldout
from train.loss import training_loss
from train.run.checkpoint_reading import load_for_inference
from train.state import Params

Evaluator = Callable[[Params, jax.Array], tuple[jax.Array, FFNStats]]


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Held-out figures of one checkpoint.

    Attributes:
      step: optimizer steps behind the model.
      tokens: target tokens evaluated.
      ce: mean cross-entropy in nats per token.
      unigram_entropy: entropy of the evaluated tokens' own frequencies in nats: the least CE that a model
        could reach that knew these and looked at no context. From this process's share of the text.
      bits_per_byte: the same text's code length per UTF-8 byte, which does not depend on the tokenizer.
      d_ff: F, neurons of each layer.
      l0_per_layer: mean active neurons per token.
      max_nnz_per_layer: the most active neurons of any token.
      silent_fraction_per_layer: share of neurons that no evaluated token activated.
      notes: sentences on what was evaluated, where that is not the held-out text of the training.
    """

    step: int
    tokens: int
    ce: float
    unigram_entropy: float
    bits_per_byte: float
    d_ff: int
    l0_per_layer: tuple[float, ...]
    max_nnz_per_layer: tuple[int, ...]
    silent_fraction_per_layer: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(self.ce) if self.ce < 700 else math.inf

    @property
    def l0(self) -> float:
        """Mean over layers."""
        return sum(self.l0_per_layer) / len(self.l0_per_layer)

    @property
    def silent_fraction(self) -> float:
        """Mean over layers, which all have F neurons."""
        return sum(self.silent_fraction_per_layer) / len(self.silent_fraction_per_layer)

    def table(self) -> Group:
        """For people: the figures of the whole model on one line, then a table with a row a layer."""
        headline = (
            f"step {self.step}, {self.tokens} held-out tokens: CE {self.ce:.4f} (token frequencies alone: "
            f"{self.unigram_entropy:.4f}), perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits per byte"
        )
        table = Table()
        for name in ("layer", "l0", f"% of {self.d_ff}", "max nnz", "silent"):
            table.add_column(name, justify="right")
        layers = zip(self.l0_per_layer, self.max_nnz_per_layer, self.silent_fraction_per_layer, strict=True)
        for layer, (l0, max_nnz, silent) in enumerate(layers):
            table.add_row(str(layer), f"{l0:.1f}", f"{l0 / self.d_ff:.1%}", str(max_nnz), f"{silent:.1%}")
        table.add_section()
        table.add_row(
            "all", f"{self.l0:.1f}", f"{self.l0 / self.d_ff:.1%}",
            str(max(self.max_nnz_per_layer)), f"{self.silent_fraction:.1%}",
        )  # fmt: skip
        return Group(*map(Text, self.notes), headline, table)

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and derived figure, ready for JSON."""
        derived = {"perplexity": self.perplexity, "l0": self.l0, "silent_fraction": self.silent_fraction}
        return dataclasses.asdict(self) | derived


def make_evaluator(graphdef: nnx.GraphDef) -> Evaluator:
    """Jitted ``(params, tokens (B, S + 1) int32) -> (ce () f32, statistics with a leading layer axis)``."""

    @jax.jit
    def evaluator(params: Params, tokens: jax.Array) -> tuple[jax.Array, FFNStats]:
        _, (terms, stats) = training_loss(nnx.merge(graphdef, params), tokens, 0.0)
        return terms["ce"], stats

    return evaluator


def evaluate(
    evaluator: Evaluator,
    params: Params,
    batches: Sequence[dict[str, Any]],
    *,
    step: int,
    d_ff: int,
    place: Callable[[np.ndarray], jax.Array] = jax.numpy.asarray,
) -> EvaluationReport:
    """Evaluates over batches, whose sizes may differ.

    Args:
      evaluator: from ``make_evaluator``.
      params: of the model.
      batches: from ``heldout_batches``.
      step: for the report.
      d_ff: for the report.
      place: puts this process's rows where the evaluator wants them.
    """
    outputs = [evaluator(params, place(batch["tokens"])) for batch in batches]
    losses, stats = zip(*jax.device_get(outputs), strict=True)
    rows = [int(batch["rows"]) for batch in batches]
    layers = jax.tree.map(np.asarray, sparsity.layer_summary(_merged(stats, rows)))
    ce = float(np.average(np.asarray(losses, np.float64), weights=rows))
    tokens = sum(rows) * (batches[0]["tokens"].shape[1] - 1)
    size = sum(int(batch["bytes"]) for batch in batches)
    return EvaluationReport(
        step=step,
        tokens=tokens,
        ce=ce,
        unigram_entropy=_entropy(np.concatenate([_targets(batch) for batch in batches])),
        bits_per_byte=ce * tokens / size / math.log(2),
        d_ff=d_ff,
        l0_per_layer=tuple(map(float, layers["l0"])),
        max_nnz_per_layer=tuple(map(int, layers["max_nnz"])),
        silent_fraction_per_layer=tuple(map(float, layers["silent_fraction"])),
    )


def _targets(batch: dict[str, Any]) -> np.ndarray:
    """Target tokens of a batch's different rows, as far as this process has them."""
    return batch["tokens"][: batch["rows"], 1:].ravel()


def _merged(stats: Sequence[FFNStats], rows: Sequence[int]) -> FFNStats:
    """Statistics of all batches: means weighted by the rows that a batch stands for."""
    stacked: Any = jax.tree.map(lambda *parts: np.stack(parts), *stats)
    means: Any = {name: np.average(getattr(stacked, name), axis=0, weights=rows) for name in ("l1", "l0")}
    return dataclasses.replace(FFNStats.merged(stacked), **means)


def _entropy(tokens: np.ndarray) -> float:
    """Nats of the frequencies of integers."""
    frequencies = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-np.sum(frequencies * np.log(frequencies)))


def evaluate_checkpoint(
    directory: str | Path,
    *,
    tokens: int | None = None,
    batch_size: int | None = None,
    paths: Sequence[str] = (),
    text_field: str | None = None,
    every_document: bool = False,
) -> EvaluationReport:
    """Evaluates a checkpoint on the held-out documents of the corpus that it was trained on, or of another.

    What is held out is decided by each document's own hash, as in training, so that no document that training
    may have seen counts, whatever was added to the corpus or taken away.

    Args:
      directory: a run's workdir, one step's directory, or a converted model.
      tokens: at most so many; by default as in training.
      batch_size: sequences of a batch; by default a micro-batch of training. It changes no figure.
      paths: where the corpus is now, or another one; by default where it was in training; for a
        converted model the corpus that ships with the package.
      text_field: field of a document of ``paths`` that holds its text; by default as in training.
      every_document: also the documents of ``paths`` that training would not hold out.

    Raises:
      UserError: no such checkpoint, the corpus is gone, or a number under 1.
    """
    for name, value in (("tokens", tokens), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1; got {value}")
    model, tokenizer, config, step = load_for_inference(directory)
    wanted = tokens or config.report.evaluate_tokens
    choice = TextChoice(tuple(paths), text_field, every_document)
    text, notes = read_heldout(directory, config, tokenizer, choice, tokens=wanted)
    graphdef, variables = nnx.split(model)
    batches = heldout_batches(
        text.heldout,
        text.weights,
        context_length=config.model.context_length,
        tokens=wanted,
        batch_size=batch_size or config.batch_size // config.optimizer.accumulation,
        remedy=MORE_TEXT,
    )
    report = evaluate(
        make_evaluator(graphdef), nnx.to_pure_dict(variables), batches, step=step, d_ff=config.model.d_ff
    )
    return dataclasses.replace(report, notes=notes)
