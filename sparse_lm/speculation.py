"""Prompt-lookup speculation: a guess from the text so far, verified by one forward over several tokens.

Decode reads all weights for one token; several tokens in the same forward cost hardly more. So each step
looks up where the last few tokens stood before, takes what followed there as a guess, and reads it whole. The
draw at every position uses the key and the logits that the plain loop would use there: a guess is kept
exactly as far as it is what the plain loop would have drawn, and the text is the same. Keys and values of the
rest are forgotten by counting fewer positions as filled.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from sparse_lm.inference import InferenceModel, LayerCaches
from sparse_lm.sampling import Sampling, position_keys, sample

_LONGEST_MATCH = 3


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames=("history", "cache"))
def verify_block(
    sampling: Sampling,
    steps: int,
    guesses: int,
    model: InferenceModel,
    key: jax.Array,
    history: jax.Array,
    cache: LayerCaches,
    limits: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, LayerCaches]:
    """The tokens of a number of steps, each of one forward over ``guesses`` + 1 tokens.

    Args:
      sampling: how tokens are drawn.
      steps: how many.
      guesses: G, tokens that are looked up for a step.
      model: the language model.
      key: of the seed.
      history: (B, C) int32, the text of each row; what stands behind its newest token is ignored.
      cache: holds all of it but the newest token.
      limits: (B,) int32, positions at which a row stands still.

    Returns:
      tokens (steps, B, G + 1), how many of them each row gains in each step (steps, B), the history and the
      cache that hold them.
    """
    rows = jnp.arange(len(history))[:, None]

    def step(carry, _):
        history, cache = carry
        filled = cache.lengths
        guess = look_up(history, filled + 1, guesses)
        run = jnp.concatenate([history[rows, filled[:, None]], guess], axis=1)
        hidden, cache = model.extend(run, cache)
        places = filled[:, None] + 1 + jnp.arange(guesses + 1, dtype=jnp.int32)[None]
        logits, keys = model.logits(hidden), position_keys(key, places)
        drawn = sample(logits.reshape(-1, logits.shape[-1]), keys.reshape(-1), sampling).reshape(run.shape)
        right = jnp.cumprod((guess == drawn[:, :-1]).astype(jnp.int32), axis=1)
        gained = jnp.minimum(1 + jnp.sum(right, axis=1), jnp.maximum(limits - filled, 0))
        history = history.at[rows, places].set(drawn, mode="drop", unique_indices=True)
        return (history, dataclasses.replace(cache, lengths=filled + gained)), (drawn, gained)

    (history, cache), (tokens, gained) = jax.lax.scan(step, (history, cache), length=steps)
    return tokens, gained, history, cache


def look_up(history: jax.Array, known: jax.Array, guesses: int) -> jax.Array:
    """What may follow each row: what followed the place that most resembles its end, the newest such place.

    A place resembles the end by as many tokens before it, of at most three, as agree with the last ones. A
    guess that reaches the end of the text goes on from that place again, as a repetition would.

    Args:
      history: (B, C) int32.
      known: (B,) int32, tokens of each row, at least one.
      guesses: G.

    Returns:
      (B, G) int32; where no token agrees, some tokens of the text.
    """
    places = jnp.arange(history.shape[1], dtype=jnp.int32)[None]
    agree, alike = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
    for back in range(1, _LONGEST_MATCH + 1):
        last = jnp.take_along_axis(history, jnp.maximum(known - back, 0)[:, None], axis=1)
        earlier = jnp.roll(history, back, axis=1)
        agree &= (earlier == last) & (places >= back) & (known[:, None] >= back)
        alike += agree
    candidates = jnp.where(places < known[:, None], alike, -1)
    newest_first = jnp.argmax(candidates[:, ::-1], axis=1).astype(jnp.int32)
    best = history.shape[1] - 1 - newest_first
    period = jnp.maximum(known - best, 1)
    following = best[:, None] + jnp.arange(guesses, dtype=jnp.int32)[None] % period[:, None]
    return jnp.take_along_axis(history, following, axis=1)
