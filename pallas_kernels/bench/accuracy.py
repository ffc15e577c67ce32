"""Is a result as good as the dense path's? Errors against an f32 truth, on a sample of rows."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats import TwELL
from pallas_kernels.options import FFNStats

ALLOWED = 1.5
"""How many times the dense path's own error a sparse path may have."""

_ROUNDING = 4 * float(np.finfo(np.float32).eps)
_COUNTER_TOLERANCE = 1e-3
_L1_TOLERANCE = 1e-2


def sample_rows(tokens: int, limit: int = 256) -> np.ndarray:
    """At most ``limit`` row numbers, spread over all tokens, the first and the last among them."""
    return np.unique(np.linspace(0, tokens - 1, min(tokens, limit)).round().astype(np.int32))


def relative_error(result: jax.Array | np.ndarray, truth: jax.Array | np.ndarray) -> float:
    """``|result - truth| / |truth|`` in the Euclidean norm; NaN where the result holds one."""
    result, truth = np.asarray(result, np.float64), np.asarray(truth, np.float64)
    norm = float(np.linalg.norm(truth))
    return float(np.linalg.norm(result - truth)) / (norm if norm > 0 else 1.0)


def acceptable(error: float, dense_error: float) -> bool:
    """Whether an error is within `ALLOWED` of the dense path's; never for NaN."""
    return error <= ALLOWED * dense_error + _ROUNDING


def truth(inputs: Mapping[str, jax.Array], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rectified gates (R, F) and y (R, D) of some rows in f32, from `ffn_inputs`-like arguments."""
    gate, y = _truth(inputs["x"][rows], inputs.get("w_gate"), inputs["w_up"], inputs["w_down"])
    return np.asarray(gate), np.asarray(y)


@jax.jit
def _truth(x, w_gate, w_up, w_down):
    def product(a, b, contract):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return lax.dot_general(a, b, (contract, ((), ())), precision=lax.Precision.HIGHEST)

    by_neuron = ((1,), (1,))
    gate = jnp.maximum(product(x, w_up if w_gate is None else w_gate, by_neuron), 0)
    h = gate if w_gate is None else gate * product(x, w_up, by_neuron)
    return gate, product(h, w_down, ((1,), (0,)))


def take_rows(packed: TwELL, rows: np.ndarray) -> TwELL:
    """Some rows of a packed gate."""
    values = None if packed.values is None else packed.values[rows]
    return dataclasses.replace(packed, words=packed.words[rows], values=values)


def stats_failures(stats: FFNStats, dense: FFNStats) -> list[str]:
    """What is wrong with a call's statistics, one sentence each, next to the dense path's.

    A gate within a rounding of zero may be active on one path only, so counters may differ by one part in a
    thousand, and by one.
    """
    stats, dense = jax.device_get((stats, dense))
    active = int(np.sum(dense.neuron_hits, dtype=np.int64))
    missed = int(np.sum(np.abs(stats.neuron_hits.astype(np.int64) - dense.neuron_hits)))
    pairs = {
        "l0": (float(stats.l0), float(dense.l0), _COUNTER_TOLERANCE),
        "l1": (float(stats.l1), float(dense.l1), _L1_TOLERANCE),
    }
    failures = [
        f"{name} is {found:.6g}, the dense path's {expected:.6g}"
        for name, (found, expected, tolerance) in pairs.items()
        if not abs(found - expected) <= tolerance * expected + _ROUNDING
    ]
    if missed > _COUNTER_TOLERANCE * active + 1:
        failures.append(f"neuron_hits differ from the dense path's by {missed} of {active}")
    if abs(int(stats.max_nnz) - int(dense.max_nnz)) > 1 + _COUNTER_TOLERANCE * int(dense.max_nnz):
        failures.append(f"max_nnz is {stats.max_nnz}, the dense path's {dense.max_nnz}")
    return failures
