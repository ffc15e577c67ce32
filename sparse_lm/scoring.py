"""Log-likelihoods of continuations, in batches of alike lengths, each shared context computed once.

What a benchmark with multiple choices asks: the same question with every answer behind it. A batch reads its
contexts into a cache first and then all continuations from there, each with a copy of its context's rows.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm.attention import KVCache
from sparse_lm.model import SparseLM

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one continuation.

    Attributes:
      log_likelihood: sum over its tokens of ``ln p(token | everything before it)``.
      is_greedy: whether each token is the most likely one where it stands.
    """

    log_likelihood: float
    is_greedy: bool


def score(
    model: SparseLM, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 32
) -> list[Score]:
    """The score of each continuation behind its context.

    A context that is too long with its continuation loses its beginning. Requests that are alike are computed
    once, and so are contexts that are.

    Args:
      model: the language model.
      requests: pairs of context and continuation, token ids; a context has at least one, and a continuation
        no more than the model's context has positions. Without tokens a continuation scores 0 and is greedy.
      batch_size: most continuations of a batch.

    Returns:
      One score a request, in the requests' order.

    Raises:
      ValueError: ``batch_size`` under 1, an empty context, a continuation that is too long, or a token
        outside the vocabulary.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    pairs = [_fitted(model, context, continuation) for context, continuation in requests]
    scores: dict[tuple[Tokens, Tokens], Score] = {pair: Score(0.0, True) for pair in pairs if not pair[1]}
    wanted = {pair: None for pair in pairs if pair not in scores}  # a set in the order of the requests
    graphdef, state = nnx.split(model)
    for batch in _batches(list(wanted), batch_size):
        scores |= zip(batch, _score_batch(model, graphdef, state, batch, batch_size), strict=True)
    return [scores[pair] for pair in pairs]


def rolling_windows(tokens: Sequence[int], prefix: int, context_length: int) -> list[tuple[Tokens, Tokens]]:
    """Pairs of context and continuation in which each token of a text is predicted once.

    The first window predicts as many tokens as fit behind ``prefix`` alone; each further one predicts the
    tokens that follow with all the context that fits before them.

    Args:
      tokens: of the text.
      prefix: the token that stands before a text.
      context_length: positions of the model.
    """
    windows: list[tuple[Tokens, Tokens]] = []
    for start in range(0, len(tokens), context_length):
        end = min(start + context_length, len(tokens))
        if start == 0:
            windows.append(((prefix,), tuple(tokens[:end])))
        else:
            first = max(0, end - context_length - 1)
            windows.append((tuple(tokens[first:start]), tuple(tokens[start:end])))
    return windows


def _fitted(model: SparseLM, context: Sequence[int], continuation: Sequence[int]) -> tuple[Tokens, Tokens]:
    """The pair with as much of the context's end as has room; the last token is predicted and never read."""
    limit, vocab_size = model.config.context_length, model.config.vocab_size
    if not context:
        raise ValueError("a context must have at least one token, such as the end-of-text token; got none")
    if len(continuation) > limit:
        raise ValueError(
            f"a continuation must fit the model's context of {limit} tokens; got one of {len(continuation)}: "
            "split the text"
        )
    strange = next((token for token in (*context, *continuation) if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise ValueError(
            f"tokens must be of the model's vocabulary of {vocab_size}; got {strange}: encode texts with the "
            "tokenizer that the model was trained with"
        )
    room = max(1, limit + 1 - len(continuation))
    return tuple(context[-room:]), tuple(continuation)


def _batches(pairs: list[tuple[Tokens, Tokens]], size: int) -> Iterator[list[tuple[Tokens, Tokens]]]:
    """Longest first, so that a batch too large for the device fails at once; equal contexts side by side."""
    longest: dict[Tokens, int] = {}
    for context, continuation in pairs:
        longest[context] = max(longest.get(context, 0), len(continuation))
    order = sorted(pairs, key=lambda pair: (-len(pair[0]), -longest[pair[0]], pair[0], -len(pair[1])))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _score_batch(
    model: SparseLM,
    graphdef: nnx.GraphDef,
    state: nnx.State,
    batch: list[tuple[Tokens, Tokens]],
    batch_size: int,
) -> list[Score]:
    limit = model.config.context_length
    contexts = list(dict.fromkeys(context for context, _ in batch))
    rows = _rounded(len(batch), batch_size)
    read, read_counts = _padded(contexts, _rounded(len(contexts), rows), limit)
    said, said_counts = _padded([continuation for _, continuation in batch], rows, limit)
    owners = np.zeros(rows, np.int32)
    owners[: len(batch)] = [contexts.index(context) for context, _ in batch]
    capacity = min(limit, read.shape[1] + said.shape[1])
    sums, greedy = _scores(graphdef, capacity, state, read, read_counts, owners, said, said_counts)
    values = zip(np.asarray(sums).tolist(), np.asarray(greedy).tolist(), strict=True)
    return [Score(value, most_likely) for _, (value, most_likely) in zip(batch, values, strict=False)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
    graphdef: nnx.GraphDef,
    capacity: int,
    state: nnx.State,
    contexts: jax.Array,
    context_counts: jax.Array,
    owners: jax.Array,
    continuations: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums of log-probabilities (R,) f32 and whether all tokens are the most likely ones (R,) bool.

    Args:
      graphdef, state: the model.
      capacity: positions of the cache.
      contexts: (G, C) int32, the first ``context_counts`` (G,) of each row count.
      owners: (R,) int32, the context of each continuation.
      continuations: (R, S) int32, the first ``counts`` (R,) of each row count.
    """
    model = nnx.merge(graphdef, state)
    cache = KVCache.empty(model.config, contexts.shape[0], capacity)
    hidden, _, cache = model.hidden_states(contexts, cache=cache)
    # The context's last hidden state predicts the first token; each token's own predicts the one behind it.
    predicting = hidden[jnp.arange(len(contexts)), context_counts - 1][owners][:, None]
    if continuations.shape[1] > 1:
        cache = KVCache(cache.keys[:, owners], cache.values[:, owners], context_counts[owners])
        following, _, _ = model.hidden_states(continuations[:, :-1], cache=cache)
        predicting = jnp.concatenate([predicting, following], axis=1)

    log_p, most_likely = model.log_likelihoods(predicting, continuations)
    steps = predicting.shape[1]
    counted = jnp.arange(steps)[None] < counts[:, None]
    return jnp.sum(jnp.where(counted, log_p, 0.0), axis=1), jnp.all(most_likely | ~counted, axis=1)


def _padded(rows: list[Tokens], height: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows behind each other with zeros behind their end, and how many tokens of each count."""
    counts = np.ones(height, np.int32)
    counts[: len(rows)] = [len(row) for row in rows]
    tokens = np.zeros((height, _rounded(int(counts.max()), limit)), np.int32)
    for into, row in zip(tokens, rows, strict=False):
        into[: len(row)] = row
    return tokens, counts


def _rounded(number: int, limit: int) -> int:
    """A power of two that holds ``number``, within the limit: few shapes, so few compilations."""
    return min(limit, 1 << (number - 1).bit_length())
