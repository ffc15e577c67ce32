"""A Llama in plain JAX whose MLP becomes a sparse layer: what changes, and that the function does not."""

import jax
import jax.numpy as jnp

from pallas_kernels import sparse_ffn

VOCAB, D_MODEL, D_FF, LAYERS, HEADS, L1 = 64, 32, 128, 2, 4, 1e-4


def dense_mlp(layer, x):
    """The MLP as it was, with ReLU for SiLU: kernels are (inputs, outputs), as x @ kernel wants them."""
    return (jax.nn.relu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]


def sparse_mlp(layer, x):
    """The same MLP by the sparse layer, whose weights have one row a neuron: gate and up are turned."""
    return sparse_ffn(x, layer["gate"].T, layer["up"].T, layer["down"])


def init(key):
    def matrix(rows, columns):
        nonlocal key
        key, now = jax.random.split(key)
        return jax.random.normal(now, (rows, columns)) / rows**0.5

    layers = [
        {name: matrix(D_MODEL, D_MODEL) for name in ("q", "k", "v", "o")}
        | {"gate": matrix(D_MODEL, D_FF), "up": matrix(D_MODEL, D_FF), "down": matrix(D_FF, D_MODEL)}
        | {"attention_norm": jnp.ones(D_MODEL), "mlp_norm": jnp.ones(D_MODEL)}
        for _ in range(LAYERS)
    ]
    return {"embedding": matrix(VOCAB, D_MODEL), "layers": layers, "norm": jnp.ones(D_MODEL)}


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def rope(x):
    """Rotary positions of x (B, S, N, H)."""
    _, steps, _, size = x.shape
    angles = jnp.arange(steps)[:, None] * 1e4 ** (-jnp.arange(size // 2) / (size // 2))
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(layer, x):
    q, k, v = ((x @ layer[name]).reshape(*x.shape[:2], HEADS, -1) for name in ("q", "k", "v"))
    return jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True).reshape(x.shape) @ layer["o"]


def dense_llama(params, tokens):
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = x + attention(layer, rms_norm(x, layer["attention_norm"]))
        x = x + dense_mlp(layer, rms_norm(x, layer["mlp_norm"]))
    return rms_norm(x, params["norm"]) @ params["embedding"].T


def sparse_llama(params, tokens):
    """As above but for the MLP; also returns the L1 term, the mean over layers."""
    x, l1 = params["embedding"][tokens], 0.0
    for layer in params["layers"]:
        x = x + attention(layer, rms_norm(x, layer["attention_norm"]))
        y, stats = sparse_mlp(layer, rms_norm(x, layer["mlp_norm"]))
        x, l1 = x + y, l1 + stats.l1 / LAYERS
    return rms_norm(x, params["norm"]) @ params["embedding"].T, l1


def cross_entropy(logits, tokens):
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()


def loss(params, tokens):
    logits, l1 = sparse_llama(params, tokens)
    return cross_entropy(logits, tokens) + L1 * l1


def main() -> None:
    params = init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, VOCAB)
    before, (after, _) = jax.jit(dense_llama)(params, tokens), jax.jit(sparse_llama)(params, tokens)
    print(f"logits differ by {jnp.abs(before - after).max():.1e} at most")
    assert jnp.allclose(before, after, atol=1e-4)

    train_step = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(10):
        value, gradients = train_step(params, tokens)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 1


if __name__ == "__main__":
    main()
