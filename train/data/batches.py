"""Tokens to batches: the order is a function of the corpus, the seed and the position, and of nothing else.

The training tokens of a corpus form one ring of N tokens. Window k of context length C holds the C + 1 tokens
from position k·C round the ring, so that each token is the target of exactly one window a lap, and the tokens
that one epoch of ⌊N / C⌋ windows leaves over begin the next. Nothing is lost or repeated. Each epoch takes
its windows in another order.

The windows of a run are numbered from 0 on, and the position of a run is the number of the next one, whatever
the batch size and the number of processes. Batch b of B windows holds those from b·B on, of which each
process takes a part that is contiguous, so that all processes together hold what a single one would, row for
row.
"""

import math
from collections.abc import Sequence

import grain
import numpy as np

from train.data.corpus import Corpus, Heldout, Stream
from train.data.shards import Values
from train.errors import UserError

Batch = dict[str, np.ndarray]

_CYCLE = 10_000  # windows of a mixture, after which the choice of streams repeats


class TrainBatches:
    """This process's share of the training batches, for ever.

    An iterator of ``{"tokens": (batch_size / process_count, context_length + 1) int32}``, which reads ahead.

    Args:
      corpus: what to cut windows from.
      context_length: C.
      batch_size: windows of a step over all processes; ``process_count`` must divide it.
      seed: of the order.
      process_index, process_count: which share.

    Attributes:
      position: number of the first window, over all processes, that the next batch holds.

    Raises:
      UserError: a stream is shorter than a window, or the processes cannot share a batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self._windows = _Windows(corpus.streams, corpus.weights, context_length, seed)
        self._batch_size = batch_size
        self._rows = _local_rows(batch_size, process_index, process_count)
        self.seek(0)

    def seek(self, position: int) -> None:
        """Goes on from window ``position``."""
        self.position = position
        batches = grain.MapDataset.source(_Batches(self._windows, position, self._batch_size, self._rows))
        # One thread reads ahead while the device computes.
        self._batches = iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        )

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.position += self._batch_size
        return batch


class _Batches:
    """Batch by number, for grain."""

    def __init__(self, windows: "_Windows", position: int, batch_size: int, rows: range) -> None:
        self._windows, self._position, self._batch_size, self._rows = windows, position, batch_size, rows

    def __len__(self) -> int:
        return 1 << 40  # without end

    def __getitem__(self, number: int) -> Batch:
        first = self._position + number * self._batch_size
        return {"tokens": np.stack([self._windows[first + row] for row in self._rows])}


class _Windows:
    """Training windows by number: (context_length + 1,) int32."""

    def __init__(
        self, streams: Sequence[Stream], weights: Sequence[float], context_length: int, seed: int
    ) -> None:
        self._streams = [stream.train for stream in streams]
        self._context_length = context_length
        for ring in self._streams:
            _check_length(ring, context_length, "training", "add text or lower --model.context-length")
        self._orders = [
            # The index counts on from epoch to epoch, and with it the position on the ring.
            grain.MapDataset.range(len(ring) // context_length)
            .map_with_index(lambda index, _: index)
            .seed(_seed(seed, number))
            .shuffle()
            .repeat()
            for number, ring in enumerate(self._streams)
        ]
        self._choice = _interleaved(weights)
        before = np.cumsum(self._choice[:, None] == np.arange(len(weights)), axis=0)
        self._per_cycle = before[-1]
        self._nth = before[np.arange(len(self._choice)), self._choice] - 1

    def __getitem__(self, position: int) -> np.ndarray:
        cycle, at = divmod(position, len(self._choice))
        stream = self._choice[at]
        nth = cycle * int(self._per_cycle[stream]) + int(self._nth[at])
        return _window(self._streams[stream], self._orders[stream][nth], self._context_length)


def _seed(seed: int, stream: int) -> int:
    """Of a stream's order: 32 bits."""
    return (
        seed % 2**32
        if not stream
        else int(np.random.SeedSequence([seed % 2**32, stream]).generate_state(1)[0])
    )


