"""The dense baseline's layer against plain jnp, and a model of such layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import ModelConfig, SparseLM, SparsityConfig
from sparse_lm.config import SILU
from sparse_lm.convert.errors import ConversionError
from sparse_lm.convert.families import family_for
from sparse_lm.inference import InferenceModel
from sparse_lm.silu import SiluFFN

NO_L1 = SparsityConfig(l1=0.0)


def plain(x, weights):
    up = x @ weights["w_up"].T
    hidden = jax.nn.silu(x @ weights["w_gate"].T) * up if "w_gate" in weights else jax.nn.silu(up)
    return hidden @ weights["w_down"], jnp.mean(jnp.sum(jnp.abs(hidden), axis=-1))


@pytest.mark.parametrize("gated", [True, False])
def test_layer_equals_plain_jnp_and_counts_every_neuron(gated):
    ffn = SiluFFN(8, 24, rngs=nnx.Rngs(0), gated=gated, dtype="float32", init_std=0.5)
    graphdef, state = nnx.split(ffn)
    weights = nnx.to_pure_dict(state)
    x = jax.random.normal(jax.random.key(1), (3, 5, 8))

    def loss(of, x, weights):
        y, l1 = of(x, weights)
        return jnp.sum(jnp.sin(y)) + 0.1 * l1

    def layer(x, weights):
        y, stats = nnx.merge(graphdef, weights)(x)
        return y, stats.l1

    found, want = (
        jax.jit(jax.value_and_grad(lambda *a, of=of: loss(of, *a), argnums=(0, 1)))(
            x.reshape(-1, 8) if of is plain else x, weights
        )
        for of in (layer, plain)
    )
    np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(found[1][0].reshape(-1, 8), want[1][0], rtol=1e-4, atol=1e-6)
    assert found[1][1].keys() == weights.keys()
    for name, expected in want[1][1].items():
        np.testing.assert_allclose(found[1][1][name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    stats = ffn(x)[1]
    assert (stats.l0, stats.max_nnz, stats.dense_tokens, stats.pairs) == (24, 24, 15, 0)
    assert (stats.neuron_hits == 15).all()


def test_a_model_of_both_activations_has_the_same_parameters_and_generates_what_it_computes(config, tokens):
    silu = SparseLM(dataclasses.replace(config, activation=SILU, sparsity=NO_L1), rngs=nnx.Rngs(5))
    relu = SparseLM(config, rngs=nnx.Rngs(5))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(silu), nnx.state(relu))
    hidden, stats = jax.jit(lambda tokens: silu.hidden_states(tokens))(tokens)
    np.testing.assert_array_equal(stats.l0, [config.d_ff, config.d_ff])
    assert not np.allclose(hidden, relu.hidden_states(tokens)[0], atol=0.1)
    counts = jnp.full(len(tokens), tokens.shape[1])
    last, _ = InferenceModel.of(silu).prefill(tokens, counts, tokens.shape[1])
    np.testing.assert_allclose(last, hidden[:, -1], rtol=1e-4, atol=1e-4)


def test_what_needs_silent_neurons_is_refused():
    model = ModelConfig(activation=SILU, sparsity=NO_L1)
    with pytest.raises(ValueError, match=r"model.activation must have silent neurons for this; got silu"):
        _ = model.ffn_options
    with pytest.raises(ConversionError, match="only a model with silent neurons can be exported"):
        family_for(model)
    with pytest.raises(ValueError, match=r"model.sparsity.revive must be off with model.activation=silu"):
        dataclasses.replace(model, sparsity=SparsityConfig(l1=0.0, revive="keep"))
