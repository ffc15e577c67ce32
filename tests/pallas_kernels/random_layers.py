"""Random layers of any sparsity, for tests against the dense path."""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri


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
