"""Statistics of several calls that run as one: tokens in equal groups, one after the other.

``groups`` is None for one call, whose statistics are those of `FFNStats`; else each field has the number of
groups in front, and every group's means and sums are over its own tokens.
"""

import jax
import jax.numpy as jnp

Groups = int | None


def group_size(tokens: int, groups: Groups) -> int:
    """Tokens of one group."""
    return tokens // (groups or 1)


def by_group(per_token: jax.Array, groups: Groups) -> jax.Array:
    """(groups, tokens of a group, ...) or, for one call, (tokens, ...)."""
    return per_token if groups is None else per_token.reshape(groups, -1, *per_token.shape[1:])


def token_scale(dl1: jax.Array, tokens: int, groups: Groups) -> jax.Array:
    """The cotangent of every |h| of a token, f32: (1,) for one call, else (tokens,), from that of l1: () or
    (groups,)."""
    size = group_size(tokens, groups)
    scale = (dl1.astype(jnp.float32) / max(size, 1)).reshape(-1)
    return scale if groups is None else jnp.repeat(scale, size, total_repeat_length=tokens)
