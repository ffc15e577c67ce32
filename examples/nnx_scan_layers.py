"""A stack of layers with SparseFFN, made by nnx.vmap and run by nnx.scan."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import SparseFFN

D_MODEL, D_FF, LAYERS, L1 = 32, 128, 3, 1e-3


class Block(nnx.Module):
    """A pre-norm residual feed-forward layer."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(D_MODEL, rngs=rngs)
        self.ffn = SparseFFN(D_MODEL, D_FF, rngs=rngs, dtype=jnp.float32, init_std=0.2)

    def __call__(self, x):
        y, stats = self.ffn(self.norm(x))
        return x + y, stats


@nnx.split_rngs(splits=LAYERS)
@nnx.vmap(in_axes=0, out_axes=0)
def make_blocks(rngs):
    """Every parameter with a leading layer axis."""
    return Block(rngs=rngs)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
def run_blocks(block, x):
    """One layer of the scan: the activations are carried, statistics get a leading layer axis."""
    return block(x)


def loss(blocks, x):
    y, stats = run_blocks(blocks, x)
    return jnp.square(y).mean() + L1 * stats.l1.mean()  # the mean over layers


def one_by_one(blocks, x):
    """The same without a scan, to compare with."""
    graph, state = nnx.split(blocks)
    l1 = 0.0
    for nth in range(LAYERS):
        x, stats = nnx.merge(graph, jax.tree.map(lambda leaf, nth=nth: leaf[nth], state))(x)
        l1 += stats.l1 / LAYERS
    return jnp.square(x).mean() + L1 * l1


def main() -> None:
    blocks = make_blocks(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4, 16, D_MODEL))
    value, gradients = nnx.jit(nnx.value_and_grad(loss))(blocks, x)
    plain_value, plain_gradients = nnx.jit(nnx.value_and_grad(one_by_one))(blocks, x)
    print(f"loss {value:.6f} with a scan, {plain_value:.6f} one by one")
    assert jnp.allclose(value, plain_value, rtol=1e-5)
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-5)), gradients, plain_gradients)
    assert all(jax.tree.leaves(same))


if __name__ == "__main__":
    main()