def _interleaved(weights: Sequence[float]) -> np.ndarray:
    """Which stream each window of a cycle is from: every stream in its share, spread evenly."""
    if len(weights) == 1:
        return np.zeros(1, np.int64)
    shares = np.asarray(weights) / math.fsum(weights)
    choice = np.empty(_CYCLE, np.int64)
    taken = np.zeros(len(shares))
    for at in range(_CYCLE):
        choice[at] = np.argmax(shares * (at + 1) - taken)
        taken[choice[at]] += 1
    return choice


def heldout_batches(
    heldout: Sequence[Heldout],
    weights: Sequence[float],
    *,
    context_length: int,
    tokens: int,
    batch_size: int,
    devices: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    remedy: str = "add text, raise --data.holdout or lower --model.context-length",
) -> list[dict[str, np.ndarray | int]]:
    """This process's share of the held-out windows: the same windows for every batch shape.

    They are the first ⌊tokens / C⌋ windows of the held-out text, or all that it has, and at least one; of a
    mixture each corpus has its share of them. What does not fill a batch comes in batches of one row a
    device, and the rows that do not fill that come alone, once on each device, so that a batch's means are
    always those of its rows.

    Args:
      heldout: text of each corpus.
      weights: shares of the corpora.
      context_length: C.
      tokens: how many to take, in whole windows.
      batch_size: most rows of a batch over all processes, a multiple of ``devices``.
      devices: over which rows are spread.
      process_index, process_count: which share.
      remedy: of text that is too short, for messages: what a user can do about it.

    Returns:
      A list of ``{"tokens": (local rows, C + 1) int32, "rows": int, "bytes": int}``: ``rows`` counts the
      batch's different rows over all processes, and ``bytes`` the UTF-8 bytes that their targets
      ``tokens[:, 1:]`` stand for.

    Raises:
      UserError: held-out text is shorter than a window.
    """
    windows = [
        (text, number)
        for text, count in zip(
            heldout, _allotted(heldout, weights, context_length, tokens, remedy), strict=True
        )
        for number in range(count)
    ]
    full = len(windows) // batch_size * batch_size
    by_device = full + (len(windows) - full) // devices * devices
    batches = [windows[at : at + batch_size] for at in range(0, full, batch_size)]
    batches += [windows[at : at + devices] for at in range(full, by_device, devices)]
    batches += [[window] for window in windows[by_device:]]

    def batch(rows: list[tuple[Heldout, int]]) -> dict[str, np.ndarray | int]:
        spread = rows * devices if len(rows) % devices else rows
        local = [spread[row] for row in _local_rows(len(spread), process_index, process_count)]
        return {
            "tokens": np.stack([_window(text.ids, number, context_length) for text, number in local]),
            "rows": len(rows),
            "bytes": sum(
                int(_window(text.sizes, number, context_length)[1:].sum(dtype=np.int64))
                for text, number in rows
            ),
        }

    return [batch(rows) for rows in batches]


def _allotted(
    heldout: Sequence[Heldout], weights: Sequence[float], context_length: int, tokens: int, remedy: str
) -> list[int]:
    """How many windows to take of each corpus: its share of what was asked for, but no more than it has."""
    counts = []
    for text, weight in zip(heldout, weights, strict=True):
        _check_length(text.ids, context_length, "held-out", remedy)
        share = int(tokens // context_length * weight / math.fsum(weights))
        counts.append(max(1, min(share, len(text.ids) // context_length)))
    return counts


def _window(ring: Values, index: int, context_length: int) -> np.ndarray:
    """Window ``index`` of a ring that is longer than a window: (context_length + 1,) int32."""
    start = index * context_length % len(ring)
    stop = start + context_length + 1
    tokens = ring.read(start, min(stop, len(ring)))
    if stop > len(ring):
        tokens = np.concatenate([tokens, ring.read(0, stop - len(ring))])
    return tokens.astype(np.int32)


def _check_length(ring: Values, context_length: int, which: str, remedy: str) -> None:
    if len(ring) <= context_length:
        raise UserError(
            f"the {which} documents must hold at least {context_length + 1} tokens, one window of the "
            f"context; found {len(ring)}: {remedy}"
        )


def _local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    if batch_size % process_count:
        raise UserError(
            f"batch-size must be a multiple of the number of processes, {process_count}; got {batch_size}"
        )
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)
