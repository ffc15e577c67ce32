"""Text generation: prompts of any lengths in one batch, a cache written in place, tokens in blocks.

Prompts are padded behind their end and every row keeps its own position, so that what a row says depends on
its prompt, its place in the batch and the seed, and never on the other rows.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import RequestError
from sparse_lm.config import ModelConfig
from sparse_lm.inference import InferenceModel, LayerCaches
from sparse_lm.model import SparseLM

_SMALLEST_SHAPE = 16
_BLOCK = 16
_CAPACITY_STEP = 512


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits; the filters apply in the order of the fields.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens stay; ``None`` keeps all.
      top_p: of those, only the fewest most likely tokens whose probabilities reach p stay; 1 keeps all.

    Raises:
      RequestError: a field outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise RequestError(f"temperature must be a finite number of at least 0; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k must be at least 1; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be over 0 and at most 1; got {self.top_p}")


GREEDY = Sampling(temperature=0.0)


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token a row: (B, V) f32 logits and (B,) random keys to (B,) int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    # Differences from the largest stay finite where it counts, however small the temperature.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return draw(keys, scaled).astype(jnp.int32)
    vocab_size = logits.shape[-1]
    kept, tokens = jax.lax.top_k(scaled, min(sampling.top_k or vocab_size, vocab_size))
    probabilities = jax.nn.softmax(kept, axis=-1)
    more_likely = jnp.cumsum(probabilities, axis=-1) - probabilities
    choice = draw(keys, jnp.where(more_likely < sampling.top_p, kept, -jnp.inf))
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]


def generate(
    model: SparseLM | InferenceModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continues every prompt; arguments and errors as for ``stream``.

    Returns:
      The new tokens of each row, without its prompt and without ``eos_id``.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    steps = stream(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_id=eos_id, seed=seed)
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    model: SparseLM | InferenceModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Continues every prompt, one token a row at a time.

    Args:
      model: the language model. A `SparseLM`'s weights are split and cast at every call, those of an
        `InferenceModel` have been already.
      prompts: token ids, at least one a prompt; lengths may differ.
      max_new_tokens: most tokens that a row gains.
      sampling: how tokens are drawn.
      eos_id: the token that ends a row; ``None`` never ends one early.
      seed: of the draws. A row's draws follow from the seed, its place in the batch and its positions.

    Returns:
      An iterator of steps, each the new token of every row, or ``None`` for a row that has ended (the end
      token itself is not given out). It stops when all rows have ended. The first token comes by itself, the
      others leave the device in blocks of up to 16: the next block runs there while the caller handles this
      one.

    Raises:
      RequestError: at once, not at the first step: no prompt, an empty prompt, a token outside the
        vocabulary, ``max_new_tokens`` under 1, a seed outside 0 to 2^32 - 1, or a prompt that does not fit
        the context with its new tokens.
    """
    _check(model.config, prompts, max_new_tokens, seed)
    return _steps(model, [list(prompt) for prompt in prompts], max_new_tokens, sampling, eos_id, seed)


def _steps(
    model: SparseLM | InferenceModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    seed: int,
) -> Iterator[list[int | None]]:
    ended, left = [False] * len(prompts), max_new_tokens
    for block in _blocks(model, prompts, max_new_tokens, sampling, seed):
        for values in np.asarray(block).tolist()[:left]:
            ended = [over or value == eos_id for over, value in zip(ended, values, strict=True)]
            if all(ended):
                return
            yield [None if over else value for over, value in zip(ended, values, strict=True)]
        left -= len(block)


def _blocks(
    model: SparseLM | InferenceModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[jax.Array]:
    """Blocks (steps, B) of new tokens on the device, each given out when the next one has been started.

    The last block may go on beyond ``max_new_tokens``, with tokens that mean nothing.
    """
    if isinstance(model, SparseLM):
        model = InferenceModel.of(model)
    key = jax.random.key(seed)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    limit, longest = model.config.context_length, int(lengths.max())
    padded = np.zeros((len(prompts), _shape_for(longest, limit)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt

    capacity = _capacity(longest, max_new_tokens, limit)
    drawn, cache = read_prompts(sampling, capacity, model, key, jnp.asarray(padded), jnp.asarray(lengths))
    # Few sizes of blocks, so few compilations, and no block of 16 for two tokens.
    size = min(_BLOCK, 1 << max(max_new_tokens - 2, 0).bit_length())
    block = drawn[None]
    for done in range(1, max_new_tokens, size):
        if longest + done + size > cache.capacity < limit:
            cache = _grow(_capacity(longest + done + size, max_new_tokens - done - size, limit), cache)
        following, cache = decode_block(sampling, size, model, key, cache, block[-1])
        yield block
        block = following
    yield block


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
    return sample(model.logits(hidden), _keys(key, counts), sampling), cache


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
        drawn = sample(model.logits(hidden[:, 0]), _keys(key, cache.lengths), sampling)
        return (drawn, cache), drawn

    (_, cache), drawn = jax.lax.scan(step, (tokens, cache), length=steps)
    return drawn, cache


@partial(jax.jit, static_argnums=0)
def _grow(capacity: int, cache: LayerCaches) -> LayerCaches:
    return cache.grown(capacity)


def _keys(key: jax.Array, lengths: jax.Array) -> jax.Array:
    """(B,) keys, each from a row's place in the batch and the position of its next token."""
    rows = jnp.arange(len(lengths))
    return jax.vmap(lambda row, length: jax.random.fold_in(jax.random.fold_in(key, row), length))(
        rows, lengths
    )


def _capacity(positions: int, new_tokens: int, limit: int) -> int:
    """Room for the positions so far and the next new ones.

    A cache of another capacity is another compilation, so that it grows seldom and in large steps.
    """
    return _shape_for(positions + max(0, min(new_tokens, _CAPACITY_STEP)), limit)


def _shape_for(positions: int, limit: int) -> int:
    """A power of two that holds the positions, within the context: few shapes, so few compilations."""
    return min(limit, max(_SMALLEST_SHAPE, 1 << (positions - 1).bit_length()))


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not 0 <= seed < 2**32:
        raise RequestError(f"seed must be at least 0 and under 2^32; got {seed}")
    if not prompts:
        raise RequestError("generation needs at least one prompt; got none")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise RequestError(
                f"prompt {number} is empty: give it at least one token, such as the end-of-text token"
            )
        strange = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if strange is not None:
            raise RequestError(
                f"prompt {number} holds token {strange}, outside the model's vocabulary of "
                f"{config.vocab_size}: encode it with the tokenizer that the model was trained with"
            )
        if len(prompt) + max_new_tokens > config.context_length:
            raise RequestError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} new ones were asked for, "
                f"beyond the model's context of {config.context_length}: "
                "shorten the prompt or ask for fewer new tokens"
            )
