"""Large calls over blocks of tokens: how they are cut, and that they give what they give in one piece."""

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
from pallas_kernels.common.token_blocks import Block, Product
from pallas_kernels.device import Device
from pallas_kernels.panel import config as configs

H100 = Device("gpu", "NVIDIA H100 80GB HBM3", 90, 132)
GATE = [Product(5632, 2048)]
DENSE = [Product(5632, 2048), Product(5632, 2048), Product(2048, 5632)]
COUNTS = ("neuron_hits", "max_nnz", "overflow_rows", "pairs", "dense_tokens")


@pytest.mark.parametrize("products", [GATE, DENSE])
@pytest.mark.parametrize("tokens", [1, 4096, 65536, 65541, 131072, 1 << 20])
@pytest.mark.parametrize("cores", [132, 114, 108, 148])
def test_blocks_are_the_call(tokens, products, cores):
    blocks = token_blocks.split(tokens, products, Device("gpu", "NVIDIA", 90, cores))
    assert [start for start, _ in blocks] == [sum(b.tokens for b in blocks[:n]) for n in range(len(blocks))]
    assert sum(block.tokens for block in blocks) == tokens
    assert len(blocks) <= token_blocks.MOST + 1
    size = blocks[0].tokens
    if len(blocks) > 1:
        assert size % 128 == 0
        assert {block.tokens for block in blocks[:-1]} == {size}
        assert size / 2 <= blocks[-1].tokens <= 1.5 * size


@pytest.mark.parametrize("products", [GATE, DENSE])
def test_blocks_fill_whole_rounds_of_the_cores(products):
    """As many rounds of tiles in all as the call in one piece, product by product."""
    blocks = token_blocks.split(65536, products, H100)
    assert len(blocks) > 1

    def rounds(tokens, product):
        return math.ceil(math.ceil(tokens / 128) * math.ceil(product.columns / 256) / H100.cores)

    for product in products:
        assert sum(rounds(block.tokens, product) for block in blocks) == rounds(65536, product)


@pytest.mark.parametrize(("tokens", "device"), [(16384, H100), (1 << 20, Device("cpu", "cpu", 0, 0))])
def test_small_calls_and_unknown_devices_are_not_cut(tokens, device):
    assert token_blocks.split(tokens, GATE, device) == [Block(0, tokens)]


def layer(kind, tokens=211):
    sizes = {"tokens": tokens, "d_model": 24, "d_ff": 72}
    inputs = ffn_inputs(
        jax.random.key(0), Activity(9), **sizes, gated=kind == "gated", dtype=jnp.dtype("bfloat16")
    )
    return inputs.pop("x"), inputs


def call(x, weights, options):
    return (sparse_ffn if "w_gate" in weights else sparse_mlp)(x, **weights, options=options)


@pytest.fixture
def in_one_piece_and_cut(monkeypatch):
    """Runs a function traced anew, first as it is, then with every call cut into blocks."""

    def run(function, *arguments, size=64):
        monkeypatch.setattr(configs, "FEW_PANELS", 0)  # such calls have stages of their own
        whole = jax.jit(lambda *arguments: function(*arguments))(*arguments)
        cut = []

        def split(tokens, products, device):
            cut.append(tokens)
            return token_blocks.cut(tokens, size)

        monkeypatch.setattr(token_blocks, "split", split)
        blocks = jax.jit(lambda *arguments: function(*arguments))(*arguments)
        return whole, blocks, cut

    return run


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
def test_panels_over_blocks(in_one_piece_and_cut, kind, options):
    whole, blocks, cut = in_one_piece_and_cut(partial(call, options=options), *layer(kind))
    assert cut
    assert_same(blocks, whole)


def test_auto_over_blocks(in_one_piece_and_cut):
    """Where it is dense; where it is not, it is the panels' call."""
    x, weights = layer("gated")
    x = jnp.abs(x)
    weights["w_gate"] = jnp.abs(weights["w_gate"])
    options = FFNOptions(Auto(tokens=16), backend="interpret")
    whole, blocks, cut = in_one_piece_and_cut(partial(call, options=options), x, weights, size=96)
    assert len(cut) == 3, "whether it is cut, and both branches"
    assert blocks[1].dense_tokens == len(x)
    assert_same(blocks, whole)


def test_groups_over_blocks(in_one_piece_and_cut):
    """Calls that run as one, whose borders are not those of blocks or panels."""
    x, weights = layer("gated", 204)
    mapped = jax.vmap(partial(call, options=FFNOptions(Panel(16), backend="interpret")), in_axes=(0, None))
    whole, blocks, _ = in_one_piece_and_cut(mapped, x.reshape(6, 34, -1), weights, size=96)
    assert blocks[1].pairs.shape == (6,)
    assert_same(blocks, whole)


def test_mapped_weights_over_blocks(in_one_piece_and_cut):
    """As of experts: kernels that write into one y are mapped one by one."""
    x, weights = layer("gated", 100)
    experts = jax.tree.map(lambda weight: jnp.stack([weight, weight[::-1]]), weights)
    mapped = jax.vmap(partial(call, options=FFNOptions(Panel(16), backend="interpret")), in_axes=(None, 0))
    whole, blocks, _ = in_one_piece_and_cut(mapped, x, experts)
    assert_same(blocks, whole)


@pytest.mark.parametrize("format", [Panel(16), Auto(16)])
def test_a_call_with_a_gradient_is_not_cut(monkeypatch, format):
    x, weights = layer("gated", 100)
    monkeypatch.setattr(configs, "FEW_PANELS", 0)
    monkeypatch.setattr(token_blocks, "split", lambda tokens, products, device: token_blocks.cut(tokens, 64))

    def y_sum(x):
        return jnp.sum(call(x, weights, FFNOptions(format, backend="interpret"))[0])

    assert "optimization_barrier" in str(jax.make_jaxpr(y_sum)(x))
    assert "optimization_barrier" not in str(jax.make_jaxpr(jax.grad(y_sum))(x))


@pytest.mark.parametrize(("format", "backend"), [("panel", "auto"), ("panel", "triton"), ("auto", "auto")])
def test_temporaries_are_those_of_a_block(format, backend):
    """Of 65,536 tokens no (M, F) array is in the program; of 16,384 the program is the one in one piece."""

    def text(tokens):
        options = FFNOptions(format=format, backend=backend)
        return lowered(partial(call_by_name, options=options), shapes(tokens, 2048, 5632))

    def largest(text):
        found = set(re.findall(r"tensor<((?:\d+x)+)[a-z]+\d+>", text))
        return max(math.prod(map(int, shape.split("x")[:-1])) for shape in found)

    cut = text(65536)
    assert largest(cut) <= max(65536 * 2048, 258 * 128 * 5632)
    assert "optimization_barrier" in cut
    if format == "panel" and backend == "auto":
        whole = text(16384)
        assert "optimization_barrier" not in whole
        assert largest(whole) == 16384 * 5632


def call_by_name(inputs, options):
    return sparse_ffn(**inputs, options=options)
