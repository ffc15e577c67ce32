"""A model made ready for inference: layers apart, weights in the compute type, a cache written in place.

A scan over stacked weights copies each layer's weights before it uses them, which at one token a step costs
more than the arithmetic. So the layers stand apart here, split and cast once, and a step is unrolled over
them. The projections of queries, keys and values are one matrix, for they read the same input.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import decode, device, ffn, reference, sparse_ffn, sparse_mlp
from sparse_lm.attention import attend
from sparse_lm.config import SILU, ModelConfig
from sparse_lm.layers import rms_norm, rotary, scaled
from sparse_lm.model import SparseLM
from sparse_lm.rope import frequencies
from sparse_lm.silu import silu_ffn

_LOGITS_AT_ONCE = 64  # positions of each row

_Attended = Callable[[int, jax.Array | decode.Normed], jax.Array]
"""Attention of one token a row, from a layer's number and its normed input (B, D): (B, N H)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices in the compute type with one row an output, norm scales in f32.

    N query heads and K key/value heads of H stand one after the other in ``qkv``: all queries, keys, values.

    Attributes:
      attention_norm, ffn_norm: (D,).
      qkv: ((N + 2 K) H, D).
      qkv_bias: ((N + 2 K) H,), or None.
      output: (D, N H).
      w_gate: (F, D), or None without a gate.
      w_up, w_down: (F, D).
    """

    attention_norm: jax.Array
    qkv: jax.Array
    qkv_bias: jax.Array | None
    output: jax.Array
    ffn_norm: jax.Array
    w_gate: jax.Array | None
    w_up: jax.Array
    w_down: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """Keys and values of the positions seen so far, one array a layer, each of capacity C.

    Rows may be of different lengths: what lies at or behind ``lengths[row]`` is ignored.

    Attributes:
      keys, values: for each layer (B, C, K, H), in the compute type.
      lengths: (B,) int32, positions filled in each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """C, positions that fit a row."""
        return self.keys[0].shape[1]

    def grown(self, capacity: int) -> "LayerCaches":
        """The same with room for ``capacity`` positions, at least as many as now."""
        more = ((0, 0), (0, capacity - self.capacity), (0, 0), (0, 0))
        pad = partial(jax.tree.map, lambda leaf: jnp.pad(leaf, more))
        return dataclasses.replace(self, keys=pad(self.keys), values=pad(self.values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InferenceModel:
    """A `SparseLM` without its gradient; made by `InferenceModel.of`.

    Its feed-forward layers take tokens as they come, whatever ``config.token_order`` says: an order changes
    no result.

    Attributes:
      config: the model's.
      embedding: (V, D) in the compute type.
      layers: the weights of each layer.
      final_norm: (D,) f32.
      head: (V, D) in the compute type, or None where it is the embedding.
    """

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    embedding: jax.Array
    layers: tuple[LayerWeights, ...]
    final_norm: jax.Array
    head: jax.Array | None

    @classmethod
    def of(cls, model: SparseLM) -> "InferenceModel":
        """Splits and casts a model's weights, once for any number of calls."""
        dtype = jnp.dtype(model.config.dtype)
        blocks = nnx.to_pure_dict(nnx.state(model.blocks))
        layers = [_layer_weights(blocks, nth, dtype) for nth in range(model.config.num_layers)]
        return cls(
            config=model.config,
            embedding=model.embedding[...].astype(dtype),
            layers=tuple(layers),
            final_norm=model.final_norm.scale[...],
            head=None if model.head is None else model.head[...].astype(dtype),
        )

    def prefill(self, tokens: jax.Array, counts: jax.Array, capacity: int) -> tuple[jax.Array, LayerCaches]:
        """Reads prompts from their beginning.

        Args:
          tokens: (B, S) int32, prompts padded behind their end.
          counts: (B,) int32, tokens of each prompt.
          capacity: positions of the cache, at least S.

        Returns:
          The hidden state (B, D) of each prompt's last token, and the cache that holds the prompts.
        """
        batch, steps = tokens.shape
        room = ((0, 0), (0, capacity - steps), (0, 0), (0, 0))
        positions = jnp.arange(steps, dtype=jnp.int32)[None]
        x = self._embed(tokens)
        keys, values = [], []
        for layer in self.layers:
            query, key, value = self._project(layer, x, positions)
            x = self._finish_layer(layer, x, attend(query, key, value))
            keys.append(jnp.pad(key, room))
            values.append(jnp.pad(value, room))
        last = x[jnp.arange(batch), counts - 1]
        return self._final(last), LayerCaches(tuple(keys), tuple(values), counts)

    def extend(self, tokens: jax.Array, cache: LayerCaches) -> tuple[jax.Array, LayerCaches]:
        """Reads tokens behind those in a cache.

        Args:
          tokens: (B, S) int32. Keys and values of what does not fit the cache are lost.
          cache: what stands before; donate it, and it is written in place.

        Returns:
          Hidden states (B, S, D), and the cache that holds ``tokens`` too.
        """
        batch, steps = tokens.shape
        backend = self._backend(batch)
        if steps == 1 and backend is not None:
            hidden, cache = self._extend_by_one(tokens[:, 0], cache, interpret=backend == "interpret")
            return hidden[:, None], cache
        rows = jnp.arange(batch)[:, None]
        positions = cache.lengths[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
        visible = jnp.arange(cache.capacity)[None, None] <= positions[..., None]
        write = partial(_write, rows=rows, positions=positions)
        x = self._embed(tokens)
        keys, values = list(cache.keys), list(cache.values)
        for nth, layer in enumerate(self.layers):
            query, key, value = self._project(layer, x, positions)
            keys[nth] = write(keys[nth], key)
            values[nth] = write(values[nth], value)
            x = self._finish_layer(layer, x, attend(query, keys[nth], values[nth], visible))
        return self._final(x), LayerCaches(tuple(keys), tuple(values), cache.lengths + steps)

    def _extend_by_one(
        self, tokens: jax.Array, cache: LayerCaches, *, interpret: bool
    ) -> tuple[jax.Array, LayerCaches]:
        """`extend` by one token (B,) a row, of which every part is one kernel: hidden states (B, D)."""
        cos, sin = self._angles(cache.lengths)
        keys, values = list(cache.keys), list(cache.values)
        arrivals = jnp.zeros((len(tokens), self.config.num_kv_heads), jnp.int32)

        def attended(nth: int, normed: jax.Array | decode.Normed) -> jax.Array:
            """What attention of layer ``nth`` gives (B, N H); writes its cache."""
            nonlocal arrivals
            layer = self.layers[nth]
            qkv = decode.project(normed, layer.qkv, interpret=interpret)
            if layer.qkv_bias is not None:
                qkv += layer.qkv_bias[None]
            y, keys[nth], values[nth], arrivals = decode.attention(
                qkv, keys[nth], values[nth], cache.lengths, cos, sin, arrivals, interpret=interpret
            )
            return y

        x = self._embed(tokens)
        run = self._layers_on_stream if self._is_on_stream(x) else self._layers_with_norms
        hidden = run(x, attended, interpret=interpret)
        return hidden, LayerCaches(tuple(keys), tuple(values), cache.lengths + 1)

    def _is_on_stream(self, x: jax.Array) -> bool:
        """Whether the feed-forward layers of x (B, D) run decode kernels that take part in the residual
        stream."""
        if len(x) > decode.ROWS_TOKENS or self.config.activation == SILU:
            return False
        path = ffn.path(x, self.layers[0].w_up, self.config.ffn_options)
        return path is not None and path.layout.name == "decode"

    def _layers_on_stream(self, x: jax.Array, attended: _Attended, *, interpret: bool) -> jax.Array:
        """Hidden states (B, D) of embedded tokens x (B, D): residual sums and norms are parts of the kernels
        around them."""
        config = self.config
        stream = decode.Stream.of(x)
        for nth, layer in enumerate(self.layers):
            y = attended(nth, stream.normed(layer.attention_norm, config.norm_eps))
            onto = decode.Residual(stream.x, config.residual_scale)
            stream = decode.project_onto(onto, y, layer.output, interpret=interpret)
            normed = stream.normed(layer.ffn_norm, config.norm_eps)
            onto = decode.Residual(stream.x, config.residual_scale)
            weights = layer.w_gate, layer.w_up, layer.w_down
            stream = decode.layer_onto(
                onto, normed, *weights, rule=config.ffn_options.rule, interpret=interpret
            )
        return self._final(stream.x)

    def _layers_with_norms(self, x: jax.Array, attended: _Attended, *, interpret: bool) -> jax.Array:
        """The same with feed-forward layers as they come, between which sums and norms are kernels."""
        factor = self.config.residual_scale
        add_norm = partial(decode.add_norm, eps=self.config.norm_eps, interpret=interpret)
        normed = self._norm(x, self.layers[0].attention_norm)
        following = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for nth, (layer, scale) in enumerate(zip(self.layers, following, strict=True)):
            added = decode.project(attended(nth, normed), layer.output, interpret=interpret)
            x, normed = add_norm(x, scaled(added, factor), layer.ffn_norm)
            x, normed = add_norm(x, scaled(self._feed_forward(layer, normed), factor), scale)
        return normed

    def _backend(self, batch: int) -> str | None:
        """What runs the kernels of a step, ``"triton"`` or ``"interpret"``; None where XLA runs the step."""
        asked = self.config.ffn.backend
        if self.config.head_dim not in decode.HEAD_DIMS or batch > decode.MOST_TOKENS:
            return None
        if asked == "interpret":
            return "interpret"
        chip = device.current()
        runs = chip.is_nvidia and chip.capability >= 80 and asked != "xla"
        return "triton" if runs else None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The output head: (..., D) hidden states to (..., V) f32."""
        weight = self.embedding if self.head is None else self.head
        hidden = scaled(hidden, 1.0 / self.config.logit_divisor)
        backend = self._backend(len(hidden)) if hidden.ndim == 2 else None
        if backend is not None:
            return decode.project(hidden, weight, dtype=jnp.float32, interpret=backend == "interpret")
        return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)

    def log_likelihoods(self, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of next tokens (B, S) behind hidden states (B, S, D): ``ln p(target)`` (B, S) f32, and whether the
        target is the most likely token (B, S). Logits of a long text never exist all at once."""

        def part(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            states, tokens = inputs
            logits = self.logits(states)
            picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == tokens

        rows, steps, _ = hidden.shape
        size = math.gcd(steps, _LOGITS_AT_ONCE)

        def parts(values: jax.Array) -> jax.Array:
            return jnp.moveaxis(values.reshape(rows, steps // size, size, *values.shape[2:]), 1, 0)

        both = jax.lax.map(part, (parts(hidden), parts(targets)))
        log_p, most_likely = (jnp.moveaxis(values, 0, 1).reshape(rows, steps) for values in both)
        return log_p, most_likely

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return scaled(self.embedding[tokens], self.config.embedding_scale)

    def _final(self, x: jax.Array) -> jax.Array:
        return self._norm(x, self.final_norm)

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, eps=self.config.norm_eps, dtype=self.config.dtype)

    def _project(
        self, layer: LayerWeights, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, S, N, H), keys and values (B, S, K, H) of x (B, S, D), rotated to their positions."""
        config = self.config
        qkv = _linear(self._norm(x, layer.attention_norm), layer.qkv)
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias[None, None]
        heads = qkv.reshape(*x.shape[:2], -1, config.head_dim)
        query, key, value = jnp.split(
            heads, (config.num_heads, config.num_heads + config.num_kv_heads), axis=2
        )
        turns, amplitude = self._turns()
        return rotary(query, positions, turns, amplitude), rotary(key, positions, turns, amplitude), value

    def _turns(self) -> tuple[np.ndarray, float]:
        """Radians a position of each pair of a head's dimensions (H / 2,), and the rotation's amplitude."""
        config = self.config
        turns = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return turns, config.rope_scaling.amplitude

    def _finish_layer(self, layer: LayerWeights, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x (B, S, D) with what attention (B, S, N, H) and then the feed-forward part add to it."""
        scale = self.config.residual_scale
        x = x + scaled(_linear(attended.reshape(*x.shape[:2], -1), layer.output), scale)
        return x + scaled(self._feed_forward(layer, self._norm(x, layer.ffn_norm)), scale)

    def _feed_forward(self, layer: LayerWeights, x: jax.Array) -> jax.Array:
        if self.config.activation == SILU:
            return silu_ffn(x, layer.w_gate, layer.w_up, layer.w_down)[0]
        if layer.w_gate is None:
            return sparse_mlp(x, layer.w_up, layer.w_down, options=self.config.ffn_options)[0]
        return sparse_ffn(x, layer.w_gate, layer.w_up, layer.w_down, options=self.config.ffn_options)[0]

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine (B, H / 2) of the rotation at positions (B,)."""
        turns, amplitude = self._turns()
        angles = positions.astype(jnp.float32)[:, None] * turns[None]
        return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def _write(cache: jax.Array, new: jax.Array, *, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """The (B, C, K, H) keys or values with new (B, S, K, H) ones at their places; those beyond C are lost."""
    places = cache.at[rows, positions]
    return places.set(new, mode="drop", unique_indices=True, indices_are_sorted=True)


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """(..., D_in) and (D_out, D_in) to (..., D_out), in their type."""
    rows = x.reshape(-1, x.shape[-1])
    return reference.project(rows, weight).reshape(*x.shape[:-1], -1)


@partial(jax.jit, static_argnames="dtype")
def _layer_weights(blocks: dict, nth: jax.Array | int, dtype: jnp.dtype) -> LayerWeights:
    """Layer ``nth`` of the stacked blocks' state."""
    block = jax.tree.map(lambda leaf: leaf[nth], blocks)
    attention, ffn = block["attention"], block["ffn"]
    parts = [attention[name] for name in ("query", "key", "value")]
    biases = [part["bias"] for part in parts if part.get("bias") is not None]
    return LayerWeights(
        attention_norm=block["attention_norm"]["scale"],
        qkv=jnp.concatenate([part["kernel"].T for part in parts]).astype(dtype),
        qkv_bias=jnp.concatenate(biases).astype(dtype) if biases else None,
        output=attention["output"]["kernel"].T.astype(dtype),
        ffn_norm=block["ffn_norm"]["scale"],
        w_gate=ffn["w_gate"].astype(dtype) if ffn.get("w_gate") is not None else None,
        w_up=ffn["w_up"].astype(dtype),
        w_down=ffn["w_down"].astype(dtype),
    )
