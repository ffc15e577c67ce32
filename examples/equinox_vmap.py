"""An Equinox module written for one token and mapped over a batch with jax.vmap.

The kernels still see all tokens at once: mapped over tokens, the layer is one call of the batched kernels.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from pallas_kernels import sparse_ffn

D_MODEL, D_FF, L1 = 32, 128, 1e-3


class FeedForward(eqx.Module):
    """The sparse layer for one token; weights are neuron-major, (D_FF, D_MODEL)."""

    w_gate: jax.Array
    w_up: jax.Array
    w_down: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.w_gate, self.w_up, self.w_down = (0.2 * jax.random.normal(k, (D_FF, D_MODEL)) for k in keys)

    def __call__(self, x):
        return sparse_ffn(x, self.w_gate, self.w_up, self.w_down)


def loss(layer, x, target):
    y, stats = jax.vmap(jax.vmap(layer))(x)  # over the batch and over the tokens of each sequence
    return jnp.square(y - target).mean() + L1 * stats.l1.mean()  # every token has statistics of its own


def batched_loss(layer, x, target):
    """The same by one call, to compare with."""
    y, stats = layer(x)
    return jnp.square(y - target).mean() + L1 * stats.l1


def main() -> None:
    layer = FeedForward(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 16, D_MODEL))
    target = jnp.sin(x[..., ::-1])
    value, gradients = eqx.filter_jit(eqx.filter_value_and_grad(loss))(layer, x, target)
    wanted, expected = eqx.filter_jit(eqx.filter_value_and_grad(batched_loss))(layer, x, target)
    print(f"loss {value:.6f} mapped over tokens, {wanted:.6f} in one call")
    assert jnp.allclose(value, wanted, rtol=1e-5)
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-5)), gradients, expected)
    assert all(jax.tree.leaves(same))


if __name__ == "__main__":
    main()
