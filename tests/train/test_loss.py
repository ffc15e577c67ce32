"""The loss of a step is what its formula says of the model's logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from flax import nnx

from sparse_lm import SparseLM
from train.loss import training_loss

TOKENS = np.random.default_rng(1).integers(0, 257, (2, 17)).astype(np.int32)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_is_cross_entropy_weighted_l1_and_z_loss(z_loss):
    model = SparseLM(tiny_runs.MODEL, rngs=nnx.Rngs(0))
    logits, stats = nnx.jit(lambda model: model(TOKENS[:, :-1]))(model)
    lse = jax.nn.logsumexp(logits, axis=-1)
    ce = jnp.mean(lse - jnp.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1)[..., 0])
    found = nnx.jit(lambda model: training_loss(model, jnp.asarray(TOKENS), 0.5, z_loss=z_loss))(model)
    loss, (terms, of_layers) = found
    assert float(loss) == pytest.approx(
        float(ce + 0.5 * stats.l1.mean() + z_loss * (lse**2).mean()), rel=1e-5
    )
    expected = {"loss": loss, "ce": ce, "l1": stats.l1.mean(), "l0": stats.l0.mean()}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {name: float(term) for name, term in expected.items()}, rel=1e-5
    )
    np.testing.assert_array_equal(of_layers.neuron_hits, stats.neuron_hits)
