"""Small layers for the tests of order and pruning, what runs them, and how close two results have to be.

Where weights and tokens are small integers in f32, every product and every sum is exact in any order: there a
reordered or pruned layer must give the very same bits, and its hits the same counts.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from designed import layer
from hypothesis import settings

from pallas_kernels import FFNOptions, Panel, reference, sparse_ffn, sparse_mlp

M, D, F = 6, 5, 24
KINDS = ("gated", "non-gated")
DTYPES = ("bfloat16", "float16", "float32")
OPTIONS = {
    "dense": FFNOptions(format="dense"),
    "panel": FFNOptions(format=Panel(tokens=16, capacity=1.0), backend="interpret"),
}
ON_PATHS = [(path, dtype) for path in ("reference", "dense") for dtype in DTYPES] + [("panel", "bfloat16")]

property_test = settings(max_examples=30, deadline=None, derandomize=True)


@partial(jax.jit, static_argnames="options")
def run(x, weights, options=None):
    """y and statistics: of the reference, or of the public call where there are options."""
    if options is None:
        return reference.ffn(x, weights.get("w_gate"), weights["w_up"], weights["w_down"])
    call = sparse_ffn if "w_gate" in weights else sparse_mlp
    return call(x, **weights, options=options)


def integer_layer(seed, kind, bias=-4):
    """x and weights of small integers in f32; about half of the neurons stay silent at the default bias."""
    rng = np.random.default_rng(seed)
    names = ("w_gate", "w_up", "w_down") if kind == "gated" else ("w_up", "w_down")
    weights = {name: rng.integers(-2, 3, (F, D)).astype(np.float32) for name in names}
    x = rng.integers(-2, 3, (M, D)).astype(np.float32)
    x[:, 0] = 1
    weights[names[0]][:, 0] = bias + rng.integers(-2, 3, F)
    return jnp.asarray(x), {name: jnp.asarray(weight) for name, weight in weights.items()}


def designed_layer(pattern, *, dtype="float32", kind="gated", tokens=24, d_ff=96):
    inputs, active = layer(
        pattern, tokens=tokens, d_model=24, d_ff=d_ff, tile=32, slots=4, dtype=dtype, gated=kind == "gated"
    )
    weights = {name: jnp.asarray(value) for name, value in inputs.items() if name != "x"}
    return jnp.asarray(inputs["x"]), weights, active


def assert_close(got, want, dtype):
    """Up to the order of the sums: some ulps of the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        got, want, rtol=0, atol=(32 if dtype == "float32" else 2) * ulp * abs(want).max()
    )
