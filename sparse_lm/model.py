"""A Llama-style decoder with sparse feed-forward layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import FFNStats
from sparse_lm import ordered
from sparse_lm.attention import Attention
from sparse_lm.config import SILU, ModelConfig
from sparse_lm.cross_entropy import cross_entropy, log_likelihoods
from sparse_lm.ffn import SparseFFN, over_local_tokens
from sparse_lm.layer_loop import LayerWeights
from sparse_lm.layer_plan import LayerPlan, Segment, run_segments
from sparse_lm.layers import RMSNorm, scaled
from sparse_lm.model_order import ModelOrder
from sparse_lm.order import Permutation
from sparse_lm.silu import SiluFFN


class Block(nnx.Module):
    """One pre-norm layer: attention, then the sparse feed-forward, each added to its input."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Draws the layer's weights from ``rngs``."""
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=config.dtype)
        self.ffn = _feed_forward(config, rngs)
        self.residual_scale = config.residual_scale

    def __call__(self, x: jax.Array) -> tuple[jax.Array, FFNStats]:
        """(B, S, D) to (B, S, D), and the feed-forward statistics."""
        return self.feed_forward(self.attend(x))

    def attend(self, x: jax.Array) -> jax.Array:
        """The first half: (B, S, D) with attention added."""
        return self._add(x, self.attention(self.attention_norm(x)))

    def feed_forward(self, x: jax.Array, order: Permutation | None = None) -> tuple[jax.Array, FFNStats]:
        """The second half: (B, S, D) with the feed-forward part added, which takes its tokens in ``order``,
        and its statistics."""
        if order is None:
            y, stats = self.ffn(self.ffn_norm(x))
            return self._add(x, y), stats
        norm = partial(ordered.gathered_norm, eps=self.ffn_norm.eps, dtype=self.ffn_norm.dtype)
        add = partial(ordered.add_scattered, factor=self.residual_scale)
        x, entering = over_local_tokens(
            lambda x, order, scale: norm(x, scale, order), x, order, whole=(self.ffn_norm.scale[...],)
        )
        y, stats = self.ffn(entering)
        return over_local_tokens(add, x, y, order), stats

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + scaled(y, self.residual_scale)


def _feed_forward(config: ModelConfig, rngs: nnx.Rngs) -> SparseFFN | SiluFFN:
    sizes: dict[str, Any] = {
        "gated": config.gated, "dtype": config.dtype, "init_std": config.init_std, "rngs": rngs,
    }  # fmt: skip
    if config.activation == SILU:
        return SiluFFN(config.d_model, config.d_ff, **sizes)
    return SparseFFN(config.d_model, config.d_ff, options=config.ffn_options, **sizes)


