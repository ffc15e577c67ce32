"""The text that a trained model is evaluated on, read without the cache of its run."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.data.corpus import Heldout, find_groups, joined_fingerprint
from train.data.documents import Source, read_documents
from train.data.holdout import digest, is_held_out
from train.data.shards import InMemory, Joined, TokenShards
from train.data.tokenize import encode_measured, with_eos
from train.data.tokenizer import Tokenizer
from train.errors import UserError

if TYPE_CHECKING:
    from train.config import DataConfig


@dataclasses.dataclass(frozen=True)
class EvaluationText:
    """What a model is evaluated on.

    Attributes:
      heldout: one of each corpus of a mixture, or one.
      weights: their shares.
      documents: of the whole corpus, on both sides.
      fingerprint: of the whole corpus, as in `CorpusIdentity`.
    """

    heldout: tuple[Heldout, ...]
    weights: tuple[float, ...]
    documents: int
    fingerprint: str


def read_evaluation_text(
    config: "DataConfig", tokenizer: Tokenizer, threshold: int, *, tokens: int, every_document: bool = False
) -> EvaluationText:
    """Held-out text without a cache: of shards in place, of documents in one pass that keeps what it needs.

    Args:
      config: which files.
      tokenizer: of the model.
      threshold: documents whose hash lies under it are held out.
      tokens: at least so many are wanted of each corpus, if it has them.
      every_document: take the others too.

    Raises:
      UserError: the corpus is missing or bad, or its shards are of another tokenizer or split otherwise.
    """
    heldout, fingerprints, documents = [], [], 0
    for group in find_groups(config):
        if isinstance(group, TokenShards):
            index = group.index
            if (index.tokenizer, index.threshold) != (tokenizer.fingerprint, threshold):
                raise UserError(
                    f"{group.directory} must be made with the tokenizer and the held-out documents of the "
                    "checkpoint; found others: pass the documents themselves"
                )
            if every_document:
                raise UserError(
                    "every document can be evaluated of documents only; "
                    f"{group.directory} holds token shards: pass the documents themselves"
                )
            heldout.append(Heldout(group.heldout, group.heldout_sizes))
            fingerprints.append(index.fingerprint)
            documents += index.documents
            continue
        text, found, count = _read_heldout(config, group, tokenizer, threshold, tokens, every_document)
        heldout.append(text)
        fingerprints.append(found)
        documents += count
    if not config.weights:
        heldout = [Heldout(Joined([each.ids for each in heldout]), Joined([each.sizes for each in heldout]))]
    return EvaluationText(
        tuple(heldout), config.weights or (1.0,), documents, joined_fingerprint(fingerprints, config.weights)
    )


def _read_heldout(
    config: "DataConfig",
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    threshold: int,
    tokens: int,
    every_document: bool,
) -> tuple[Heldout, str, int]:
    """The first ``tokens`` held-out tokens, in whole documents, fingerprint and number of all documents."""
    fingerprint = hashlib.sha256()
    measured: list[tuple[np.ndarray, np.ndarray]] = []
    found = documents = 0
    for document in read_documents(sources, config.text_field):
        documents += 1
        document_digest = digest(document.text)
        fingerprint.update(document_digest)
        if found <= tokens and (every_document or is_held_out(document_digest, threshold)):
            measured.append(encode_measured(document, tokenizer))
            found += len(measured[-1][1])
    ids = with_eos([ids for ids, _ in measured], tokenizer)
    sizes = np.concatenate([np.zeros(0, np.uint32), *(sizes for _, sizes in measured)])
    return Heldout(InMemory(ids), InMemory(sizes)), fingerprint.hexdigest(), documents
