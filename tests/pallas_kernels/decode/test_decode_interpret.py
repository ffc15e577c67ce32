"""The contract on the decode kernels, run by Pallas' interpreter on a CPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_checks import Path, call
from op_contract import Contract
from step_parts import check_add_norm, check_attention, check_project, check_stream
from truth import exact, forward

from pallas_kernels import FFNOptions, decode
from pallas_kernels.activations import RELU
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.config import AttentionConfig, DecodeConfig, DownConfig, TilesConfig
from pallas_kernels.decode.layer import run
from pallas_kernels.device import Device


class TestDecodeInterpreted(Contract):
    path = Path(
        FFNOptions(format="decode", backend="interpret"),
        d_model=40,
        d_ff=72,
        many_tokens=61,
        check_vma=False,  # 2026-11: Pallas' interpreter mixes its own arrays with varying ones
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(2, 2, "float32"), (4, 2, "bfloat16"), (20, 1, "float32")]
)
def test_attention(heads, kv_heads, dtype):
    check_attention(heads, kv_heads, head_dim=32, capacity=41, dtype=dtype, interpret=True)


@pytest.mark.parametrize(("tokens", "dtype"), [(1, "bfloat16"), (5, "float32"), (70, "float32")])
def test_projections_and_norms(tokens, dtype):
    check_project(tokens, d_model=72, outputs=37, dtype=dtype, interpret=True)
    check_add_norm(tokens, d_model=72, dtype=dtype, interpret=True)


@pytest.mark.parametrize(
    ("tokens", "d_model", "dtype", "gated", "factor"),
    [
        (1, 72, "float32", True, 0.3),
        (2, 72, "bfloat16", False, 1.0),
        (2, 128, "float16", True, 0.3),
    ],
)
def test_sums_and_norms_inside_the_kernels(tokens, d_model, dtype, gated, factor):
    sizes = {"d_model": d_model, "d_ff": 80}
    check_stream(tokens, **sizes, dtype=dtype, gated=gated, factor=factor, interpret=True)


def test_a_norm_on_its_way_is_for_one_or_two_tokens():
    x = jnp.ones((3, 32), jnp.float32)
    normed = decode.Stream.of(x).normed(jnp.ones(32), 1e-5)
    with pytest.raises(ValueError, match=r"at most 2 tokens on their way.*; got 3 tokens without a config"):
        decode.project(normed, x, interpret=True)
    one = decode.Stream.of(x[:1]).normed(jnp.ones(32), 1e-5)
    with pytest.raises(ValueError, match=r"on their way, without a config; got 1 tokens and TilesConfig\("):
        decode.project(one, x, config=TilesConfig(16, 16, 1, 32, 1, 4, 2), interpret=True)


SEVERAL_GROUPS = DecodeConfig(TilesConfig(16, 64, 2, 32, 2, 4, 2), DownConfig(16, 16, 3, 4, 2))
"""Programs of 36 neurons each, which are one group of sixteen, or three, and three splits of them."""


def run_here(inputs, x, config):
    weights = [None if inputs.get(name) is None else jnp.asarray(inputs[name]) for name in WEIGHTS]
    return jax.jit(lambda x: run(x, *weights, rule=RELU, config=config, interpret=True))(jnp.asarray(x))


WEIGHTS = ("w_gate", "w_up", "w_down")


@pytest.mark.parametrize("kind", ["gated", "non-gated"])
@pytest.mark.parametrize("pattern", ["few", "uneven", "fully-dense"])
def test_programs_of_several_groups(pattern, kind):
    inputs, active = TestDecodeInterpreted.path.layer(pattern, 20, "float32", kind)
    y, hidden = run_here(inputs, inputs["x"], SEVERAL_GROUPS)
    want = forward(inputs, exact)
    np.testing.assert_allclose(y, want["y"], rtol=0, atol=1e-5 * np.abs(want["y"]).max())
    np.testing.assert_array_equal(np.sum(hidden.nnz, axis=0), active.sum(axis=1))
    np.testing.assert_array_equal(np.sum(hidden.hits, axis=0), active.sum(axis=0))
    np.testing.assert_allclose(np.sum(hidden.l1, axis=0), np.abs(want["h"]).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("config", [None, SEVERAL_GROUPS], ids=["chosen", "several groups"])
def test_a_row_does_not_depend_on_the_others(config):
    """Bit for bit, within one padding of the tokens: neither on how many there are, nor on what they
    activate, which is everything for the first and little for the last."""
    inputs, _ = TestDecodeInterpreted.path.layer("few", 8, "bfloat16")
    inputs["w_gate"][:, 0] = 1
    together, hidden = run_here(inputs, inputs["x"], config)
    assert np.all(hidden.hits)
    alone, hidden = run_here(inputs, inputs["x"][-3:], config)
    assert np.count_nonzero(hidden.hits) < 16
    np.testing.assert_array_equal(alone, together[-3:])


@pytest.mark.parametrize("kind", ["gated", "non-gated"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_a_layer_of_a_stack(tokens, kind):
    """The same bits as the layer alone; a number behind the last is the last's."""
    path = TestDecodeInterpreted.path
    layers = [path.layer("uneven", tokens, "bfloat16", kind, seed=seed)[0] for seed in range(3)]
    x = jnp.asarray(layers[0]["x"])
    stack = [jnp.stack([layer[name] for layer in layers]) if name in layers[0] else None for name in WEIGHTS]
    step = jax.jit(partial(decode.layer_of_stack, interpret=True))
    for nth in (0, 2, 7):
        y, stats = step(x, *stack, nth)
        alone = layers[min(nth, 2)] | {"x": x}
        want, expected = call(alone, path.options)
        np.testing.assert_array_equal(y, want)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), stats, expected)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"w_up": (5, 4)}, r"w_up must have shape \(L, F, D\), L as in w_up; got \(5, 4\)"),
        ({"w_down": (3, 5, 4)}, r"w_down must have shape \(L, F, D\)"),
        ({"w_gate": (2, 4, 5)}, "w_gate must be neuron-major"),
        ({"x": (0, 4)}, r"x must have tokens, in the weights' type float32; got float32\(0, 4\)"),
        (
            {"w_gate": None, "w_up": (2**19, 2**10, 4), "w_down": (2**19, 2**10, 4)},
            "less than 2\\^31 elements",
        ),
    ],
)
def test_stacks_that_do_not_fit(shapes, sentence):
    given = {"x": (3, 4), "w_gate": (2, 5, 4), "w_up": (2, 5, 4), "w_down": (2, 5, 4)} | shapes
    arguments = {n: None if s is None else jax.ShapeDtypeStruct(s, jnp.float32) for n, s in given.items()}
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda arguments: decode.layer_of_stack(**arguments, layer=0), arguments)


