"""How many neurons panels of tokens activate together, by the order of the tokens.

A panel of P tokens costs the union of their neurons, so the mean union is what an order is judged by. The
orders of ``forward_orders`` are those that a forward can make. Others know more than it does, an order of its
own for each layer or the activity itself: they say how far there is to go.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_lm import clusters, order
from sparse_lm.order import Permutation
from train.bench.text_layers import TextLayers

TEXT = "text"
FLOOR = "the most active token of each panel: no order has less"

_FIT_ROUNDS = 12
_ACTIVITY_CLUSTERS = (64, 256)

MakeOrder = Callable[[jax.Array, jax.Array], Permutation]


@dataclasses.dataclass(frozen=True)
class Row:
    """One order.

    Attributes:
      name: in words.
      unions: (L, number of panel sizes): the mean union of so many tokens in each layer.
      of_forward: whether a forward can make it, one for all layers.
    """

    name: str
    unions: np.ndarray
    of_forward: bool


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is known of the tokens of one call in one layer.

    Attributes:
      ids: (M,) int32.
      first: (M, D), what enters the first layer; ``x``, what enters this one.
      mask: (M, F) bool, the neurons that are active.
      nnz: (M,) int32, how many; ``nnz_before``, how many were in the layer before.
    """

    ids: jax.Array
    first: jax.Array
    x: jax.Array
    mask: jax.Array
    nnz: jax.Array
    nnz_before: jax.Array


def forward_orders(layers: TextLayers, counts: Sequence[int]) -> dict[str, MakeOrder]:
    """The orders that a forward can make, from ids (M,) and what enters the first layer (M, D), with each
    number of clusters; the text's is not among them."""
    vocabulary = layers.model.config.vocab_size
    found: dict[str, MakeOrder] = {
        "token id": lambda ids, x: order.by_id(ids),
        "hash of the first layer's input": lambda ids, x: order.by_hash(x),
        "hash of the first layer's input, then id": partial(_by_hash, vocab_size=vocabulary),
    }
    for count in counts:
        rank = _vocabulary_rank(layers.model.embedding[...], count)
        centroids = fit(layers.entering(0, fit=True), count)
        found |= {
            f"{count} clusters of the embedding, then id": partial(_by_rank, rank=rank),
            f"{count} clusters of the first layer's input": partial(_by_centroids, centroids=centroids),
            f"{count} clusters of the first layer's input, then id": partial(
                _by_centroids, centroids=centroids, vocab_size=vocabulary
            ),
        }
    own = own_order(layers)
    if own is not None and layers.model.token_order.follows:
        found |= dict([own])
    return found


def own_order(layers: TextLayers) -> tuple[str, MakeOrder] | None:
    """The order in which the model itself takes the tokens of a large call, by name; None for the text's."""
    model = layers.model
    match model.config.token_order:
        case "id":
            return "token id", lambda ids, x: order.by_id(ids)
        case "hash":
            return "hash of the first layer's input, then id", partial(
                _by_hash, vocab_size=model.config.vocab_size
            )
        case "centroids" | "auto":
            make = partial(
                _by_centroids,
                centroids=model.token_order.centroids[...],
                vocab_size=model.config.vocab_size,
            )
            return "the model's own clusters, then id", make
        case "vocabulary":
            make = partial(_by_rank, rank=model.token_order.rank[...])
            return "the model's own rank of the vocabulary", make
    return None


