"""A call of a format with its gradients, and how all of its results are judged.

Values are judged against float64 (see `truth`), statistics exactly, and gradients by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from designed import layer
from truth import Arrays, exact, forward, gradients, judge, rounding_to

from pallas_kernels import FFNOptions, FFNStats, Twell, sparse_ffn, sparse_mlp
from pallas_kernels.options import Layout

DTYPES = ("bfloat16", "float16", "float32")
LAYERS = ("gated", "non-gated")
DL1 = 0.375
"""Weight of l1 in the differentiated objective, exact in every type."""


@dataclasses.dataclass(frozen=True)
class Path:
    """What a thin file declares: the options under test, and sizes that its backend can afford.

    Attributes:
      options: format, backend and activation.
      d_model, d_ff: D and F, no multiples of any tile.
      many_tokens: a large odd M.
      variants: the format with other values of the fields that no result may depend on.
      check_vma: whether the path runs under ``shard_map``'s check of varying axes.
      tokens: M where nothing else is asked.
      dtype: the type where nothing else is asked.
      partial: whether the backend supports some calls only. Then those that `unsupported_reason` refuses are
        skipped with that reason, and the thin file has a test that the plain call is not one of them.
      tile, slots: what the patterns of activity are made of: F holds two whole tiles and a part of one.
    """

    options: FFNOptions
    d_model: int
    d_ff: int
    many_tokens: int
    variants: tuple[Layout, ...] = ()
    check_vma: bool = True
    tokens: int = 7
    dtype: str = "float32"
    partial: bool = False
    tile: int = 32
    slots: int = 8

    def layer(self, pattern: str, tokens: int, dtype: str, kind: str = "gated", seed: int = 0):
        """`designed.layer` in this path's sizes."""
        sizes = {"d_model": self.d_model, "d_ff": self.d_ff}
        geometry = {"tile": self.tile, "slots": self.slots}
        return layer(
            pattern,
            tokens=tokens,
            dtype=jnp.dtype(dtype),
            gated=kind == "gated",
            seed=seed,
            **sizes,
            **geometry,
        )

    def overflow_rows(self, active: np.ndarray) -> int:
        """How many rows a compact format of these options has to give to the backup."""
        layout = self.options.layout
        if not isinstance(layout, Twell):
            return 0
        tile = layout.tile
        padded = np.pad(active, ((0, 0), (0, -active.shape[1] % tile)))
        counts = padded.reshape(len(active), -1, tile).sum(axis=-1)
        return int((counts > layout.slots - 1).any(axis=-1).sum())


def call(inputs: Mapping[str, jax.Array], options: FFNOptions) -> tuple[jax.Array, FFNStats]:
    """The public call that the arguments are for."""
    return (sparse_ffn if "w_gate" in inputs else sparse_mlp)(**inputs, options=options)


def differentiate(inputs: Mapping[str, jax.Array], dy: jax.Array, dl1: Any, apply: Callable[..., Any]):
    """(y, stats) and the gradients of ``sum(dy * y) + dl1 * l1`` in every input, by name."""

    def objective(inputs):
        y, stats = apply(inputs)
        return jnp.sum(y.astype(jnp.float32) * dy) + jnp.sum(dl1 * stats.l1), (y, stats)

    gradients, outputs = jax.grad(objective, has_aux=True)(inputs)
    return outputs, gradients


@cache
def compiled(options: FFNOptions) -> Callable[..., Any]:
    """`differentiate` of the call, compiled once for each shape of its arguments."""
    return jax.jit(partial(differentiate, apply=partial(call, options=options)))


@cache
def compiled_forward(options: FFNOptions) -> Callable[..., Any]:
    """The call alone, compiled once for each shape of its arguments."""
    return jax.jit(partial(call, options=options))


def run(function: Callable[..., Any], inputs: Arrays, *arguments: Any) -> Any:
    """Runs with f32 products in f32: unless asked, XLA multiplies f32 in a shorter type on a GPU."""
    with jax.default_matmul_precision("highest") if inputs["x"].dtype == np.float32 else nullcontext():
        return jax.device_get(function(inputs, *arguments))


def cotangent(inputs: Arrays, seed: int = 5) -> np.ndarray:
    """(..., D) f32 weights of y, exact in the input type."""
    x = inputs["x"]
    return np.random.default_rng(seed).standard_normal(x.shape).astype(x.dtype).astype(np.float32)


def check_values(y: Any, stats: FFNStats, inputs: Arrays) -> None:
    dtype = inputs["x"].dtype
    true, rounded = forward(inputs), forward(inputs, rounding_to(dtype))
    assert y.dtype == dtype
    judge("y", y, true["y"], rounded["y"], dtype)
    judge("l1", stats.l1, true["l1"], rounded["l1"], dtype)


def check_counts(stats: FFNStats, active: np.ndarray, overflow_rows: int) -> None:
    """Every integer statistic exactly, and l0 as well as f32 can add and divide them."""
    assert (stats.l0.shape, stats.l0.dtype) == ((), np.float32)
    np.testing.assert_allclose(stats.l0, active.sum() / max(len(active), 1), rtol=1e-6)
    expected = {
        "neuron_hits": active.sum(axis=0, dtype=np.int32),
        "max_nnz": np.int32(active.sum(axis=1).max(initial=0)),
        "overflow_rows": np.int32(overflow_rows),
    }
    for name, value in expected.items():
        got = np.asarray(getattr(stats, name))
        assert (got.shape, got.dtype) == (value.shape, value.dtype), name
        np.testing.assert_array_equal(got, value, err_msg=name)


def check_gradients(got: Arrays, inputs: Arrays, dy: np.ndarray, dl1: float) -> None:
    dtype = inputs["x"].dtype
    true = gradients(inputs, dy, dl1, exact)
    rounded = gradients(inputs, dy, dl1, rounding_to(dtype))
    assert got.keys() == inputs.keys()
    for name, gradient in got.items():
        assert gradient.dtype == dtype, name
        judge(f"gradient of {name}", gradient, true[name], rounded[name], dtype)


def master_weights(inputs: Arrays) -> Arrays:
    """The same with f32 weights that are no values of the input type, and round to those given."""
    nudge = 1 + float(jnp.finfo(inputs["x"].dtype).eps) / 8
    return {n: v if n == "x" else v.astype(np.float32) * np.float32(nudge) for n, v in inputs.items()}


def check_float32_gradients(got: Arrays, inputs: Arrays, dy: np.ndarray, dl1: float) -> None:
    """Of the master weights of ``inputs``: their terms have the input type, their sums over tokens do not."""
    cast = rounding_to(inputs["x"].dtype)
    true, sums = gradients(inputs, dy, dl1, exact), gradients(inputs, dy, dl1, cast, exact)
    assert got.keys() == inputs.keys()
    for name, gradient in got.items():
        assert gradient.dtype == (inputs["x"].dtype if name == "x" else np.float32), name
        judge(f"gradient of {name}", gradient, true[name], sums[name], inputs["x"].dtype)
        rounding, error = np.abs(cast(sums[name]) - sums[name]), np.abs(gradient - sums[name])
        # The usual value: a term that f32 rounds the other way than f64 changes a whole row.
        if name != "x":
            assert np.median(error[rounding > 0]) < np.median(rounding[rounding > 0]) / 8, name


def check_everything(
    result: Any, inputs: Arrays, dy: np.ndarray, active: np.ndarray, overflow_rows: int
) -> None:
    (y, stats), grads = result
    check_values(y, stats, inputs)
    check_counts(stats, active, overflow_rows)
    check_gradients(grads, inputs, dy, DL1)
