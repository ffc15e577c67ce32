"""The dense layer over blocks of tokens, against the dense layer over all of them."""

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FFNOptions, FFNStats, dense, reference
from pallas_kernels.activations import RELU
from pallas_kernels.bench.inputs import Activity, ffn_inputs
from pallas_kernels.common import token_blocks
from pallas_kernels.dense import blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(token_blocks, "MULTIPLE", 16)


@cache
def layer(kind):
    """Of 64 tokens, from which each test takes the first: drawing them compiles for every number of them."""
    sizes = {"tokens": 64, "d_model": 24, "d_ff": 40}
    return ffn_inputs(jax.random.key(0), Activity(12), **sizes, gated=kind == "gated", dtype="float32")


def arguments(tokens, kind):
    inputs = layer(kind)
    return inputs["x"][:tokens], inputs.get("w_gate"), inputs["w_up"], inputs["w_down"]


@pytest.mark.parametrize("kind", ["gated", "non-gated"])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 61])
def test_blocks_are_the_layer(tokens, kind, by_token):
    weights = arguments(tokens, kind)
    y, stats = jax.jit(reference.ffn)(*weights)
    found, l1 = jax.jit(partial(blocks.forward, rule=RELU))(*weights)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(l1.sum() / tokens, stats.l1, rtol=1e-5)
    dy = jax.random.normal(jax.random.key(1), y.shape)
    scale = jnp.linspace(0.01, 0.1, tokens if by_token else 1)
    expected = jax.jit(partial(dense.recompute_backward, rule=RELU, dtype=dy.dtype))(*weights, dy, scale)
    found = jax.jit(partial(blocks.backward, rule=RELU, dtype=dy.dtype))(*weights, dy, scale)
    for name, a, b in zip(("dx", "dw_gate", "dw_up", "dw_down"), found, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


def test_blocks_grow_beyond_their_number(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_BLOCKS", 2)
    weights = arguments(61, "gated")
    text = jax.jit(partial(blocks.forward, rule=RELU)).lower(*weights).as_text()
    rows = {int(n) for n in re.findall(r"tensor<(\d+)x40x", text)}
    assert rows - {40} == {32, 29}


@pytest.mark.parametrize("kind", ["gated", "non-gated"])
@pytest.mark.parametrize(("tokens", "groups"), [(61, None), (60, 2), (60, 12), (64, 64), (16, 2)])
def test_inference_over_blocks(tokens, groups, kind):
    """Whole groups in a block, and several blocks in a group."""
    weights, options = arguments(tokens, kind), FFNOptions(format="dense")
    y, stats = dense.infer(*weights, options, "xla", groups)
    found, counted = blocks.infer(*weights, options, groups, block_tokens=48)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    for field in dataclasses.fields(FFNStats):
        got, expected = getattr(counted, field.name), getattr(stats, field.name)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        tolerance = 1e-6 if field.name in ("l0", "l1") else 0
        np.testing.assert_allclose(got, expected, rtol=tolerance, err_msg=field.name)


def test_no_intermediate_of_all_tokens():
    """What the blocks are for: nothing of shape (M, F) in the program."""
    weights = arguments(64, "gated")
    dy = jnp.ones_like(weights[0])
    step = jax.jit(partial(blocks.backward, rule=RELU, dtype=dy.dtype))
    text = step.lower(*weights, dy, jnp.zeros(1)).as_text()
    assert "tensor<16x40x" in text
    assert "tensor<64x40x" not in text
