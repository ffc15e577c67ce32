"""The feed-forward layer in float64 numpy, and how far from it a result may be.

`forward` and `gradients` take a ``cast`` that is applied wherever the specification rounds. The identity
gives the truth; rounding to the input type gives an input-type computation whose sums are exact, and its
distance from the truth is the error that the input type itself costs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import Threshold
from pallas_kernels.activations import Activation

Arrays = dict[str, np.ndarray]
Cast = Callable[[np.ndarray], np.ndarray]


def exact(values: np.ndarray) -> np.ndarray:
    return values


def rounding_to(dtype: Any) -> Cast:
    return lambda values: values.astype(dtype).astype(np.float64)


def forward(inputs: Mapping[str, np.ndarray], cast: Cast = exact, activation: Activation = "relu") -> Arrays:
    """y, l1 and the intermediates g, u, h and active of a gated layer, or of one without ``w_gate``."""
    x, w_up, w_down = (inputs[name].astype(np.float64) for name in ("x", "w_up", "w_down"))
    with np.errstate(invalid="ignore", over="ignore"):
        u = cast(x @ w_up.T)
        g = cast(x @ inputs["w_gate"].astype(np.float64).T) if "w_gate" in inputs else u
        threshold = activation.value if isinstance(activation, Threshold) else 0.0
        active = ~(g <= threshold)
        value = cast(g * g) if activation == "relu2" else g
        factor = np.where(u <= 0, 0, u) if activation == "drelu" else u
        h = np.where(active, cast(value * factor) if "w_gate" in inputs else value, 0.0)
        y = cast(h @ w_down)
        l1 = np.abs(h).sum() / max(len(x), 1)
    return {"y": y, "l1": l1, "g": g, "u": u, "h": h, "active": active, "value": value, "factor": factor}


def gradients(
    inputs: Mapping[str, np.ndarray],
    dy: np.ndarray,
    dl1: float,
    cast: Cast = exact,
    cast_sums: Cast | None = None,
    activation: Activation = "relu",
) -> Arrays:
    """Gradients of ``sum(dy * y) + dl1 * l1`` by name; weights' through ``cast_sums`` if given."""
    cast_sums = cast if cast_sums is None else cast_sums
    x, w_up, w_down = (inputs[name].astype(np.float64) for name in ("x", "w_up", "w_down"))
    layer = forward(inputs, cast, activation)
    slope = 2 * layer["g"] if activation == "relu2" else 1.0
    factor_slope = ~(layer["u"] <= 0) if activation == "drelu" else 1.0
    from_l1 = dl1 / max(len(x), 1) * np.sign(layer["h"])
    dh = np.where(layer["active"], cast(dy @ w_down.T + from_l1), 0.0)
    result = {"w_down": cast_sums(layer["h"].T @ dy)}
    if "w_gate" not in inputs:
        dg = cast(dh * slope)
        return result | {"w_up": cast_sums(dg.T @ x), "x": cast(dg @ w_up)}
    w_gate = inputs["w_gate"].astype(np.float64)
    dg, du = cast(dh * layer["factor"] * slope), cast(dh * layer["value"] * factor_slope)
    dx = cast(cast(dg @ w_gate) + cast(du @ w_up))
    return result | {"w_gate": cast_sums(dg.T @ x), "w_up": cast_sums(du.T @ x), "x": dx}


def judge(name: str, got: Any, true: np.ndarray, rounded: np.ndarray, dtype: Any) -> None:
    """Asserts that a result is as good as its type allows.

    NaN and infinity stand exactly where they do in truth. f32: within 32 ulps of the largest true value, for
    the order of summation is free. bf16, f16: the largest and the root-mean-square error are at most 1.5
    times those of ``rounded``, or of rounding the result once, whichever is more.
    """
    got = np.asarray(got).astype(np.float64)
    assert got.shape == true.shape, f"{name} has shape {got.shape} instead of {true.shape}"
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite], err_msg=f"NaN and infinity of {name}")
    assert np.isfinite(got[finite]).all(), f"{name} has NaN or infinity where the truth is finite"
    if not finite.any():
        return
    error, own, size = map(np.abs, (got[finite] - true[finite], rounded[finite] - true[finite], true[finite]))
    ulp = float(ml_dtypes.finfo(dtype).eps)
    if np.dtype(dtype) == np.float32:
        assert error.max() <= 32 * ulp * size.max(), f"{name}: error {error.max()} at a scale of {size.max()}"
        return
    largest = 1.5 * max(own.max(), ulp / 2 * size.max())
    assert error.max() <= largest, f"{name}: largest error {error.max()}, allowed {largest}"
    usual = 1.5 * max(_rms(own), ulp / 4 * _rms(size))
    assert _rms(error) <= usual, f"{name}: root-mean-square error {_rms(error)}, allowed {usual}"


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
