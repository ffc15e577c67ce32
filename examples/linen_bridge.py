"""SparseFFN inside a Flax Linen module, through nnx.bridge."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_lm import SparseFFN

D_MODEL, D_FF, L1 = 32, 128, 1e-3


class Block(nn.Module):
    """A pre-norm residual layer; returns its L1 term beside its output."""

    @nn.compact
    def __call__(self, x):
        ffn = nnx.bridge.to_linen(SparseFFN, D_MODEL, D_FF, dtype=jnp.float32, init_std=0.2, name="ffn")
        y, stats = ffn(nn.RMSNorm()(x))
        return x + y, stats.l1


class Model(nn.Module):
    """Two layers and an output projection."""

    @nn.compact
    def __call__(self, x):
        l1 = 0.0
        for _ in range(2):
            x, layer_l1 = Block()(x)
            l1 += layer_l1 / 2
        return nn.Dense(D_MODEL)(x), l1


def main() -> None:
    model = Model()
    x = jax.random.normal(jax.random.key(1), (8, 16, D_MODEL))
    target = jnp.sin(x[..., ::-1])
    params = model.init(jax.random.key(0), x)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state):
        def loss_fn(params):
            y, l1 = model.apply(params, x)
            return optax.l2_loss(y, target).mean() + L1 * l1

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(40):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    print(
        f"loss {losses[0]:.4f} to {losses[-1]:.4f}; parameters {sorted(params['params']['Block_0']['ffn'])}"
    )
    assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    main()
