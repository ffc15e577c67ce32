"""Tiny models that the tests of this folder share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import ModelConfig, SparseLM

CONFIG = ModelConfig(
    vocab_size=61,
    d_model=32,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    context_length=16,
    rope_theta=100.0,
    dtype="float32",
    qkv_bias=True,
    tied_embeddings=False,
    init_std=0.3,
)


def randomized(config: ModelConfig, seed: int = 0) -> SparseLM:
    """A model whose biases and norm scales are off their initial 0 and 1, so that tests see them."""
    model = SparseLM(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def nudge(leaf: jax.Array) -> jax.Array:
        return leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map(nudge, nnx.state(model)))
    return model


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def model() -> SparseLM:
    """Qwen2-like (qkv biases, untied head), two key/value heads for four query heads, f32."""
    return randomized(CONFIG)


@pytest.fixture(scope="session")
def tied_model() -> SparseLM:
    """Non-gated, tied embeddings, no biases, f32."""
    return randomized(dataclasses.replace(CONFIG, gated=False, tied_embeddings=True, qkv_bias=False))


@pytest.fixture(scope="session")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(7), (4, 16), 0, CONFIG.vocab_size)


@pytest.fixture(scope="session")
def forward():
    """Jitted ``(graphdef, state, tokens) -> (logits, stats)``, compiled once a model for all tests."""
    return jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)
