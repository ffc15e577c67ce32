"""The text that a checkpoint is looked at with: what its training held out, or another corpus."""

import dataclasses
from pathlib import Path

import numpy as np

from train.config import TrainConfig
from train.data.batches import heldout_batches
from train.data.corpus import CorpusIdentity, describe
from train.data.evaluation_text import EvaluationText, read_evaluation_text
from train.data.holdout import TextChoice, usual_threshold
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.run.checkpoint_files import find_checkpoint
from train.run.checkpoint_reading import read_corpus

MORE_TEXT = "add text, or with --data.paths take all of it by --data.every-document"
"""What can be done about held-out text that is too short for a trained model."""


def read_heldout(
    directory: str | Path, config: TrainConfig, tokenizer: Tokenizer, choice: TextChoice, *, tokens: int
) -> tuple[EvaluationText, tuple[str, ...]]:
    """At least ``tokens`` tokens of the text chosen, if it has them, and sentences on what it is.

    What is held out is decided by each document's own hash, as in training, so that no document that training
    may have seen counts, whatever was added to the corpus or taken away. There is nothing to say where it is
    the held-out text of the training.

    Args:
      directory: the checkpoint, as `find_checkpoint` takes it.
      config: of the checkpoint; ``tokenizer``, likewise.
      choice: which text.
      tokens: wanted of each corpus of a mixture.

    Raises:
      UserError: the corpus is missing or bad, or its shards are of another tokenizer or split otherwise.
    """
    trained_on = read_corpus(find_checkpoint(directory))
    data = config.data
    if choice.paths:
        field = choice.text_field or data.text_field
        data = dataclasses.replace(data, paths=choice.paths, weights=(), text_field=field).absolute()
    threshold = trained_on.threshold if trained_on else usual_threshold(data.holdout)
    text = read_evaluation_text(
        data, tokenizer, threshold, tokens=tokens, every_document=choice.every_document
    )
    return text, _notes(trained_on, text, choice.every_document)


def sequences_of(text: EvaluationText, *, context_length: int, tokens: int) -> np.ndarray:
    """(N, S) int32: the first ⌊tokens / S⌋ sequences of a text, or all that it has.

    Raises:
      UserError: the text is shorter than a sequence.
    """
    batches = heldout_batches(
        text.heldout, text.weights, context_length=context_length, tokens=tokens, batch_size=1,
        remedy=MORE_TEXT,
    )  # fmt: skip
    return np.concatenate([np.asarray(batch["tokens"])[:, :-1] for batch in batches])


def check_sequence_fits(tokens: int, config: TrainConfig) -> None:
    """Raises UserError where so many tokens are less than a sequence of the model."""
    length = config.model.context_length
    if tokens < length:
        raise UserError(f"tokens must be at least {length}, one sequence of the model; got {tokens}")


def _notes(trained_on: CorpusIdentity | None, text: EvaluationText, every_document: bool) -> tuple[str, ...]:
    if every_document:
        return ("evaluated on every document, those that training may have seen too",)
    if trained_on is None:
        return (
            "what a converted model was trained on is not known: evaluated on the documents that training on "
            f"{describe(text.documents, text.fingerprint)} would hold out",
        )
    if text.fingerprint == trained_on.fingerprint:
        return ()
    return (
        f"the corpus is not the one trained on: {describe(text.documents, text.fingerprint)} here, "
        f"{trained_on} there; evaluated on the documents that training would hold out",
    )
