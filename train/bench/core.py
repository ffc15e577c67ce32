"""The forward of a model's core, embedding to last norm without the output head, as benchmarks run it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import FFNStats
from pallas_kernels.options import Auto, Panel
from sparse_lm import ModelConfig
from sparse_lm.model import flops_per_token
from train.bench import synthetic
from train.config import OptimizerConfig, TrainConfig
from train.data.holdout import TextChoice
from train.errors import UserError
from train.heldout import read_heldout, sequences_of
from train.run.checkpoint_reading import load_for_inference
from train.state import Params, build_program, weight_decay_mask


@dataclasses.dataclass(frozen=True)
class Source:
    """The model that is timed, and its tokens.

    Attributes:
      model: sizes and numerics.
      tokens: (B, S) int32.
      make: () -> parameters, on the device; matrices in the compute type, as inference has them.
      notes: sentences on what the text is, where that is not what training held out.
    """

    model: ModelConfig
    tokens: np.ndarray
    make: Callable[[], Params]
    notes: tuple[str, ...] = ()


def synthetic_source(model: ModelConfig, *, batch_size: int, nnz: float) -> Source:
    """Random tokens, and weights with which every layer has ``nnz`` active neurons a token.

    Raises:
      RequestError: more active neurons than a layer can have.
    """
    config = TrainConfig(
        steps=1, batch_size=batch_size, model=model, optimizer=OptimizerConfig(warmup_steps=0)
    )
    program = synthetic.sparse_from_the_start(build_program(config), nnz)
    tokens = synthetic.random_tokens(model, batch_size)[:, :-1]
    return Source(model, tokens, jax.jit(lambda: _rounded(program.init().params, model)))


def checkpoint_source(checkpoint: str, text: TextChoice, *, batch_size: int | None) -> Source:
    """A checkpoint's weights, and its held-out text or another.

    Args:
      checkpoint: a run's workdir, one step's directory, or a converted model.
      text: which text.
      batch_size: sequences; by default as many as there are, up to 64.

    Raises:
      UserError: no such checkpoint, the corpus is gone, or the text has fewer sequences.
    """
    loaded, tokenizer, config, _ = load_for_inference(checkpoint)
    length = config.model.context_length
    wanted = (batch_size or 64) * length
    found, notes = read_heldout(checkpoint, config, tokenizer, text, tokens=wanted)
    tokens = sequences_of(found, context_length=length, tokens=wanted)
    if batch_size is not None and len(tokens) < batch_size:
        raise UserError(
            f"batch-size must be at most {len(tokens)}, the sequences of {length} tokens that the text has; "
            f"got {batch_size}: choose fewer, or another text with --data.paths"
        )
    params = nnx.to_pure_dict(nnx.state(loaded, nnx.Param))
    return Source(config.model, tokens, lambda: _rounded(params, config.model), notes)


def _rounded(params: Params, model: ModelConfig) -> Params:
    """Matrices in the compute type; norms stay as they are."""
    return jax.tree.map(
        lambda leaf, is_matrix: leaf.astype(model.dtype) if is_matrix else leaf,
        params,
        weight_decay_mask(params),
    )


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a forward counted, by layer.

    Attributes:
      l0: mean active neurons of a token.
      overflow_rows: tokens that did not fit the format.
      dense_tokens: tokens that were computed densely, whatever the reason.
      pairs: (panel, neuron) pairs of PanelELL.
    """

    l0: tuple[float, ...]
    overflow_rows: tuple[int, ...]
    dense_tokens: tuple[int, ...]
    pairs: tuple[int, ...]

    @classmethod
    def of(cls, stats: FFNStats) -> "Counts":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: tuple(np.asarray(getattr(stats, name)).tolist()) for name in names})


def forward(model: ModelConfig) -> Callable[[Params, Params, jax.Array], tuple[jax.Array, FFNStats | None]]:
    """``(parameters, buffers, tokens (B, S)) -> (hidden states (B, S, D), statistics)``, to be jitted.

    A dense model gives no statistics: counting is no part of its time.
    """
    graphdef = build_program(_any_run(model)).graphdef
    dense = model.ffn.layout.name == "dense"

    def run(params: Params, buffers: Params, tokens: jax.Array) -> tuple[jax.Array, FFNStats | None]:
        hidden, stats = nnx.merge(graphdef, params | buffers).hidden_states(tokens)
        return hidden, None if dense else stats

    return run


def buffers_of(model: ModelConfig, params: Params, tokens: jax.Array) -> Params:
    """What the model's order of its tokens keeps, made from these tokens."""
    program = build_program(_any_run(model))
    if not program.abstract_state().buffers:
        return {}

    @jax.jit
    def make(params: Params, tokens: jax.Array) -> Params:
        module = nnx.merge(program.graphdef, params | program.init().buffers)
        module.refresh_token_order(tokens)
        return nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))

    return make(params, tokens)


def shapes(source: Source, model: ModelConfig) -> tuple[Any, Any, Any]:
    """Shape and type of the arguments of ``forward(model)``."""
    params = jax.eval_shape(source.make)
    buffers = build_program(_any_run(model)).abstract_state().buffers
    return params, buffers, jax.ShapeDtypeStruct(source.tokens.shape, jnp.int32)


def _any_run(model: ModelConfig) -> TrainConfig:
    return TrainConfig(steps=1, model=model, optimizer=OptimizerConfig(warmup_steps=0))


def flops(model: ModelConfig, tokens: int, counts: Counts | None) -> float:
    """What a forward of the core over so many tokens must compute.

    The convention is `flops_per_token`'s, without the head. Of a feed-forward layer the gate is computed for
    all neurons, and the other projections for those that the format computes: all of a dense token, the
    neurons of a panel for each of its tokens, and its own active neurons for a token of TwELL or HybridELL.

    Args:
      model: as it runs.
      tokens: M.
      counts: of the forward; None if it is dense.
    """
    head = 2.0 * model.vocab_size * model.d_model
    in_all = tokens * (flops_per_token(model, model.context_length) / 3 - head)
    if counts is None:
        return in_all
    others = 2 if model.gated else 1
    a_neuron = 2.0 * model.d_model * others
    layout = model.ffn.layout
    panel = layout.tokens if isinstance(layout, Auto | Panel) else 0
    spared = 0.0
    for l0, dense, pairs in zip(counts.l0, counts.dense_tokens, counts.pairs, strict=True):
        sparse = tokens - dense
        computed = min(panel * pairs, sparse * model.d_ff) if panel else sparse * l0
        spared += a_neuron * (sparse * model.d_ff - computed)
    return in_all - spared


@partial(jax.jit, static_argnames="rows")
def _distance(a: jax.Array, b: jax.Array, rows: int) -> jax.Array:
    a, b = (each.reshape(-1, each.shape[-1]) for each in (a, b))
    a, b = (each[:: max(1, len(each) // rows)].astype(jnp.float32) for each in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def difference(hidden: jax.Array, dense: jax.Array) -> float:
    """|hidden - dense| / |dense| in the Euclidean norm, over some thousand tokens of both (B, S, D)."""
    return float(_distance(hidden, dense, 4096))