class SparseLM(nnx.Module):
    """The language model: embedding, ``num_layers`` blocks, final norm, output head.

    Master weights are f32, compute is in ``config.dtype``, logits are f32. Parameters: ``embedding`` (V, D),
    ``blocks`` (every leaf with a leading layer axis), ``final_norm`` and, with untied embeddings, ``head``
    (V, D). All matrices start normal with standard deviation ``config.init_std``, norm scales at 1,
    biases at 0. ``token_order`` holds what ``config.token_order`` keeps (`OrderState`, no parameters).

    Under an ambient mesh (``jax.set_mesh``, axes of type Auto) the feed-forward layers split the batch over
    the mesh themselves and XLA splits everything else, as the placement of parameters and tokens asks.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, plan: LayerPlan | None = None) -> None:
        """Draws all weights from ``rngs``; the same seed gives the same model.

        Args:
          config: what the model is.
          rngs: source of the weights.
          plan: the format of each layer, in place of ``config.ffn.format`` for all.

        Raises:
          ValueError: the plan is of another number of layers, or of a model without silent neurons.
        """
        if plan is not None:
            _check_plan(plan, config)
        self.plan = plan
        init = nnx.initializers.normal(config.init_std)
        shape = (config.vocab_size, config.d_model)
        self.config = config
        self.embedding = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.blocks = nnx.vmap(lambda rngs: Block(config, rngs=rngs))(rngs.split(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=config.dtype)
        self.head = None if config.tied_embeddings else nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.token_order = ModelOrder(config, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, FFNStats]:
        """Logits of the next token at every position. (`InferenceModel` continues texts with a cache.)

        Args:
          tokens: (B, S) int32, at positions 0 to S - 1.

        Returns:
          Logits (B, S, V) f32; statistics with a leading layer axis on every leaf.

        Raises:
          ValueError: ``tokens`` is not (B, S), or S is beyond the context.
        """
        hidden, stats = self.hidden_states(tokens)
        return self.logits(hidden), stats

    def hidden_states(
        self, tokens: jax.Array, *, layer_weights: LayerWeights | None = None
    ) -> tuple[jax.Array, FFNStats]:
        """What ``logits`` reads: (B, S, D) in the compute type, and the statistics, as in ``__call__``.
        ``layer_weights`` makes what each layer computes with from what is stored."""
        longest = self.config.context_length
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            raise ValueError(
                f"SparseLM expected tokens of shape (batch, at most {longest} positions); got {tokens.shape}"
            )
        graphdef, layers = nnx.split(self.blocks)
        fixed_order = self.token_order.before_layers(tokens)
        ordered_by_input = self.token_order.needs_input(tokens.shape)

        def run_layer(segment, carry, inputs):
            x, order = carry
            layer, state, stored = inputs
            if layer_weights is not None:
                state = layer_weights.make(nnx.to_pure_dict(state), stored)
            block = nnx.merge(graphdef, state)
            if isinstance(block.ffn, SparseFFN):
                block.ffn.options = segment.options(block.ffn.options)
            x = block.attend(x)
            if ordered_by_input and segment.first == 0:
                make = partial(self.token_order.of_stream, x, block.ffn_norm, tokens)
                order = make() if segment.stop == 1 else jax.lax.cond(layer == 0, make, lambda: order)
            x, stats = block.feed_forward(x, order if ordered_by_input else fixed_order)
            return (x, order), stats

        stored = None if layer_weights is None else layer_weights.stored
        inputs = (jnp.arange(self.config.num_layers), layers, stored)
        # Until the first layer has made the order, anything of its shape and type stands in its place.
        unmade = tokens.astype(jnp.int32)
        carry = (self._embed(tokens), Permutation(unmade, unmade) if ordered_by_input else None)
        segments = self._segments(first_alone=ordered_by_input)
        exchanged = layer_weights is not None
        (x, _), stats = run_segments(run_layer, carry, inputs, segments, self.config, exchanged=exchanged)
        return self.final_norm(x), stats

    def _segments(self, *, first_alone: bool) -> list[Segment]:
        if self.plan is None:
            return [Segment(0, self.config.num_layers)]
        return self.plan.segments(first_alone=first_alone)

    def refresh_token_order(self, tokens: jax.Array, *, axis_name: str | None = None) -> None:
        """Renews what ``config.token_order`` keeps, from the weights as they are and some tokens.

        In a training, call it at the start and then every fifty steps or so, on the batch at hand: it costs
        the attention of one layer, with no gradient. Like all that changes a module it belongs inside
        ``nnx.jit``, or between ``nnx.merge`` and ``nnx.split``. Orders that keep nothing stay as they are.

        Args:
          tokens: (B, S) int32.
          axis_name: a mapped axis (``pmap``, ``shard_map``) over which the batch is split.
        """
        if self.token_order.follows:
            x = jax.lax.stop_gradient(self.first_ffn_input(tokens))
            self.token_order.refresh(x, self.embedding[...], axis_name=axis_name)

    def first_ffn_input(self, tokens: jax.Array) -> jax.Array:
        """What enters the first layer's feed-forward part: (B, S) int32 tokens to (B, S, D) in
        the compute type."""
        graphdef, layers = nnx.split(self.blocks)
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], layers))
        return block.ffn_norm(block.attend(self._embed(tokens)))

    def ffn_inputs(self, tokens: jax.Array) -> jax.Array:
        """What enters each layer's feed-forward part: (B, S) int32 tokens to (L, B, S, D) in
        the compute type."""
        graphdef, layers = nnx.split(self.blocks)

        def run_layer(x, state):
            block = nnx.merge(graphdef, state)
            x = block.attend(x)
            return block.feed_forward(x)[0], block.ffn_norm(x)

        x = self._embed(tokens)
        return jax.lax.scan(run_layer, x, layers)[1]

    def residual_streams(self, tokens: jax.Array) -> jax.Array:
        """What each layer's feed-forward norm reads: (B, S) int32 tokens to (L, B, S, D) in
        the compute type."""
        graphdef, layers = nnx.split(self.blocks)

        def run_layer(x, state):
            block = nnx.merge(graphdef, state)
            x = block.attend(x)
            return block.feed_forward(x)[0], x

        return jax.lax.scan(run_layer, self._embed(tokens), layers)[1]

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return scaled(self.embedding[...][tokens].astype(self.config.dtype), self.config.embedding_scale)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The output head: (..., D) hidden states to (..., V) f32."""
        hidden, weight = self._head(hidden)
        return jnp.einsum(
            "...d,vd->...v", hidden, weight.astype(self.config.dtype), preferred_element_type=jnp.float32
        )

    def cross_entropy(
        self, hidden: jax.Array, targets: jax.Array, *, z_loss: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """What training minimises, from hidden states (B, S, D) and next tokens (B, S): see `cross_entropy`.

        The logits of all tokens never exist at once.
        """
        return cross_entropy(*self._head(hidden), targets, z_loss=z_loss)

    def log_likelihoods(self, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of next tokens (...) behind hidden states (..., D), and which are the most likely ones:
        see `log_likelihoods`."""
        return log_likelihoods(*self._head(hidden), targets)

    def _head(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the output head multiplies: hidden states and its weight (V, D) f32."""
        head = self.embedding if self.head is None else self.head
        return scaled(hidden, 1.0 / self.config.logit_divisor), head[...]


def _check_plan(plan: LayerPlan, config: ModelConfig) -> None:
    if len(plan.layouts) != config.num_layers:
        raise ValueError(
            f"a plan must have a format for each of the model's {config.num_layers} layers; "
            f"got {len(plan.layouts)}"
        )
    if config.activation == SILU:
        raise ValueError(f"a plan is for layers with silent neurons; the model's activation is {SILU}")


def num_parameters(config: ModelConfig) -> int:
    """Parameters of ``SparseLM(config)``, each counted once (tied embeddings too)."""
    kv_width = config.num_kv_heads * config.head_dim
    biases = config.d_model + 2 * kv_width if config.qkv_bias else 0
    norms = 2 * config.d_model
    layers = config.num_layers * (_layer_matrices(config) + biases + norms)
    tables = (1 if config.tied_embeddings else 2) * config.vocab_size * config.d_model
    return layers + tables + config.d_model


def flops_per_token(config: ModelConfig, context_length: int) -> float:
    """Model FLOPs of one training token, forward and backward, as if every feed-forward layer were dense.

    The convention (arXiv 2204.02311, appendix B, with the causal half of the scores counted, not all of
    them): ``6 N + 6 L D T``, where N counts the weights that multiply a token: attention, feed-forward and
    the output head, but no embedding look-up, norm or bias. A multiply-add is 2 FLOPs; rematerialisation and
    sparsity do not change the figure. The forward alone is a third of it.

    Args:
      config: the model.
      context_length: T, tokens of the sequences it is trained on.
    """
    matrices = config.num_layers * _layer_matrices(config) + config.vocab_size * config.d_model
    attention = config.num_layers * config.d_model * context_length
    return 6.0 * (matrices + attention)


def _layer_matrices(config: ModelConfig) -> int:
    kv_width = config.num_kv_heads * config.head_dim
    attention = 2 * config.d_model * (config.d_model + kv_width)
    return attention + (3 if config.gated else 2) * config.d_model * config.d_ff
