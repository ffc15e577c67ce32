"""How a token is drawn from logits, and the random keys that make a draw repeatable."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.errors import RequestError


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


def position_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
    """A key for each draw, from a row's place in the batch and the position of the token that is drawn.

    Args:
      key: of the seed.
      positions: (B, S) int32.

    Returns:
      (B, S) keys.
    """
    rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(positions)))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(rows, positions)
