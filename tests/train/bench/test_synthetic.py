"""A model that is sparse from its first step on, and the tokens it is timed with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import ModelConfig
from train.bench import synthetic
from train.config import OptimizerConfig, TrainConfig
from train.state import build_program
from train.step import make_train_step

# Deviations of 0.3 at a width of 64 do to the residual stream what 0.02 do at a width of 1,000.
SIZES = {
    "vocab_size": 512, "d_model": 64, "d_ff": 1024, "num_layers": 16, "num_heads": 2, "num_kv_heads": 2,
    "context_length": 64, "init_std": 0.3,
}  # fmt: skip


def program(gated=True):
    optimizer = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)
    model = ModelConfig(**SIZES, gated=gated)
    return build_program(TrainConfig(steps=2, batch_size=8, model=model, optimizer=optimizer))


@pytest.mark.parametrize(("gated", "nnz"), [(True, 12), (False, 60)])
def test_every_layer_has_as_many_active_neurons_as_asked_in_every_step(gated, nnz):
    sparse = synthetic.sparse_from_the_start(program(gated), nnz)
    state, step = jax.jit(sparse.init)(), jax.jit(make_train_step(sparse))
    tokens = synthetic.random_tokens(sparse.config.model, 8)
    for _ in range(2):
        state, metrics = step(state, tokens)
        np.testing.assert_allclose(metrics["l0_per_layer"], nnz, rtol=0.1)
        assert metrics["max_nnz"] < 4 * nnz
    assert jnp.isfinite(metrics["loss"])


def test_more_active_neurons_than_there_are_is_refused():
    with pytest.raises(ValueError, match="a mean nnz of 900 needs more than the 1024 live neurons of F=1024"):
        synthetic.sparse_from_the_start(program(), 900)


def test_random_tokens():
    model = ModelConfig(**SIZES)
    tokens = synthetic.random_tokens(model, 4, seed=1)
    assert (tokens.shape, tokens.dtype) == ((4, 65), np.int32)
    assert (tokens.min() >= 0, tokens.max() < 512) == (True, True)
    np.testing.assert_array_equal(tokens, synthetic.random_tokens(model, 4, seed=1))
    assert (tokens != synthetic.random_tokens(model, 4, seed=2)).any()
