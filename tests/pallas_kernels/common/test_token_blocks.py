"""Large calls over blocks of tokens: how they are cut, and that they give what they give in one piece."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lowered, shapes

from pallas_kernels import Auto, FFNOptions, Panel, sparse_ffn, sparse_mlp
from pallas_kernels.bench.inputs import Activity, ffn_inputs
from pallas_kernels.common import token_blocks
from pallas_kernels.common.token_blocks import Block
from pallas_kernels.panel import config as configs

COUNTS = ("neuron_hits", "max_nnz", "overflow_rows", "pairs", "dense_tokens")


@pytest.mark.parametrize("most", [128, 1280, 32768])
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 1281, 4096, 65541, 131072])
def test_blocks_are_the_call(tokens, most):
    blocks = token_blocks.split(tokens, most)
    assert [start for start, _ in blocks] == [sum(b.tokens for b in blocks[:n]) for n in range(len(blocks))]
    assert sum(block.tokens for block in blocks) == tokens
    assert max(block.tokens for block in blocks) <= most
    assert len(blocks) <= max(1, -(-tokens // most))
    if len(blocks) > 1:
        size = blocks[0].tokens
        assert size % 128 == 0
        assert {block.tokens for block in blocks[:-1]} == {size}
        assert 0 < blocks[-1].tokens <= size


def test_without_a_limit_a_call_is_one_block():
    assert token_blocks.split(1 << 20, None) == [Block(0, 1 << 20)]


@pytest.mark.parametrize("layout", [Panel, Auto])
@pytest.mark.parametrize("tokens", [0, 64, 129, -128])
def test_blocks_hold_whole_tiles(layout, tokens):
    with pytest.raises(ValueError, match=f"block_tokens must be a multiple of 128, or None; got {tokens}"):
        layout(block_tokens=tokens)


def layer(kind, tokens=211):
    sizes = {"tokens": tokens, "d_model": 24, "d_ff": 72}
    inputs = ffn_inputs(
        jax.random.key(0), Activity(9), **sizes, gated=kind == "gated", dtype=jnp.dtype("bfloat16")
    )
    return inputs.pop("x"), inputs


def call(x, weights, options):
    return (sparse_ffn if "w_gate" in weights else sparse_mlp)(x, **weights, options=options)


def in_blocks(options):
    layout = dataclasses.replace(options.layout, block_tokens=128)
    return dataclasses.replace(options, format=layout)


@pytest.fixture(autouse=True)
def large_calls(monkeypatch):
    """Calls of few panels have stages of their own, and are not cut."""
    monkeypatch.setattr(configs, "FEW_PANELS", 0)


def in_one_piece_and_cut(options, x, weights, map_axes=None):
    """A layer's outputs in one piece, and in blocks of 128 tokens."""

    def run(options):
        function = partial(call, options=options)
        return jax.jit(function if map_axes is None else jax.vmap(function, in_axes=map_axes))(x, weights)

    return run(options), run(in_blocks(options))


def assert_same(found, expected):
    (y, stats), (wanted, counted) = found, expected
    np.testing.assert_array_equal(y, wanted)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(stats, name), getattr(counted, name), err_msg=name)
    for name in ("l0", "l1"):
        np.testing.assert_allclose(getattr(stats, name), getattr(counted, name), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gated", FFNOptions(Panel(tokens=16), backend="interpret")),
        ("non-gated", FFNOptions(Panel(tokens=64), activation="relu2", backend="interpret")),
    ],
)
def test_panels_over_blocks(kind, options):
    whole, blocks = in_one_piece_and_cut(options, *layer(kind))
    assert_same(blocks, whole)


def test_auto_over_blocks():
    """Where it is dense; where it is not, it is the panels' call."""
    x, weights = layer("gated")
    x = jnp.abs(x)
    weights["w_gate"] = jnp.abs(weights["w_gate"])
    whole, blocks = in_one_piece_and_cut(FFNOptions(Auto(tokens=16), backend="interpret"), x, weights)
    assert blocks[1].dense_tokens == len(x)
    assert_same(blocks, whole)


def test_groups_over_blocks():
    """Calls that run as one, whose borders are not those of blocks or panels."""
    x, weights = layer("gated", 204)
    options = FFNOptions(Panel(16), backend="interpret")
    whole, blocks = in_one_piece_and_cut(options, x.reshape(6, 34, -1), weights, map_axes=(0, None))
    assert blocks[1].pairs.shape == (6,)
    assert_same(blocks, whole)


def test_mapped_weights_over_blocks():
    """As of experts: kernels that write into one y are mapped one by one."""
    x, weights = layer("gated", 150)
    experts = jax.tree.map(lambda weight: jnp.stack([weight, weight[::-1]]), weights)
    options = FFNOptions(Panel(16), backend="interpret")
    whole, blocks = in_one_piece_and_cut(options, x, experts, map_axes=(None, 0))
    assert_same(blocks, whole)


@pytest.mark.parametrize("format", [Panel(16), Auto(16)])
def test_a_call_with_a_gradient_is_not_cut(format):
    """It has as many kernels as one that was not asked to be cut, where a forward call has more."""
    x, weights = layer("gated", 150)
    whole = FFNOptions(format, backend="interpret")

    def kernels(options, change=lambda function: function):
        def y_sum(x):
            return jnp.sum(call(x, weights, options)[0])

        return str(jax.make_jaxpr(change(y_sum))(x)).count("pallas_call[")

    cut = in_blocks(whole)
    assert kernels(cut) > kernels(whole)
    assert kernels(cut, jax.grad) == kernels(whole, jax.grad)


@pytest.mark.parametrize(("format", "backend"), [("panel", "auto"), ("panel", "triton"), ("auto", "auto")])
def test_temporaries_are_those_of_a_block(format, backend):
    """No array of the program is larger than x, or than a block's gates; without blocks one is."""

    def largest(format):
        options = FFNOptions(format=format, backend=backend)
        text = lowered(partial(call_by_name, options=options), shapes(65536, 2048, 5632))
        found = set(re.findall(r"tensor<((?:\d+x)+)[a-z]+\d+>", text))
        return max(math.prod(map(int, shape.split("x")[:-1])) for shape in found)

    assert largest(f"{format}(block_tokens=16384)") == 65536 * 2048
    assert largest(format) == 65536 * 5632


def call_by_name(inputs, options):
    return sparse_ffn(**inputs, options=options)
