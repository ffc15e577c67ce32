"""What the counts say: the numbers behind every figure, from plain arrays."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from train.analyze.activity import Activity

TOP_SHARES = (0.01, 0.05, 0.1)
_CURVE_POINTS = 60
_OFTEN = 10


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
      mean_nnz, p99_nnz, max_nnz: active neurons of a token.
      silent_share: of the neurons, those that no token of the text activated.
      held_by_top: share of all activity that the most popular 1, 5 and 10 % of the neurons have
        (`TOP_SHARES`); 0 where nothing is active.
    """

    mean_nnz: float
    p99_nnz: float
    max_nnz: int
    silent_share: float
    held_by_top: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TokenSummary:
    """A token of the vocabulary: its id and text, how often it came, and its mean nnz over layers."""

    id: int
    text: str
    count: int
    mean_nnz: float


@dataclasses.dataclass(frozen=True)
class TokenExtremes:
    """The tokens of least and of most activity, each from its end on, among those that came at least
    ``least_count`` times."""

    least_count: int
    least: tuple[TokenSummary, ...]
    most: tuple[TokenSummary, ...]


@dataclasses.dataclass(frozen=True)
class Popularity:
    """How uneven the neurons' shares of the activity are.

    Attributes:
      shares: of the neurons, the most popular first, rising to 1.
      held: (L, number of shares), the share of all activity that they have.
    """

    shares: tuple[float, ...]
    held: np.ndarray


def layers(activity: Activity) -> list[LayerSummary]:
    """One summary a layer."""
    found = []
    for nnz, hits in zip(activity.nnz, activity.hits, strict=True):
        found.append(
            LayerSummary(
                mean_nnz=float(nnz.mean()),
                p99_nnz=float(np.percentile(nnz, 99)),
                max_nnz=int(nnz.max()),
                silent_share=float(np.mean(hits == 0)),
                held_by_top=tuple(_held(hits, share) for share in TOP_SHARES),
            )
        )
    return found


def _held(hits: np.ndarray, share: float) -> float:
    """The share of all hits that the most popular neurons have, of which a last one may count in part."""
    total = hits.sum()
    if not total:
        return 0.0
    cumulative = np.concatenate([[0], np.cumsum(np.sort(hits)[::-1])]) / total
    return float(np.interp(share * len(hits), np.arange(len(hits) + 1), cumulative))


def popularity(activity: Activity) -> Popularity:
    """The curve of every layer at the same shares, from one neuron on."""
    least = 1 / activity.d_ff
    shares = np.unique(np.concatenate([np.geomspace(least, 1, _CURVE_POINTS), TOP_SHARES]))
    shares = shares[shares >= least]
    held = np.asarray([[_held(hits, share) for share in shares] for hits in activity.hits])
    return Popularity(tuple(map(float, shares)), held)


def tokens(activity: Activity, text_of: Callable[[int], str], *, count: int = 15) -> TokenExtremes:
    """The ``count`` tokens at either end, by their mean over layers and occurrences.

    A token must have come ten times to be judged; in a text so short that too few did, every token counts.

    Args:
      activity: counted.
      text_of: what a token's id stands for.
      count: how many.
    """
    ids, place, counts = np.unique(activity.ids, return_inverse=True, return_counts=True)
    means = np.bincount(place, weights=activity.nnz.mean(axis=0)) / counts
    least_count = _OFTEN if np.sum(counts >= _OFTEN) >= 2 * count else 1
    often = np.flatnonzero(counts >= least_count)
    by_activity = often[np.argsort(means[often], kind="stable")]

    def summaries(chosen: np.ndarray) -> tuple[TokenSummary, ...]:
        return tuple(
            TokenSummary(int(ids[at]), text_of(int(ids[at])), int(counts[at]), float(means[at]))
            for at in chosen
        )

    return TokenExtremes(least_count, summaries(by_activity[:count]), summaries(by_activity[::-1][:count]))


def by_position(activity: Activity) -> np.ndarray:
    """(L, S): the mean nnz at every position of a sequence."""
    return activity.nnz.reshape(len(activity.nnz), -1, activity.context_length).mean(axis=1)


def octaves(length: int) -> list[slice]:
    """Positions 1, 2 to 3, 4 to 7 and so on, counted from 1, as slices of positions counted from 0."""
    return [
        slice(2**nth - 1, min(2 ** (nth + 1) - 1, length)) for nth in range(math.ceil(math.log2(length + 1)))
    ]


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where there are under three pairs or one side does not vary."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
