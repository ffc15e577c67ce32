"""SparseFFN in a Flax NNX training loop: one module among others, and its L1 term in the loss."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_lm import SparseFFN

D_MODEL, D_FF, L1 = 32, 128, 0.03


class Model(nnx.Module):
    """A residual feed-forward layer and an output projection."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.ffn = SparseFFN(D_MODEL, D_FF, rngs=rngs, dtype=jnp.float32, init_std=0.2)
        self.head = nnx.Linear(D_MODEL, D_MODEL, rngs=rngs)

    def __call__(self, x):
        y, stats = self.ffn(x)
        return self.head(x + y), stats


@nnx.jit
def train_step(model, optimizer, x, target):
    def loss_fn(model):
        y, stats = model(x)
        task = optax.l2_loss(y, target).mean()
        return task + L1 * stats.l1, (task, stats)  # the gradient of l1 makes neurons silent

    gradients, (task, stats) = nnx.grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    return task, stats


def main() -> None:
    model = Model(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (8, 16, D_MODEL))
    target = jnp.sin(x[..., ::-1])
    history = []
    for step in range(150):
        task, stats = train_step(model, optimizer, x, target)
        history.append((float(task), float(stats.l0)))
        if step % 50 == 0:
            print(f"step {step}: loss {task:.4f}, {stats.l0:.1f} of {D_FF} neurons active")
    (first_loss, first_l0), (last_loss, last_l0) = history[0], history[-1]
    print(f"loss {first_loss:.4f} to {last_loss:.4f}, active neurons {first_l0:.1f} to {last_l0:.1f}")
    assert last_loss < first_loss / 2
    assert last_l0 < 0.7 * first_l0


if __name__ == "__main__":
    main()
