"""Clusters of what enters a layer, and of the vocabulary: k-means that follows a training.

Both are used to order tokens (`sparse_lm.order`) and never decide a result, so that a few clusters, found
roughly and now and then, are enough. Plain jnp, deterministic, the same on every device of a batch that is
split over them.
"""

import jax
import jax.numpy as jnp
from jax import lax

_MEMORY = 0.75
_DEAD_SHARE = 0.01
_FIT_ROUNDS = 8


def nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """The index of the nearest centroid, (...) int32: one thin product in x's type, accumulated in f32.

    Args:
      x: (..., D).
      centroids: (K, D).
    """
    products = jnp.einsum("...d,kd->...k", x, centroids.astype(x.dtype), preferred_element_type=jnp.float32)
    half_squares = 0.5 * jnp.sum(jnp.square(centroids.astype(jnp.float32)), axis=1)
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), whose first term is the same for all centroids.
    distances = products - jnp.broadcast_to(half_squares, products.shape)
    return jnp.argmax(distances, axis=-1).astype(jnp.int32)


def follow(
    centroids: jax.Array,
    weights: jax.Array,
    x: jax.Array,
    *,
    rounds: int = 4,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Centroids moved towards a batch: mini-batch k-means (Sculley 2010) that forgets.

    Earlier batches count for three quarters of what they did at the call before, so that centroids follow a
    training. A cluster that hardly any token belongs to starts again at a token of the batch.

    Args:
      centroids: (K, D) f32.
      weights: (K,) f32, how many tokens each centroid is the mean of; all 0 before the first batch.
      x: (..., D), the batch.
      rounds: assignments of the batch, each to the centroids that the one before gave.
      axis_name: a mapped axis over which the batch is split.

    Returns:
      The new centroids and weights.
    """
    tokens = x.reshape(-1, x.shape[-1])
    count = len(centroids)
    kept, kept_sums = _MEMORY * weights, (_MEMORY * weights)[:, None] * centroids
    seeds = _spread_tokens(tokens, count, axis_name)

    def move(_, state):
        members = jax.nn.one_hot(nearest(tokens, state[0]), count, dtype=tokens.dtype)
        sums = jnp.einsum("mk,md->kd", members, tokens, preferred_element_type=jnp.float32)
        hits = jnp.sum(members, axis=0, dtype=jnp.float32)
        if axis_name is not None:
            sums, hits = lax.psum((sums, hits), axis_name)
        total = kept + hits
        means = (kept_sums + sums) / jnp.maximum(total, 1e-6)[:, None]
        dead = total < _DEAD_SHARE * jnp.mean(total)
        return jnp.where(dead[:, None], seeds, means), jnp.where(dead, 1.0, total)

    return lax.fori_loop(0, rounds, move, (centroids, weights))


def _spread_tokens(tokens: jax.Array, count: int, axis_name: str | None) -> jax.Array:
    """(K, D) f32: so many tokens from all over the batch, the same on every device of a mapped axis."""
    places = (jnp.arange(count) * len(tokens)) // count
    seeds = tokens[places].astype(jnp.float32)
    if axis_name is None:
        return seeds
    first = lax.axis_index(axis_name) == 0
    return lax.psum(jnp.where(first, seeds, 0.0), axis_name)


def vocabulary_rank(embedding: jax.Array, count: int) -> jax.Array:
    """The place of each id in an order of the vocabulary by clusters of its embedding, then id: (V,) int32.

    Args:
      embedding: (V, D).
      count: K, clusters; at most V are used.
    """
    rows = embedding.astype(jnp.float32)
    rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    count = min(count, len(rows))
    start = _spread_tokens(rows, count, None), jnp.zeros(count, jnp.float32)
    centroids, _ = follow(*start, rows, rounds=_FIT_ROUNDS)
    order = jnp.argsort(nearest(rows, centroids), stable=True)
    places = jnp.arange(len(rows), dtype=jnp.int32)
    return jnp.zeros(len(rows), jnp.int32).at[order].set(places, unique_indices=True)
