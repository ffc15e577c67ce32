"""Random layers of any sparsity, for tests against the dense path."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from op_checks import call, differentiate

from pallas_kernels import FFNOptions

DENSE = FFNOptions(format="dense", backend="xla")


def random_layer(key, rate, *, tokens, d_model, d_ff, dtype, gated):
    """Arguments of one call with a share of ``rate`` of active gates, uneven between neurons and tokens."""
    for_x, for_gate, for_up, for_down, for_bias = jax.random.split(key, 5)
    x = jax.random.normal(for_x, (tokens, d_model)).at[:, 0].set(1)
    gate = jax.random.normal(for_gate, (d_ff, d_model)) / jnp.sqrt(d_model)
    gate = gate.at[:, 0].set(ndtri(rate) + 0.5 * jax.random.normal(for_bias, (d_ff,)))
    up, down = (jax.random.normal(k, (d_ff, d_model)) / jnp.sqrt(d_model) for k in (for_up, for_down))
    inputs = {"x": x, "w_up": gate, "w_down": down}
    if gated:
        inputs |= {"w_gate": gate, "w_up": up}
    return {name: value.astype(dtype) for name, value in inputs.items()}


def errors(key, rate, *, options, **sizes):
    """Largest and root-mean-square error of y and of every gradient against f32,
    ours and the dense path's, and the size of each."""
    inputs = random_layer(key, rate, **sizes)
    dy = jax.random.normal(jax.random.fold_in(key, 1), inputs["x"].shape).astype(sizes["dtype"])
    dy, dl1 = dy.astype(jnp.float32), jnp.float32(0.25)
    wide = {name: value.astype(jnp.float32) for name, value in inputs.items()}

    def results(inputs, options):
        (y, _), gradients = differentiate(inputs, dy, dl1, partial(call, options=options))
        return {"y": y} | gradients

    def extent(values):
        return jnp.stack([jnp.max(jnp.abs(values)), jnp.sqrt(jnp.mean(values**2))])

    true = results(wide, DENSE)

    def distances(values):
        return {name: extent(values[name].astype(jnp.float32) - true[name]) for name in true}

    return (
        distances(results(inputs, options)),
        distances(results(inputs, DENSE)),
        {name: extent(values) for name, values in true.items()},
    )


def check_errors(ours, dense, scale, dtype):
    """No further from f32 than 1.5 times the dense path in the same type, for what `errors` returned."""
    ulp = float(jnp.finfo(dtype).eps)
    for name, error in ours.items():
        # Where the dense error is by chance far smaller, as it can be with a handful of active gates: half an
        # ulp for the rounding of a coefficient and half for that of the result. In f32 the truth is the dense
        # path itself: what is left is the order of summation. Weight gradients sum thousands of tokens, and
        # the truth's are as far from float64's as ours: about 4 ulp each.
        sums = 6 if name.startswith("w_") else 4
        floors = np.array([32 * ulp, sums * ulp] if dtype == "float32" else [ulp / 1.5, ulp / 4])
        allowed = 1.5 * np.maximum(dense[name], floors * scale[name])
        assert (error <= allowed).all(), f"{name}: errors {error}, allowed {allowed}"