DEVICES = [
    Device("gpu", "NVIDIA H100 80GB HBM3", 90, 132), Device("gpu", "NVIDIA A100-SXM4-80GB", 80, 108),
    Device("gpu", "NVIDIA GeForce RTX 4090", 89, 128), Device("cpu", "cpu", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("tokens", "rows"), [(3, 16), (17, 32), (64, 64), (300, 64)])
@pytest.mark.parametrize("d_ff", [1, 100, 5632, 28672])
def test_what_is_chosen_has_every_neuron_and_fits_the_device(d_ff, tokens, rows, dtype, device):
    x = jax.ShapeDtypeStruct((tokens, 2048), dtype)
    config = configs.choose(x, d_ff, device)
    down = config.down
    assert (down.tile_d + rows) * down.tile * down.num_stages * x.dtype.itemsize < device.shared_memory
    for tiles in (config.hidden, configs.choose_project(x, d_ff, device)):
        assert tiles.rows == rows
        assert tiles.programs * tiles.owned(d_ff) >= d_ff > (tiles.programs - 1) * tiles.owned(d_ff)
        slices = (tiles.tile + rows) * tiles.tile_k * tiles.num_stages
        assert slices * x.dtype.itemsize < device.shared_memory
        if device.cores and dtype == "bfloat16":
            waves = tiles.programs / device.cores
            assert waves <= max(1, d_ff / (48 * device.cores)), "a wave of which much is idle"


@pytest.mark.parametrize(
    ("batch", "kv_heads", "splits"),
    [
        (1, 32, 4),
        (2, 32, 2),
        (3, 32, 1),
        (1, 8, 16),
        (3, 2, 4),
        (16, 2, 4),
        (17, 2, 2),
        (64, 1, 2),
        (1, 200, 1),
    ],
)
def test_attention_has_a_program_for_each_core_and_cuts_a_row_alike_among_all_numbers_of_rows_of_a_block(
    batch, kv_heads, splits
):
    for capacity in (64, 2048):
        cache = jax.ShapeDtypeStruct((batch, capacity, kv_heads, 64), "bfloat16")
        assert configs.choose_attention(cache, DEVICES[0]) == AttentionConfig(64, splits)


@pytest.mark.parametrize(
    ("config", "fields", "sentence"),
    [
        ("hidden", {"tile": 24}, r"TilesConfig.tile must be a power of two from 16 to 128; got 24"),
        ("hidden", {"rows": 128}, r"TilesConfig.rows must be a power of two from 16 to 64; got 128"),
        ("hidden", {"num_stages": 0}, r"TilesConfig.num_stages must be at least 1; got 0"),
        ("hidden", {"programs": 0}, r"TilesConfig.programs must be at least 1; got 0"),
        ("down", {"splits": 0}, r"DownConfig.splits must be at least 1; got 0"),
    ],
)
def test_the_laws_of_a_config(config, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(getattr(SEVERAL_GROUPS, config), **fields)


def test_every_neuron_needs_a_program():
    assert SEVERAL_GROUPS.hidden.owned(128) == 64
    with pytest.raises(ValueError, match=r"tile \* programs must be at least the weight's 129 rows"):
        SEVERAL_GROUPS.hidden.owned(129)
