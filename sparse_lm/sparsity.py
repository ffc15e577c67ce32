"""What training adds for sparsity: the schedule of the L1 term, statistics per layer, dead neurons."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import FFNStats
from sparse_lm.config import MAX_SILENCE, SparsityConfig


def l1_coefficient(
    step: jax.Array | int, config: SparsityConfig, steered: jax.Array | float | None = None
) -> jax.Array:
    """λ(step), () f32 and traceable, as ``config.schedule`` says (`SparsityConfig`).

    A linear schedule is 0 up to and including step ``off_steps`` and reaches ``config.l1`` at step
    ``off_steps + ramp_steps``; a ramp of 0 steps is a jump at step ``off_steps``.

    Args:
      step: optimizer steps done before.
      config: the schedule.
      steered: λ as the training state holds it, which a constant schedule takes as it is and ``"target"``
        after ``off_steps``; by default ``config.l1``.
    """
    step = jnp.asarray(step, jnp.int32)
    match config.schedule:
        case "linear":
            past = step.astype(jnp.float32) - config.off_steps
            progress = past / config.ramp_steps if config.ramp_steps else past >= 0
            return config.l1 * jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
        case "staged":
            stage = jnp.searchsorted(jnp.asarray(config.stage_steps, jnp.int32), step, side="right")
            return jnp.asarray((config.l1, *config.stage_l1), jnp.float32)[stage]
    coefficient = jnp.asarray(config.l1 if steered is None else steered, jnp.float32)
    if config.schedule == "target":
        return jnp.where(step >= config.off_steps, coefficient, 0.0)
    return coefficient


def steer_l1(
    coefficient: jax.Array, l0: jax.Array, step: jax.Array | int, config: SparsityConfig
) -> jax.Array:
    """λ after a step that had ``l0`` active neurons, () f32: it grows while there are more than wanted.

    A constant under every schedule but ``"target"``, and before ``off_steps``. The factor is
    ``(1 + steer_rate) ** log2(l0 / target_l0)`` with the exponent kept within ±2, so that λ moves evenly
    however far off l0 is.
    """
    if config.schedule != "target":
        return coefficient
    doublings = jnp.clip(jnp.log2(l0 / config.target_l0), -2.0, 2.0)
    steered = coefficient * (1.0 + config.steer_rate) ** doublings
    return jnp.where(jnp.asarray(step) >= config.off_steps, steered, coefficient)


def layer_summary(stats: FFNStats) -> dict[str, jax.Array]:
    """One (L,) array per statistic of a call, from statistics with a leading layer axis.

    ``l1``, ``l0`` (means over tokens, f32), ``max_nnz``, ``overflow_rows`` (int32) and ``silent_fraction``,
    the share of neurons that no token of the call activated (f32).
    """
    return {
        "l1": stats.l1,
        "l0": stats.l0,
        "max_nnz": stats.max_nnz,
        "overflow_rows": stats.overflow_rows,
        "silent_fraction": jnp.mean(stats.neuron_hits == 0, axis=-1, dtype=jnp.float32),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NeuronActivity:
    """For how many tokens in a row each neuron has been silent: part of the training state.

    Attributes:
      silent_tokens: (L, F) int32, tokens of whole steps since the neuron last fired; 0 if the last step saw
      it
        fire. Counts up to `MAX_SILENCE`.
    """

    silent_tokens: jax.Array

    @classmethod
    def start(cls, num_layers: int, d_ff: int) -> "NeuronActivity":
        """Counters before the first step: no neuron is dead."""
        return cls(jnp.zeros((num_layers, d_ff), jnp.int32))

    def update(self, neuron_hits: jax.Array, tokens: int) -> "NeuronActivity":
        """The counters after a step whose ``tokens``, on all devices and micro-batches, made (L, F) hits."""
        # What is added never carries the sum over the end of int32.
        silent = self.silent_tokens + min(tokens, MAX_SILENCE)
        return NeuronActivity(jnp.where(neuron_hits > 0, 0, jnp.minimum(silent, MAX_SILENCE)))

    def dead(self, config: SparsityConfig) -> jax.Array:
        """(L, F) bool, neurons that none of the last ``config.dead_after`` tokens activated."""
        return self.silent_tokens >= config.dead_after


def revive(gate: jax.Array, dead: jax.Array, key: jax.Array, config: SparsityConfig) -> jax.Array:
    """Gate rows with noise mixed into those of dead neurons, so that tokens can find them again (paper
    section 4).

    Args:
      gate: (L, F, D), rows that decide which tokens activate a neuron.
      dead: (L, F) bool.
      key: of the noise, which is drawn only if any neuron is dead.
      config: share and standard deviation of the noise.

    Returns:
      ``(1 - revive_mix) gate + revive_mix N(0, revive_std²)`` in the rows of dead neurons, ``gate``
      elsewhere.
    """
    mix = config.revive_mix

    def mixed(gate: jax.Array) -> jax.Array:
        noise = config.revive_std * jax.random.normal(key, gate.shape, gate.dtype)
        return jnp.where(dead[..., None], (1.0 - mix) * gate + mix * noise, gate)

    return jax.lax.cond(jnp.any(dead), mixed, lambda gate: gate, gate)
