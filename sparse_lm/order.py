"""Orders of tokens that put alike tokens side by side, for layers whose cost depends on which are neighbours.

A panel of P consecutive tokens costs the union of the neurons that its tokens activate. Which tokens make a
panel changes no result, and neighbours in a text hardly share more neurons than strangers do, while tokens
with the same or a similar id, or with a similar input, share many. So a forward computes one permutation of
its tokens and runs its feed-forward layers in it: ``norm(x)[order]`` in, ``y[inverse]`` out.

In a loop of one's own, with token ids (or ``by_hash(x)`` without):

    order = by_id(tokens)                    # (B, S) int32, once a forward
    y, stats = ffn(x, order=order)           # SparseFFN, or with the bare call:
    y, stats = sparse_ffn(order.gather(x), ...); y = order.scatter(y)

Everything here works on local arrays: under ``shard_map`` or ``pmap`` an order is one of the device's own
tokens. All of it is deterministic, and integers: nothing is differentiated but the gathers.

Cost: the permutation is one stable sort of M (key, int32) pairs and one scatter of M integers a forward.
`sparse_lm.ordered` has the norm before a layer and the sum behind it as passes that move the rows too, so
that in a forward gather and scatter move no bytes of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import varying_axes
from sparse_lm import clusters

HASH_BITS = 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Permutation:
    """An order of a call's tokens, and its inverse.

    Attributes:
      order: int32 of the tokens' shape (...): read flat, place i takes token ``order[i]``.
      inverse: int32 of the same shape: token i stands at place ``inverse[i]``.
    """

    order: jax.Array
    inverse: jax.Array

    def gather(self, x: jax.Array) -> jax.Array:
        """(..., D) in the tokens' own order to (..., D) in this order.

        Raises:
          ValueError: x has other tokens than the order.
        """
        self.check(x)
        return _take(x, self.order, self.inverse)

    def scatter(self, y: jax.Array) -> jax.Array:
        """The inverse of ``gather``: (..., D) in this order to (..., D) in the tokens' own."""
        self.check(y)
        return _take(y, self.inverse, self.order)

    def check(self, x: jax.Array) -> None:
        """Raises ValueError unless x (..., D) has the order's tokens."""
        if x.shape[:-1] != self.order.shape:
            raise ValueError(
                f"an order of tokens of shape {self.order.shape} takes x of shape "
                f"{(*self.order.shape, 'D')}; got {x.shape}: make the order from the same tokens"
            )


def by_key(key: jax.Array) -> Permutation:
    """Tokens by rising key; those of equal keys stay in the order in which they came.

    Args:
      key: integers of the tokens' shape (...).
    """
    flat = key.reshape(-1)
    # The sort gives each output its operand's type: places too must vary over the mesh axes of the key.
    places = varying_axes.vary_with(flat, jnp.arange(flat.size, dtype=jnp.int32))
    _, order = lax.sort((flat, places), num_keys=1, is_stable=True)
    inverse = jnp.zeros_like(order).at[order].set(places, unique_indices=True, mode="promise_in_bounds")
    return Permutation(order.reshape(key.shape), inverse.reshape(key.shape))


def by_id(tokens: jax.Array) -> Permutation:
    """Tokens of the same id together: ``tokens`` (...) integers."""
    return by_key(tokens)


def by_rank(tokens: jax.Array, rank: jax.Array) -> Permutation:
    """Tokens by the rank of their id: ``tokens`` (...) integers under V, ``rank`` (V,) integers.

    `clusters.vocabulary_rank` makes a rank from an embedding.
    """
    return by_key(rank[tokens])


def by_centroids(
    x: jax.Array, centroids: jax.Array, tokens: jax.Array | None = None, *, vocab_size: int | None = None
) -> Permutation:
    """Tokens by the nearest of K centroids and, within a cluster, by id.

    Args:
      x: (..., D), what enters a layer, such as the first feed-forward layer of the forward.
      centroids: (K, D), from `clusters.follow`.
      tokens: (...) integers under ``vocab_size``, the ids; without them a cluster keeps its own order.
      vocab_size: V; K V must be below 2^31.

    Raises:
      ValueError: ids without ``vocab_size``, or K V too large for an int32 key.
    """
    return by_group(clusters.nearest(x, centroids), len(centroids), tokens, vocab_size=vocab_size)


def by_hash(
    x: jax.Array, tokens: jax.Array | None = None, *, vocab_size: int | None = None, bits: int = HASH_BITS
) -> Permutation:
    """Tokens by the signs of ``bits`` random projections of x (..., D), always the same ones; then by id.

    It needs nothing that was fitted. ``tokens`` and ``vocab_size`` as in `by_centroids`, K being 2^bits.
    """
    projections = jax.random.normal(jax.random.key(0), (x.shape[-1], bits), jnp.float32)
    signs = (
        jnp.einsum("...d,db->...b", x, projections.astype(x.dtype), preferred_element_type=jnp.float32) > 0
    )
    code = jnp.sum(signs.astype(jnp.int32) << jnp.arange(bits, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
    return by_group(code, 2**bits, tokens, vocab_size=vocab_size)


def by_group(
    group: jax.Array, groups: int, tokens: jax.Array | None = None, *, vocab_size: int | None = None
) -> Permutation:
    """Tokens by the group of each, (...) int32 under ``groups``; then by id, as in `by_centroids`.

    Raises:
      ValueError: ids without ``vocab_size``, or more pairs of a group and an id than int32 counts.
    """
    if tokens is None:
        return by_key(group)
    if vocab_size is None or not 0 < groups * vocab_size < 2**31:
        raise ValueError(
            f"an order by {groups} groups and then by id needs the number of ids, below {2**31 // groups}, "
            f"so that both fit an int32 key; got vocab_size={vocab_size}: pass it, or leave the ids out"
        )
    return by_key(group * vocab_size + tokens.astype(jnp.int32))


def _take(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    flat = _permuted(x.reshape(-1, x.shape[-1]), order.reshape(-1), inverse.reshape(-1))
    return flat.reshape(x.shape)


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of x (M, D): row ``order[i]`` at place i.

    JAX would transpose the gather to a scatter that adds rows up; a permutation's transpose is the gather by
    its inverse.
    """
    return x.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _permuted_forward(x, order, inverse):
    return _permuted(x, order, inverse), (order, inverse)


def _permuted_backward(residuals, dy):
    order, inverse = residuals
    return _permuted(dy, inverse, order), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
