"""The order in which a model's feed-forward layers take their tokens, and what the model keeps for it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import dispatch
from sparse_lm import clusters, order, ordered
from sparse_lm.config import SILU, ModelConfig, TokenOrderName
from sparse_lm.ffn import local_token_count, over_local_tokens
from sparse_lm.layers import RMSNorm
from sparse_lm.order import Permutation

LEAST_TOKENS = 512
"""A device's tokens of a forward below which an order is left out: there are too few to find alike ones."""

_FROM_INPUT = ("centroids", "hash")
_PANEL_FORMATS = ("panel", "auto")


class OrderState(nnx.Variable):
    """What a model's order keeps: saved with the model, and no parameter of it."""


class ModelOrder(nnx.Module):
    """One order of the local tokens a forward, by ``ModelConfig.token_order``.

    State (`OrderState`): ``rank`` (V,) int32 of ``"vocabulary"``, at first the ids themselves; ``centroids``
    (K, D) f32 and their ``weights`` (K,) f32 of ``"centroids"`` and ``"auto"``, at first random directions.
    Any state gives a permutation, so that a stale one costs time and no result.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Starts the state; draws from ``rngs.params()`` if there are centroids."""
        self.config = config
        match config.token_order:
            case "vocabulary":
                self.rank = OrderState(jnp.arange(config.vocab_size, dtype=jnp.int32))
            case "centroids" | "auto":
                shape = (config.token_clusters, config.d_model)
                self.centroids = OrderState(jax.random.normal(rngs.params(), shape, jnp.float32))
                self.weights = OrderState(jnp.zeros(config.token_clusters, jnp.float32))

    @property
    def follows(self) -> bool:
        """Whether there is a state for ``refresh`` to renew."""
        return self.config.token_order in ("vocabulary", "centroids", "auto")

    def choose(self, shape: tuple[int, ...]) -> TokenOrderName:
        """The order of a forward over tokens of that shape (B, S): never ``"auto"``."""
        name = self.config.token_order
        local = local_token_count(shape)
        if local < LEAST_TOKENS or shape[1] == 1 or self.config.activation == SILU:
            return "text"
        if name != "auto":
            return name
        x = jax.ShapeDtypeStruct((local, self.config.d_model), self.config.dtype)
        weight = jax.ShapeDtypeStruct((self.config.d_ff, self.config.d_model), self.config.dtype)
        layout = dispatch.choose(self.config.ffn, dispatch.Call.of(x, weight)).layout
        return "centroids" if layout.name in _PANEL_FORMATS else "text"

    def before_layers(self, tokens: jax.Array) -> Permutation | None:
        """The order of tokens (B, S) where it needs nothing else; None if it needs more, or is the text's."""
        match self.choose(tokens.shape):
            case "id":
                return over_local_tokens(order.by_id, tokens)
            case "vocabulary":
                ranks = self.rank[...][tokens]
                return over_local_tokens(order.by_key, ranks)
        return None

    def needs_input(self, shape: tuple[int, ...]) -> bool:
        """Whether the order of tokens of that shape is made from what enters the first feed-forward layer."""
        return self.choose(shape) in _FROM_INPUT

    def of_input(self, x: jax.Array, tokens: jax.Array) -> Permutation:
        """The order by what enters the first feed-forward layer, x (B, S, D), and tokens (B, S)."""
        vocabulary = self.config.vocab_size
        x = jax.lax.stop_gradient(x)
        if self.config.token_order == "hash":
            bits = min(order.HASH_BITS, ((2**31 - 1) // vocabulary).bit_length() - 1)
            return over_local_tokens(
                lambda x, tokens: order.by_hash(x, tokens, vocab_size=vocabulary, bits=bits), x, tokens
            )
        centroids = self.centroids[...]
        return over_local_tokens(
            lambda x, tokens: order.by_centroids(x, centroids, tokens, vocab_size=vocabulary), x, tokens
        )

    def of_stream(self, x: jax.Array, norm: RMSNorm, tokens: jax.Array) -> Permutation:
        """`of_input` of ``norm(x)``; for ``"centroids"`` in one pass over x that writes no norm."""
        if self.choose(tokens.shape) != "centroids":
            return self.of_input(norm(x), tokens)
        nearest = partial(ordered.nearest_to_norm, eps=norm.eps, dtype=norm.dtype)
        vocabulary, count = self.config.vocab_size, self.config.token_clusters

        def make(x, tokens, scale, centroids):
            return order.by_group(nearest(x, scale, centroids), count, tokens, vocab_size=vocabulary)

        given = jax.lax.stop_gradient((x, tokens, norm.scale[...], self.centroids[...]))
        return over_local_tokens(make, *given[:2], whole=given[2:])

    def refresh(self, x: jax.Array, embedding: jax.Array, *, axis_name: str | None = None) -> None:
        """Moves the centroids towards the inputs x (..., D), or makes the rank of the embedding (V, D)."""
        match self.config.token_order:
            case "vocabulary":
                self.rank[...] = clusters.vocabulary_rank(embedding, self.config.token_clusters)
            case "centroids" | "auto":
                self.centroids[...], self.weights[...] = clusters.follow(
                    self.centroids[...], self.weights[...], x, axis_name=axis_name
                )
