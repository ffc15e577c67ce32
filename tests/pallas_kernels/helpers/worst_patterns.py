"""Patterns of activity that are worst for one format or another, and layers that have exactly
a given pattern.

The gate's weight is the identity, so that x is the gate and a pattern is whatever x is positive at.
"""

import jax.numpy as jnp
import numpy as np
from op_checks import DL1, check_counts, check_gradients, check_values, compiled, cotangent, run

from pallas_kernels import FFNOptions, FFNStats


def worst(tokens: int, width: int, panel: int) -> dict[str, np.ndarray]:
    """(M, F) bool by name, for panels of ``panel`` tokens."""
    token, neuron = np.indices((tokens, width))
    return {
        "every token disjoint from its neighbours": token % width == neuron,
        "one neuron active everywhere": neuron == width - 1,
        "one token with all neurons active": token == 17,
        "empty and full panels in turn": token // panel % 2 == 1,
        "one neuron of a panel more than a chunk": neuron < 2 * panel + 1,
        "nothing": token < 0,
        "everything": token >= 0,
    }


def layer(active: np.ndarray, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Arguments of a gated layer whose active neurons are those of ``active`` (M, F)."""
    rng = np.random.default_rng(0)
    magnitude, width = rng.uniform(0.25, 2, active.shape), active.shape[1]
    up, down = rng.standard_normal((2, width, width)) / np.sqrt(width)
    inputs = {
        "x": np.where(active, magnitude, -magnitude),
        "w_gate": np.eye(width),
        "w_up": up,
        "w_down": down,
    }
    return {name: value.astype(jnp.dtype(dtype)) for name, value in inputs.items()}


def check(active: np.ndarray, options: FFNOptions, dtype: str = "float32") -> FFNStats:
    """Values, counts and gradients of the layer with a pattern, against the truth in float64."""
    inputs = layer(active, dtype)
    dy = cotangent(inputs)
    (y, stats), gradients = run(compiled(options), inputs, dy, DL1)
    check_values(y, stats, inputs)
    check_counts(stats, active, int(stats.overflow_rows))
    check_gradients(gradients, inputs, dy, DL1)
    return stats
