"""Tokens behind texts that a cache holds: reading prompts, and decoding in blocks on the device.

The first token of every row is handed out by itself, as soon as it is there. From then on blocks of tokens
leave the device one behind the other: when one is handed out, the next one has been started.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.inference import InferenceModel, LayerCaches
from sparse_lm.sampling import Sampling, position_keys, sample
from sparse_lm.speculation import verify_block

Rows = list[list[int]]
_SMALLEST_SHAPE = 16
_BLOCK = 16
_VERIFIED_STEPS = 4
_CAPACITY_STEP = 512


class Decoding:
    """One batch of texts and the cache that holds them, all but the newest token of each row.

    Args:
      model: the language model.
      sampling: how tokens are drawn.
      seed: of the draws.
      speculate: tokens that are looked up for a step and verified; 0 decodes token by token.

    Attributes:
      cache: what has been read. None before the first prompt, and while a call that writes it in place is
        under way: who is interrupted there has no cache any more.
      steps: steps of speculation whose tokens were handed out, those of each row counted.
      tokens: tokens that these gave.
    """

    def __init__(self, model: InferenceModel, sampling: Sampling, seed: int, speculate: int = 0) -> None:
        self.cache: LayerCaches | None = None
        self.steps = self.tokens = 0
        self._model = model
        self._sampling = sampling
        self._key = jax.random.key(seed)
        self._speculate = speculate

    def read(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> jax.Array:
        """Reads prompts from their beginning; the (B,) tokens behind them."""
        limit = self._model.config.context_length
        tokens, counts = _padded(prompts, limit)
        capacity = _capacity(int(counts.max()), new_tokens, limit)
        drawn, self.cache = read_prompts(self._sampling, capacity, self._model, self._key, tokens, counts)
        return drawn

    def read_on(self, cache: LayerCaches, kept: int, more: Sequence[int], new_tokens: int) -> jax.Array:
        """Reads what follows the first ``kept`` positions of a cache of one row; the (1,) token behind it.

        The cache is written in place, and belongs to this batch from now on.
        """
        self.cache = cache
        limit = self._model.config.context_length
        self._make_room(kept + len(more), new_tokens)
        tokens, counts = _padded([more], limit)
        start = np.full(1, kept, np.int32)
        drawn, self.cache = read_further(
            self._sampling, self._model, self._key, self._taken(), start, tokens, counts
        )
        return drawn

    def rows(self, first: jax.Array, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[Rows]:
        """New tokens of each row, block after block, beginning with those that reading the prompts gave.

        Without speculation all rows gain the same in each block; rows may gain more than ``new_tokens``, and
        what is beyond means nothing.

        Args:
          first: (B,) what ``read`` or ``read_on`` has returned.
          prompts: all tokens that the cache holds.
          new_tokens: that every row gains at least.
        """
        if self._speculate:
            yield from self._verified_rows(first, prompts, new_tokens)
            return
        for block in self._blocks(first, max(map(len, prompts)), new_tokens):
            yield np.asarray(block).T.tolist()

    def _blocks(self, first: jax.Array, longest: int, new_tokens: int) -> Iterator[jax.Array]:
        # Few sizes of blocks, so few compilations, and no block of 16 for two tokens.
        size = min(_BLOCK, 1 << max(new_tokens - 2, 0).bit_length())
        yield first[None]
        block, last = None, first
        for done in range(1, new_tokens, size):
            self._make_room(longest + done + size, new_tokens - done - size)
            following, self.cache = decode_block(
                self._sampling, size, self._model, self._key, self._taken(), last
            )
            if block is not None:
                yield block
            block, last = following, following[-1]
        if block is not None:
            yield block

    def _verified_rows(
        self, first: jax.Array, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> Iterator[Rows]:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        limits = lengths + new_tokens - 1  # the last token of a row is never read
        assert self.cache is not None
        texts = np.zeros((len(prompts), self.cache.capacity), np.int32)
        for row, prompt in zip(texts, prompts, strict=True):
            row[: len(prompt)] = prompt
        history = jnp.asarray(texts).at[np.arange(len(prompts)), lengths].set(first)
        yield np.asarray(first)[:, None].tolist()
        drawn = np.ones(len(prompts), np.int32)
        block: tuple[jax.Array, jax.Array] | None = None
        while True:
            # A block under way gives every row a token a step at least, or all that it lacks.
            under_way = 0 if block is None else _VERIFIED_STEPS
            following = None
            if (drawn + under_way < new_tokens).any():
                most = int((lengths + drawn).max()) + (under_way + _VERIFIED_STEPS) * (self._speculate + 1)
                following, history = self._verify(history, limits, most)
            if block is not None:
                tokens, gained = (np.asarray(part) for part in block)
                drawn += gained.sum(axis=0)
                self.steps += int((gained > 0).sum())
                self.tokens += int(gained.sum())
                yield [_gained(tokens[:, row], gained[:, row]) for row in range(len(prompts))]
            if following is None:
                return
            block = following

    def _verify(
        self, history: jax.Array, limits: np.ndarray, most: int
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Starts a block of steps that fills at ``most`` so many positions: its tokens and counts, and the
        history with them."""
        end = int(limits.max()) + 1
        positions = min(most, end)
        self._make_room(positions, end - positions)
        cache = self._taken()
        history = jnp.pad(history, ((0, 0), (0, cache.capacity - history.shape[1])))
        tokens, gained, history, self.cache = verify_block(
            self._sampling, _VERIFIED_STEPS, self._speculate, self._model, self._key, history, cache, limits
        )
        return (tokens, gained), history

    def _make_room(self, positions: int, new_tokens: int) -> None:
        limit = self._model.config.context_length
        assert self.cache is not None
        if positions > self.cache.capacity < limit:
            self.cache = _grow(_capacity(positions, new_tokens, limit), self._taken())

    def _taken(self) -> LayerCaches:
        """The cache, for a call that gives back another one in its place."""
        cache, self.cache = self.cache, None
        assert cache is not None
        return cache


