"""Runs that need no corpus and no long training first: random tokens, a model that is sparse from the start.

An untrained gate is positive for half of the tokens, where no sparse kernel can pay, and a model has no
biases to shift it by. So the embedding shifts it: `sparse_from_the_start` draws weights with which the input
of every feed-forward layer is what `pallas_kernels.inputs` takes, a constant, a token's own shift and
standard normal values, and copies that module's gates, whose neurons are then as active as those of a trained
layer (`like_trained`).

    embedding row of a token:  σ (1, shift, z)       σ = init_std, z standard normal, partly its topic's
    attention output, w_down:  normal, a small share of their usual deviation (`output_share`)

All layers together then add a hundredth to each coordinate of the residual stream, and RMSNorm gives back
(1, shift, z) in front of every layer. More would change the activity: the bias of a neuron that fires for
one token in ten thousand is 3.7 times the constant, which is one coordinate, and with a tenth less of it the
neuron fires four times as often. All that a step computes, and how long it takes, is what it is in any model
of this size.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.inputs import Activity, ffn_inputs, like_trained, token_values
from sparse_lm import ModelConfig
from train.state import Params, Program

_DISTURBANCE = 0.01
"""How much all layers together may add to a coordinate of the residual stream, as a share of it."""


def random_tokens(config: ModelConfig, batch_size: int, *, seed: int = 0) -> np.ndarray:
    """(batch_size, context_length + 1) int32, uniform over the vocabulary."""
    shape = (batch_size, config.context_length + 1)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


def sparse_from_the_start(program: Program, nnz: float) -> Program:
    """The same run from initial weights with which every layer has about ``nnz`` active neurons a token.

    Raises:
      RequestError: more active neurons than a layer can have.
    """
    config = program.config
    gates = like_trained(nnz, config.model.d_ff)
    jax.eval_shape(
        lambda: _gate(jax.random.key(0), gates, config.model)
    )  # raises before anything is compiled

    def init():
        state = program.init()
        params = _sparse_weights(state.params, config.model, gates, jax.random.key(config.seed))
        return dataclasses.replace(state, params=params)

    return dataclasses.replace(program, init=init)


def _gate(key: jax.Array, gates: Activity, model: ModelConfig) -> jax.Array:
    """(F, D) f32, the rectified projection of one layer."""
    inputs = ffn_inputs(key, gates, tokens=1, d_model=model.d_model, d_ff=model.d_ff, dtype=jnp.float32)
    return inputs["w_gate"]


def output_share(model: ModelConfig) -> float:
    """Of their usual deviation, what leaves `_DISTURBANCE` of the residual stream's.

    A layer adds the most where a token attends to itself alone: its normalised D coordinates pass two
    matrices of deviation σ, which makes them σ² D, and the stream's own are σ. Those of L layers add up to √L
    times as much.
    """
    return _DISTURBANCE / (model.init_std * model.d_model * math.sqrt(model.num_layers))


def sparse_embedding(keys: jax.Array, gates: Activity, model: ModelConfig) -> jax.Array:
    """(V, D) f32, with which gates of this activity have it; ``keys`` are two."""
    for_shift, for_tokens = keys
    columns = [
        jnp.ones((model.vocab_size, 1)),
        gates.token_spread * jax.random.normal(for_shift, (model.vocab_size, 1)),
        token_values(for_tokens, gates, tokens=model.vocab_size, width=model.d_model - 2),
    ]
    return model.init_std * jnp.concatenate(columns, axis=1)


def _sparse_weights(params: Params, model: ModelConfig, gates: Activity, key: jax.Array) -> Any:
    keys = jax.random.split(key, 2 + model.num_layers)
    attention, ffn = params["blocks"]["attention"], params["blocks"]["ffn"]
    share = output_share(model)
    output = jax.tree.map(lambda weight: share * weight, attention["output"])
    gate = jax.lax.map(lambda key: _gate(key, gates, model), keys[2:])
    ffn = ffn | {"w_gate" if model.gated else "w_up": gate, "w_down": share * ffn["w_down"]}
    blocks = params["blocks"] | {"attention": attention | {"output": output}, "ffn": ffn}
    return params | {"embedding": sparse_embedding(keys[:2], gates, model), "blocks": blocks}
