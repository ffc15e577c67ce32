"""The loss of a training step, and what evaluation reads of it."""

import jax
import jax.numpy as jnp

from pallas_kernels import FFNStats
from sparse_lm import SparseLM
from sparse_lm.layer_loop import LayerWeights

Terms = dict[str, jax.Array]


def training_loss(
    model: SparseLM,
    tokens: jax.Array,
    coefficient: jax.Array | float,
    *,
    z_loss: float = 0.0,
    layer_weights: LayerWeights | None = None,
) -> tuple[jax.Array, tuple[Terms, FFNStats]]:
    """``CE + coefficient * mean over layers of l1`` (paper section 4), and the z-loss if there is one.

    Args:
      model: the language model.
      tokens: (B, S + 1) int32, each the target of the one before it.
      coefficient: () λ of this step.
      z_loss: see `sparse_lm.cross_entropy`.
      layer_weights: see `SparseLM.hidden_states`.

    Returns:
      The loss, () f32; its parts ``loss``, ``ce`` in nats per token, and ``l1`` and ``l0``, means over layers
      of the mean over tokens, all () f32; and the statistics, every leaf with a leading layer axis.
    """
    hidden, stats = model.hidden_states(tokens[:, :-1], layer_weights=layer_weights)
    loss, ce = model.cross_entropy(hidden, tokens[:, 1:], z_loss=z_loss)
    l1, l0 = jnp.mean(stats.l1), jnp.mean(stats.l0)
    loss += coefficient * l1
    return loss, ({"loss": loss, "ce": ce, "l1": l1, "l0": l0}, stats)
