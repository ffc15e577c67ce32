"""What training adds for sparsity: the L1 term and its schedule, statistics per layer, dead neurons."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import FFNStats
from sparse_lm.config import SparsityConfig


def l1_coefficient(step: jax.Array | int, config: SparsityConfig) -> jax.Array:
    """λ(step), () f32 and traceable: constant, or 0 for ``off_steps`` and then a linear ramp
    (paper section 4).

    With a linear schedule it is 0 up to and including step ``off_steps`` and reaches ``config.l1`` at step
    ``off_steps + ramp_steps``; a ramp of 0 steps is a jump at step ``off_steps``.
    """
    if config.schedule == "constant":
        return jnp.float32(config.l1)
    past = jnp.asarray(step, jnp.float32) - config.off_steps
    progress = past / config.ramp_steps if config.ramp_steps else past >= 0
    return config.l1 * jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)


def training_loss(
    logits: jax.Array, targets: jax.Array, stats: FFNStats, coefficient: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """``CE + coefficient * mean over layers of l1`` (paper section 4).

    Args:
      logits: (B, S, V) f32.
      targets: (B, S) int32, the next tokens.
      stats: the model's, every leaf with a leading layer axis.
      coefficient: () λ of this step.

    Returns:
      The loss, () f32, and its parts: ``ce`` in nats per token; ``l1`` and ``l0``, means over layers of the
      mean over tokens. All () f32.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    ce = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)
    l1, l0 = jnp.mean(stats.l1), jnp.mean(stats.l0)
    return ce + coefficient * l1, {"ce": ce, "l1": l1, "l0": l0}


def layer_summary(stats: FFNStats) -> dict[str, jax.Array]:
    """One (L,) array per statistic of a call, from statistics with a leading layer axis.

    ``l1``, ``l0`` (means over tokens, f32), ``max_nnz``, ``overflow_rows`` (int32) and ``dead_fraction``, the
    share of neurons that no token of the call activated (f32).
    """
    return {
        "l1": stats.l1,
        "l0": stats.l0,
        "max_nnz": stats.max_nnz,
        "overflow_rows": stats.overflow_rows,
        "dead_fraction": jnp.mean(stats.neuron_hits == 0, axis=-1, dtype=jnp.float32),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NeuronActivity:
    """For how many steps in a row each neuron has been silent: part of the training state.

    The paper calls a neuron dead when no token of a whole step (about a million) activates it (section 4).

    Attributes:
      silent_steps: (L, F) int32, steps since the neuron last fired; 0 if the last step saw it fire.
    """

    silent_steps: jax.Array

    @classmethod
    def start(cls, num_layers: int, d_ff: int) -> "NeuronActivity":
        """Counters before the first step: every neuron counts as live."""
        return cls(jnp.zeros((num_layers, d_ff), jnp.int32))

    def update(self, neuron_hits: jax.Array) -> "NeuronActivity":
        """The counters after a step whose tokens, on all devices and micro-batches, made (L, F) hits."""
        return NeuronActivity(jnp.where(neuron_hits > 0, 0, self.silent_steps + 1))

    def dead(self, window: int = 1) -> jax.Array:
        """(L, F) bool, neurons silent for at least the last ``window`` steps."""
        return self.silent_steps >= window

    def live_neurons(self, window: int = 1) -> jax.Array:
        """(L,) int32, neurons of each layer that fired within the last ``window`` steps."""
        return jnp.sum(~self.dead(window), axis=-1, dtype=jnp.int32)
