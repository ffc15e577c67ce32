"""What comes before a run's first step: its directory is taken, its tokenizer and corpus are opened and
compared."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config import TrainConfig
from train.data.corpus import Corpus, choose_tokenizer, open_corpus
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.run.checkpoint import Checkpoints
from train.run.lock import RunLock
from train.run.manifest import Parent
from train.run.parent import parent_tokenizer
from train.run.report import Reporter
from train.run.resume_checks import check_same_corpus, check_same_split, check_same_tokenizer


def check_trainable(config: TrainConfig) -> None:
    """Raises UserError for a compute type that training cannot use."""
    if config.model.dtype == "float16":
        raise UserError(
            "model.dtype must be bfloat16 or float32 in training; got float16, whose least number is 6e-8, "
            "so that small gradients vanish: choose bfloat16, which is as fast"
        )


@contextlib.contextmanager
def held(config: TrainConfig, reporter: Reporter) -> Iterator[None]:
    """Holds the work directory for all processes of the run; where it is held already, each of them stops."""
    lock, refusal = RunLock(Path(config.workdir)), None
    if jax.process_index() == 0:
        try:
            lock.acquire()
        except UserError as error:
            refusal = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.asarray(refusal is not None)):
        refusal = refusal or UserError("workdir could not be taken by the first process, which says why")
    if refusal is not None:
        raise refusal
    try:
        if lock.taken_from is not None:
            reporter.say(f"the run that held this directory has died ({lock.taken_from}): taking its place")
        yield
    finally:
        lock.release()


def run_tokenizer(
    config: TrainConfig,
    checkpoints: Checkpoints,
    start: int,
    parent: Parent | None,
    cache: Path,
    reporter: Reporter,
) -> Tokenizer:
    """The tokenizer of the run; a resumed one must go on with the same one, and a child with its parent's."""
    if start:
        saved, before, where = (
            checkpoints.tokenizer(start),
            checkpoints.config(start),
            checkpoints.path(start),
        )
    elif parent is not None:
        saved, before, where = parent_tokenizer(config, parent)
    else:
        return choose_tokenizer(config.data, config.model.vocab_size, cache, say=reporter.say)
    # A BPE fitted on the same data for the same vocabulary size is the same one: no need to fit it again.
    # A child has its parent's copy of the tokenizer, whatever has become of the file that was named there.
    same_name = config.data.tokenizer == before.data.tokenizer
    if not (same_name and (parent is not None or config.data.tokenizer == "bpe")):
        given = choose_tokenizer(config.data, config.model.vocab_size, cache, say=reporter.say)
        remedy = "choose another workdir" if start else "leave data.tokenizer out"
        check_same_tokenizer(saved, given, where, remedy=remedy)
    return saved


def run_corpus(
    config: TrainConfig,
    checkpoints: Checkpoints,
    start: int,
    tokenizer: Tokenizer,
    cache: Path,
    reporter: Reporter,
) -> Corpus:
    """The corpus of the run; a resumed one must go on with the same one, unless it may change."""
    with reporter.tokenizing() as on_progress:
        corpus = open_corpus(config.data, tokenizer, cache, on_progress=on_progress, say=reporter.say)
        if start:
            saved = checkpoints.data(start).corpus
            if not config.data.accept_change:
                check_same_corpus(saved, corpus.identity, checkpoints.path(start))
            elif saved.threshold != corpus.identity.threshold:
                # What was trained on must not become held out.
                corpus = open_corpus(
                    config.data, tokenizer, cache, threshold=saved.threshold,
                    on_progress=on_progress, say=reporter.say,
                )  # fmt: skip
                check_same_split(saved, corpus.identity, checkpoints.path(start))
    return corpus
