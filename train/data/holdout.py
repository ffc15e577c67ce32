"""Which documents are trained on and which are held out: each document's own hash decides.

A document whose hash, read as a fraction of 2^64, lies under a threshold is held out. Its side therefore
depends
on no other document: adding, removing or reordering documents moves no document from one side to the other.
"""

import dataclasses
import hashlib
from collections.abc import Iterable

from train.errors import UserError

_RANGE = 1 << 64


@dataclasses.dataclass(frozen=True)
class TextChoice:
    """The text that a checkpoint is looked at with.

    Attributes:
      paths: where the corpus of the training is now, or another corpus (default: where it was in training;
        for a converted model the corpus that ships with the package).
      text_field: field of a JSONL document, or column of Parquet, that holds its text (default: as in
        training).
      every_document: take all documents of paths, not only those that training would hold out: for text that
        it never had.
    """

    paths: tuple[str, ...] = ()
    text_field: str | None = None
    every_document: bool = False


def digest(text: str) -> bytes:
    """SHA-256 of a document."""
    return hashlib.sha256(text.encode()).digest()


def is_held_out(document_digest: bytes, threshold: int) -> bool:
    """Whether the document with this digest is held out."""
    return _position(document_digest) < threshold


def usual_threshold(holdout: float) -> int:
    """The threshold that holds out the share ``holdout`` of many documents."""
    return int(holdout * _RANGE)


def choose_threshold(texts: Iterable[str], holdout: float) -> int:
    """The threshold, from 1 to 2^64, that holds out about the share ``holdout`` of a corpus's documents.

    That is ``holdout`` itself, except for a corpus so small that one side would get no document: then it is
    the threshold nearest to it with which each side has one. Reads only until both sides have a document.

    Raises:
      UserError: the corpus has fewer than two different documents.
    """
    wanted = usual_threshold(holdout)
    lowest, highest = _RANGE, -1
    for text in texts:
        position = _position(digest(text))
        lowest, highest = min(lowest, position), max(highest, position)
        if lowest < wanted <= highest:
            return wanted
    if lowest >= highest:
        raise UserError(
            "the corpus must hold at least 2 different documents, one of them to hold out; found "
            f"{int(highest >= 0)}: add files, or cut it into one document a line (JSONL)"
        )
    return min(max(wanted, lowest + 1), highest)


def _position(document_digest: bytes) -> int:
    return int.from_bytes(document_digest[:8], "big")