def _by_hash(ids: jax.Array, x: jax.Array, *, vocab_size: int) -> Permutation:
    """As many bits as leave room for an id in an int32 key."""
    bits = min(order.HASH_BITS, ((2**31 - 1) // vocab_size).bit_length() - 1)
    return order.by_hash(x, ids, bits=bits, vocab_size=vocab_size)


def _by_rank(ids: jax.Array, x: jax.Array, *, rank: jax.Array) -> Permutation:
    return order.by_rank(ids, rank)


def _by_centroids(
    ids: jax.Array, x: jax.Array, *, centroids: jax.Array, vocab_size: int | None = None
) -> Permutation:
    return order.by_centroids(x, centroids, None if vocab_size is None else ids, vocab_size=vocab_size)


def count_unions(
    layers: TextLayers, orders: Mapping[str, MakeOrder], *, tokens: int, panels: Sequence[int], count: int
) -> list[Row]:
    """The unions of all orders, the text's first, on calls of so many tokens, each put in order by itself.

    Args:
      layers: of at least so many tokens.
      orders: from ``forward_orders``.
      tokens: of a call.
      panels: P, sizes of a panel.
      count: K, clusters of what enters each layer.
    """
    first = layers.entering(0)
    calls = [slice(at, at + tokens) for at in range(0, len(first) - tokens + 1, tokens)]
    totals: dict[str, list[np.ndarray]] = {}
    before = [jnp.zeros(tokens, jnp.int32)] * len(calls)
    for layer in range(layers.num_layers):
        x = layers.entering(layer)
        knowing = _knowing_orders(layers, layer, count)
        rows: dict[str, np.ndarray] = {}
        for nth, here in enumerate(calls):
            mask = layers.active(layer, x[here])
            nnz = jnp.sum(mask, axis=1, dtype=jnp.int32)
            call = _Call(layers.tokens[here], first[here], x[here], mask, nnz, before[nth])
            before[nth] = nnz
            found = {TEXT: jnp.arange(tokens, dtype=jnp.int32)}
            found |= {name: make(call.ids, call.first).order for name, make in orders.items()}
            found |= {name: make(call).order for name, make in knowing.items()}
            unions = np.asarray(mean_unions(mask, jnp.stack(list(found.values())), tuple(panels)))
            for name, union in [*zip(found, unions, strict=True), (FLOOR, _floor(nnz, panels))]:
                rows[name] = rows.get(name, 0.0) + union / len(calls)
        for name, row in rows.items():
            totals.setdefault(name, []).append(row)
    return [Row(name, np.stack(rows), name == TEXT or name in orders) for name, rows in totals.items()]


def best_of_forward(rows: Sequence[Row]) -> str:
    """The name of the order with the least union, over layers and panel sizes, that a forward can make."""
    return min(
        (row for row in rows if row.of_forward and row.name != TEXT), key=lambda row: row.unions.mean()
    ).name


def fit(x: jax.Array, count: int) -> jax.Array:
    """(K, D) centroids of x (M, D)."""
    return _follow(jnp.zeros((count, x.shape[1])), jnp.zeros(count), x, rounds=_FIT_ROUNDS)[0]


def _knowing_orders(layers: TextLayers, layer: int, count: int) -> dict[str, Callable[[_Call], Permutation]]:
    """Orders of one layer alone, or by what is known only when the layer has run."""
    vocabulary, width = layers.model.config.vocab_size, layers.model.config.d_ff + 1
    fit_x = layers.entering(layer, fit=True)
    first, own = fit(layers.entering(0, fit=True), count), fit(fit_x, count)
    active = _directions(layers.active(layer, fit_x))
    found: dict[str, Callable[[_Call], Permutation]] = {
        "clusters of each layer's input, then id": lambda call: order.by_centroids(
            call.x, own, call.ids, vocab_size=vocabulary
        ),
        "clusters of the first layer's input, then activity in the layer before": lambda call: order.by_key(
            clusters.nearest(call.first, first) * width + call.nnz_before
        ),
        "clusters of each layer's input, then its activity": lambda call: order.by_key(
            clusters.nearest(call.x, own) * width + call.nnz
        ),
    }
    for size in _ACTIVITY_CLUSTERS:
        found[f"{size} clusters of the activity, then its amount"] = partial(
            _by_activity, centroids=fit(active, size), width=width
        )
    return found


def _by_activity(call: _Call, *, centroids: jax.Array, width: int) -> Permutation:
    return order.by_key(clusters.nearest(_directions(call.mask), centroids) * width + call.nnz)


def _directions(mask: jax.Array) -> jax.Array:
    """(M, F) bf16 rows of length 1: tokens are alike that share a large part of their neurons."""
    nnz = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    return (mask * lax.rsqrt(nnz)).astype(jnp.bfloat16)


@partial(jax.jit, static_argnames="panels")
def mean_unions(mask: jax.Array, orders: jax.Array, panels: tuple[int, ...]) -> jax.Array:
    """(R, number of panel sizes) f32: mean unions of mask (M, F) in orders (R, M), of whole panels."""

    def of_order(places: jax.Array) -> jax.Array:
        rows = mask[places]
        return jnp.stack([_mean_union(rows, min(panel, len(rows))) for panel in panels])

    return lax.map(of_order, orders)


def _mean_union(rows: jax.Array, panel: int) -> jax.Array:
    whole = rows[: len(rows) // panel * panel].reshape(-1, panel, rows.shape[1])
    return jnp.mean(jnp.sum(jnp.any(whole, axis=1), axis=1, dtype=jnp.float32))


def _floor(nnz: jax.Array, panels: Sequence[int]) -> np.ndarray:
    """A panel's union is at least its most active token; the sum of those is least in order of activity."""
    rows = np.sort(np.asarray(nnz))
    sizes = [min(panel, len(rows)) for panel in panels]
    return np.asarray([rows[: len(rows) // p * p].reshape(-1, p).max(axis=1).mean() for p in sizes])


_follow = jax.jit(clusters.follow, static_argnames="rounds")
_vocabulary_rank = jax.jit(clusters.vocabulary_rank, static_argnums=1)
