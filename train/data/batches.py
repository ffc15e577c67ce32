"""Documents to shuffled batches of token windows, the same for every number of processes.

All training documents, each followed by EOS, form one ring of N tokens. Window k of context length C holds
the C + 1 tokens from position k·C round the ring, so that each token is the target of exactly one window a
lap, and the tokens that one epoch of ⌊N / C⌋ windows leaves over begin the next. Nothing is lost or repeated.
"""

from collections.abc import Sequence

import grain
import numpy as np

from train.config import DataConfig
from train.data.documents import read_documents
from train.data.holdout import split
from train.data.tokenizer import Tokenizer, token_dtype
from train.errors import UserError

Batch = dict[str, np.ndarray]


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """This process's share of the shuffled training batches, for ever, in a new order each epoch.

    The order depends on the corpus, ``context_length``, ``seed`` and the position alone: the shares of all
    processes together are the batches of a single process, whatever their number.

    Args:
      batch_size: windows of a step over all processes; ``process_count`` must divide it.

    Returns:
      An iterator of ``{"tokens": (batch_size / process_count, context_length + 1) int32}``, whose
      ``get_state()`` is a small dict that ``set_state`` takes up again exactly where it stood.

    Raises:
      UserError: the corpus is missing, broken, or shorter than a window.
    """
    local_batch = _local_batch(batch_size, process_count)
    training, _ = split(list(read_documents(config)), config.holdout)
    ring = _ring(tokenizer.encode_batch(training), tokenizer)
    _check_length(ring, context_length, "training")

    def window(index: int, _: int) -> Batch:
        return {"tokens": _window(ring, index, context_length)}

    return iter(
        grain.MapDataset.range(len(ring) // context_length)
        # The index counts on from epoch to epoch, and with it the position on the ring.
        .map_with_index(window)
        .seed(seed % 2**32)
        .shuffle()
        .repeat()[process_index::process_count]
        # Without a remainder to round up for, the length of an endless dataset stays within an integer.
        .batch(local_batch, drop_remainder=True)
        # The tokens are in memory: threads would only contend for the interpreter.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def heldout_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    batch_size: int,
    limit: int,
    process_index: int = 0,
    process_count: int = 1,
) -> list[dict[str, np.ndarray | int]]:
    """This process's share of up to ``limit`` whole batches of text that training never sees, in order.

    Held-out text of less than one batch goes round its ring until the batch is full, so that there always is
    one.

    Returns:
      A list of ``{"tokens": (batch_size / process_count, context_length + 1) int32, "bytes": int}``;
      ``bytes`` counts the UTF-8 bytes that the targets ``tokens[:, 1:]`` stand for, over all processes.

    Raises:
      UserError: the corpus is missing, broken, or its held-out text shorter than a window.
    """
    _local_batch(batch_size, process_count)
    _, heldout = split(list(read_documents(config)), config.holdout)
    measured = [tokenizer.encode_measured(text) for text in heldout]
    ring = _ring([ids for ids, _ in measured], tokenizer)
    _check_length(ring, context_length, "held-out")
    # EOS stands for what its document's tokens leave over, as a tokenizer that trims white space does.
    widths = np.concatenate(
        [
            np.append(added, len(text.encode()) - added.sum())
            for text, (_, added) in zip(heldout, measured, strict=True)
        ]
    )

    def batch(number: int) -> dict[str, np.ndarray | int]:
        rows = range(number * batch_size, (number + 1) * batch_size)
        local_rows = rows[process_index::process_count]
        return {
            "tokens": np.stack([_window(ring, row, context_length) for row in local_rows]),
            "bytes": sum(int(_window(widths, row, context_length)[1:].sum()) for row in rows),
        }

    whole = len(ring) // context_length // batch_size
    return [batch(number) for number in range(min(limit, max(1, whole)))]


def _ring(documents: Sequence[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """All documents in order, each followed by EOS: (N,) of the smallest unsigned type that holds the ids."""
    dtype = token_dtype(tokenizer.vocab_size)
    ring = np.full(sum(map(len, documents)) + len(documents), tokenizer.eos_id, dtype)
    start = 0
    for ids in documents:
        ring[start : start + len(ids)] = ids
        start += len(ids) + 1
    return ring


def _window(ring: np.ndarray, index: int, context_length: int) -> np.ndarray:
    """Window ``index`` of the ring: (context_length + 1,) int32."""
    start = index * context_length % len(ring)
    positions = np.arange(start, start + context_length + 1)
    return ring.take(positions, mode="wrap").astype(np.int32)


def _check_length(ring: np.ndarray, context_length: int, which: str) -> None:
    if len(ring) <= context_length:
        raise UserError(
            f"the {which} documents must hold at least {context_length + 1} tokens, one window of the "
            f"context; found {len(ring)}: add text or lower --model.context-length"
        )


def _local_batch(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"batch-size must be a multiple of the number of processes, {process_count}; got {batch_size}"
        )
    return batch_size // process_count
