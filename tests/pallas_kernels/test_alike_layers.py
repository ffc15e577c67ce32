"""Layers of a model that are alike share one trace and one lowering of their kernels, which take seconds."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import FFNOptions, Panel, sparse_ffn

LAYERS = 7
FORMATS = {name: FFNOptions(name, backend="interpret") for name in ("twell", "hybrid")}
FORMATS |= {"dense": FFNOptions("dense"), "panel": FFNOptions(Panel(tokens=16), backend="interpret")}


def lowered(options):
    """The gradient of a row of layers, in what enters the first and in all weights."""

    def loss(x, layers):
        for weights, option in zip(layers, options, strict=True):
            y, stats = sparse_ffn(x, *weights, options=option)
            x = x + y + stats.l1
        return jnp.sum(x)

    x, w = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((128, 64), jnp.float32)
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, [(w, w, w)] * LAYERS).as_text()


def functions(text, name):
    return len(re.findall(rf"func\.func private @{name}(?:_\d+)?\(", text))


def calls(text, name):
    return len(re.findall(rf"\bcall @{name}(?:_\d+)?\(", text))


@pytest.mark.parametrize("name", FORMATS)
def test_they_are_lowered_once(name):
    """But for the first and the last: not all of their results and gradients are wanted. Of the last one's
    forward, where it keeps nothing for the backward, none is."""
    text = lowered([FORMATS[name]] * LAYERS)
    for direction in ("forward", "backward"):
        assert 1 <= functions(text, f"sparse_ffn_{direction}") <= 3
    assert calls(text, "sparse_ffn_backward") == LAYERS
    assert LAYERS - 1 <= calls(text, "sparse_ffn_forward") <= LAYERS


def test_those_that_differ_are_not():
    options = [
        FFNOptions(Panel(tokens=16, capacity=(1 + nth) / 8), backend="interpret") for nth in range(LAYERS)
    ]
    assert functions(lowered(options), "sparse_ffn_forward") == LAYERS
