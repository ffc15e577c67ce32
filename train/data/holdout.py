"""Which documents of a corpus are trained on, and which are held out."""

import hashlib

from train.errors import UserError


def split(documents: list[str], holdout: float) -> tuple[list[str], list[str]]:
    """Training and held-out documents: a document's hash decides, so that copies of one stay on one side."""
    digests = [hashlib.sha256(text.encode()).digest() for text in documents]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise UserError(
            "the corpus must hold at least 2 different documents, one of them to hold out; found "
            f"{len(distinct)}: add files, or cut it into one document a line (JSONL)"
        )
    count = min(max(1, round(holdout * len(distinct))), len(distinct) - 1)
    heldout = set(distinct[:count])
    pairs = list(zip(documents, digests, strict=True))
    return [t for t, digest in pairs if digest not in heldout], [
        t for t, digest in pairs if digest in heldout
    ]