@partial(jax.jit, static_argnums=(0, 1))
def read_prompts(
    sampling: Sampling,
    capacity: int,
    model: InferenceModel,
    key: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, LayerCaches]:
    """The token (B,) behind each row's prompt, the first ``counts`` (B,) of its (B, S) tokens."""
    hidden, cache = model.prefill(tokens, counts, capacity)
    return _draw(sampling, model, key, hidden, counts), cache


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def read_further(
    sampling: Sampling,
    model: InferenceModel,
    key: jax.Array,
    cache: LayerCaches,
    start: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, LayerCaches]:
    """``read_prompts`` behind the first ``start`` (B,) positions of a cache."""
    hidden, cache = model.extend(tokens, LayerCaches(cache.keys, cache.values, start))
    cache = LayerCaches(cache.keys, cache.values, start + counts)
    last = hidden[jnp.arange(len(counts)), counts - 1]
    return _draw(sampling, model, key, last, cache.lengths), cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def decode_block(
    sampling: Sampling,
    steps: int,
    model: InferenceModel,
    key: jax.Array,
    cache: LayerCaches,
    tokens: jax.Array,
) -> tuple[jax.Array, LayerCaches]:
    """The next (steps, B) tokens, from each row's last one (B,)."""

    def step(carry, _):
        tokens, cache = carry
        hidden, cache = model.extend(tokens[:, None], cache)
        drawn = _draw(sampling, model, key, hidden[:, 0], cache.lengths)
        return (drawn, cache), drawn

    (_, cache), drawn = jax.lax.scan(step, (tokens, cache), length=steps)
    return drawn, cache


@partial(jax.jit, static_argnums=0)
def _grow(capacity: int, cache: LayerCaches) -> LayerCaches:
    return cache.grown(capacity)


def _draw(
    sampling: Sampling, model: InferenceModel, key: jax.Array, hidden: jax.Array, positions: jax.Array
) -> jax.Array:
    """The token (B,) at each row's position (B,), from the hidden state (B, D) before it."""
    return sample(model.logits(hidden), position_keys(key, positions[:, None])[:, 0], sampling)


def _gained(tokens: np.ndarray, counts: np.ndarray) -> list[int]:
    """The first ``counts`` (steps,) of each step's tokens (steps, G + 1), one behind the other."""
    return [token for step, count in zip(tokens, counts, strict=True) for token in step[:count].tolist()]


def _padded(texts: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts (B, S) with zeros behind their end, and how many tokens each has (B,)."""
    counts = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), _shape_for(int(counts.max()), limit)), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, counts


def _capacity(positions: int, new_tokens: int, limit: int) -> int:
    """Room for the positions so far and the next new ones.

    A cache of another capacity is another compilation, so that it grows seldom and in large steps.
    """
    return _shape_for(positions + max(0, min(new_tokens, _CAPACITY_STEP)), limit)


def _shape_for(positions: int, limit: int) -> int:
    """A power of two that holds the positions, within the context: few shapes, so few compilations."""
    return min(limit, max(_SMALLEST_SHAPE, 1 << (positions - 1).bit_length()))
