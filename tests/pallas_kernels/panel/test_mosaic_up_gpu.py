"""The up projection on Mosaic GPU on a Hopper GPU: slot by slot against Triton's, and whole forward calls."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designed import PATTERNS
from op_checks import call, check_counts, check_values, run
from panel_path import PanelPath
from truth import exact, forward, judge, rounding_to

from pallas_kernels import FFNOptions, Panel, Threshold, device
from pallas_kernels import activations as rules
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import pallas_mosaic_gpu, pallas_mosaic_gpu_up
from pallas_kernels.panel.config import GATHERED_TILE
from pallas_kernels.panel.pallas_triton import panel_up
from pallas_kernels.panel.pallas_triton_lists import build_lists, count_active

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def hopper():
    if device.current().capability != 90:
        pytest.skip("needs a Hopper GPU")


# -- slot by slot ------------------------------------------------------------------------------------------


def whole_numbers(tokens, d_model, d_ff, dtype):
    """Arguments whose projections every order of summation gives exactly. Neurons are active for most to none
    of the tokens; one row of x and one of w_up hold an infinity."""
    rng = np.random.default_rng(tokens)
    x, w_gate, w_up = (rng.integers(-2, 3, (n, d_model)).astype(np.float32) for n in (tokens, d_ff, d_ff))
    x[:, 0] = 8
    w_gate[:, 0] = -np.round(rng.uniform(0, 4, d_ff) * np.sqrt(4 * d_model) / 8)
    x[3, 1] = w_up[7, 1] = np.inf
    return tuple(jnp.asarray(array, dtype) for array in (x, w_gate, w_up))


@partial(jax.jit, static_argnames="rule")
def both(x, w_gate, w_up, rule):
    """The lists, Triton's h and l1, and Mosaic GPU's."""
    config = configs.choose(x, w_up, 128)
    gate = pallas_mosaic_gpu.gate_panel(x, w_gate, rule)
    counts = count_active(gate, d_ff=w_up.shape[0])
    lists, _ = build_lists(gate, counts, chunk=config.chunk, tile=GATHERED_TILE)
    expected = panel_up(gate, lists, x, w_up, config=config.up, rule=rule)
    found = pallas_mosaic_gpu_up.panel_up(gate, lists, x, w_up, pad=config.down.tile_k, rule=rule)
    return lists, (expected.h, expected.l1), (found.h, found.l1)


@pytest.mark.parametrize(
    ("sizes", "dtype", "activation"),
    [
        ((16389, 2048, 5632), "bfloat16", "relu"),
        ((1000, 64, 2816), "bfloat16", "drelu"),
        ((4096, 320, 520), "float16", Threshold(3.5)),
        ((777, 1024, 4104), "bfloat16", "relu2"),
    ],
    ids=str,
)
def test_every_slot_as_on_triton(sizes, dtype, activation):
    arguments = whole_numbers(*sizes, dtype)
    rule = rules.rule(activation)
    lists, expected, found = jax.device_get(both(*arguments, rule))
    again = jax.device_get(both(*arguments, rule))[2]
    pad = configs.choose(arguments[0], arguments[2], 128).down.tile_k
    slots = np.concatenate(
        [
            start + np.arange(-(-count // pad) * pad)
            for start, count in zip(lists.offsets, lists.counts, strict=False)
        ]
    )
    counts = np.sort(lists.counts)
    assert counts[0] > 0
    assert len(np.unique(counts)) > 1
    bits = [h[slots].view(np.uint16) for h, _ in (expected, found, again)]
    numbers = np.isnan(expected[0][slots].astype(np.float32))
    assert 0 < numbers.mean() < 0.2
    np.testing.assert_array_equal(np.isnan(found[0][slots].astype(np.float32)), numbers)
    np.testing.assert_array_equal(bits[1][~numbers], bits[0][~numbers])
    np.testing.assert_array_equal(bits[2], bits[1])
    assert np.isnan(found[1])


def test_l1_as_on_triton():
    x, w_gate, w_up = whole_numbers(4000, 512, 2816, "bfloat16")
    x, w_up = (jnp.where(jnp.isfinite(array), array, 1) for array in (x, w_up))
    _, (_, expected), (_, found) = both(x, w_gate, w_up, rules.RELU)
    again = both(x, w_gate, w_up, rules.RELU)[2][1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(found) == float(again) > 0


# -- whole calls -------------------------------------------------------------------------------------------

PATH = PanelPath(
    FFNOptions(format=Panel(capacity=1.0), backend="mosaic_gpu"),
    d_model=192,  # sizes that no other test has: what was traced for them has these configs
    d_ff=536,
    many_tokens=0,
    tile=64,
    slots=16,
)


@pytest.fixture(autouse=True)
def many_panels(monkeypatch):
    """A few panels are as many."""
    monkeypatch.setattr(configs, "FEW_PANELS", 0)


CALLS = [(pattern, "relu", dtype) for pattern in PATTERNS for dtype in ("bfloat16", "float16")] + [
    ("uneven", "relu2", "bfloat16"),
    ("uneven", "drelu", "float16"),
    ("uneven", Threshold(0.3125), "bfloat16"),
]


@pytest.mark.parametrize(("pattern", "activation", "dtype"), CALLS, ids=str)
def test_a_call(pattern, activation, dtype):
    options = dataclasses.replace(PATH.options, activation=activation)
    inputs, _ = PATH.layer(pattern, 1033, dtype)
    function = jax.jit(partial(call, options=options))
    assert "panel_up" not in function.lower(inputs).as_text()
    y, stats = run(function, inputs)
    true, rounded = (forward(inputs, cast, activation) for cast in (exact, rounding_to(dtype)))
    judge("y", y, true["y"], rounded["y"], y.dtype)
    judge("l1", stats.l1, true["l1"], rounded["l1"], y.dtype)
    check_counts(stats, true["active"], 0)


def test_layers_of_a_batch():
    """As experts are: each layer of mapped weights is its own grid of programs in one launch."""
    layers = [PATH.layer(pattern, 1033, "bfloat16") for pattern in ("few", "fully-dense", "uneven")]
    batch = {name: np.stack([inputs[name] for inputs, _ in layers]) for name in layers[0][0]}
    y, stats = run(jax.jit(jax.vmap(partial(call, options=PATH.options))), batch)
    for index, (inputs, active) in enumerate(layers):
        check_values(y[index], jax.tree.map(lambda leaf, index=index: leaf[index], stats), inputs)
        np.testing.assert_array_equal(stats.neuron_hits[index], active.sum(axis=0))
