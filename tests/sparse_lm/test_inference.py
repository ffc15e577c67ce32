"""The model made ready for inference computes what the model does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import SparseLM
from sparse_lm.inference import InferenceModel


@pytest.mark.parametrize("name", ["model", "tied_model"])
def test_logits_equal_the_models(name, request, forward, tokens):
    """A prompt, then one token, then several: at every place what the whole forward gives."""
    model = request.getfixturevalue(name)
    want, _ = forward(*nnx.split(model), tokens)
    ready = InferenceModel.of(model)
    counts = jnp.array([3, 1, 5, 2], jnp.int32)
    hidden, cache = jax.jit(ready.prefill, static_argnums=2)(tokens[:, :5], counts, 12)
    rows = np.arange(4)
    np.testing.assert_allclose(ready.logits(hidden), want[rows, counts - 1], atol=2e-5, rtol=2e-5)
    extend = jax.jit(ready.extend, donate_argnums=1)
    for steps in (1, 4):
        places = np.asarray(cache.lengths)[:, None] + np.arange(steps)
        hidden, cache = extend(tokens[rows[:, None], places], cache)
        np.testing.assert_allclose(ready.logits(hidden), want[rows[:, None], places], atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(cache.lengths, counts + 5)


def test_weights_are_cast_and_scales_are_not(config):
    model = SparseLM(dataclasses.replace(config, dtype="bfloat16"), rngs=nnx.Rngs(0))
    ready = InferenceModel.of(model)
    assert len(ready.layers) == config.num_layers
    wide = {leaf.shape for leaf in jax.tree.leaves(ready) if leaf.dtype == jnp.float32}
    assert wide == {(config.d_model,)}
    np.testing.assert_array_equal(ready.layers[1].w_up, model.blocks.ffn.w_up[...][1].astype(jnp.bfloat16))


def test_a_step_writes_its_cache_in_place(model):
    """The compiled step holds no second copy of a donated cache."""
    ready = InferenceModel.of(model)
    _, cache = ready.prefill(jnp.ones((2, 2), jnp.int32), jnp.array([2, 2], jnp.int32), 16)
    compiled = jax.jit(ready.extend, donate_argnums=1).lower(jnp.ones((2, 1), jnp.int32), cache).compile()
    memory = compiled.memory_analysis()
    size = sum(leaf.nbytes for leaf in (*cache.keys, *cache.values))
    assert memory.alias_size_in_bytes >= size
