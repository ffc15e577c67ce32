"""The gathered products on Mosaic GPU on a Hopper GPU: slot by slot against Triton's, and whole calls."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designed import PATTERNS
from lowering import panel_launches
from op_checks import DL1, call, check_counts, check_values, cotangent, run
from panel_path import PanelPath
from truth import exact, forward, gradients, judge, rounding_to

from pallas_kernels import FFNOptions, Panel, Threshold, device
from pallas_kernels import activations as rules
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import pallas_mosaic_gpu
from pallas_kernels.panel.config import GATHERED_TILE
from pallas_kernels.panel.gathered import panel_dh, panel_up
from pallas_kernels.panel.pallas_triton_counts import count_active
from pallas_kernels.panel.pallas_triton_lists import build_lists

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def hopper():
    if device.current().capability != 90:
        pytest.skip("needs a Hopper GPU")


# -- slot by slot ------------------------------------------------------------------------------------------


def whole_numbers(tokens, d_model, d_ff, dtype):
    """x, the three weights and dy, whose products every order of summation gives exactly. Neurons are active
    for most to none of the tokens; x, w_up, w_down and dy hold an infinity each."""
    rng = np.random.default_rng(tokens)
    x, w_gate, w_up, w_down, dy = (
        rng.integers(-2, 3, (n, d_model)).astype(np.float32) for n in (tokens, d_ff, d_ff, d_ff, tokens)
    )
    x[:, 0] = 8
    w_gate[:, 0] = -np.round(rng.uniform(0, 4, d_ff) * np.sqrt(4 * d_model) / 8)
    x[3, 1] = w_up[7, 1] = w_down[9, 2] = dy[5, 2] = np.inf
    return tuple(jnp.asarray(array, dtype) for array in (x, w_gate, w_up, w_down, dy))


@partial(jax.jit, static_argnames=("rule", "scaled"))
def both(x, w_gate, w_up, w_down, dy, rule, scaled):
    """The lists, and of Triton and of Mosaic GPU: what the up projection keeps, l1, and what dh gives."""
    config = configs.choose(x, w_up, 128)
    gate = pallas_mosaic_gpu.gate_panel(x, w_gate, rule)
    counts = count_active(gate, d_ff=w_up.shape[0])
    lists, _ = build_lists(counts, tokens=x.shape[0], chunk=config.chunk, tile=GATHERED_TILE)
    scale = jnp.full((1,), 0.25, jnp.float32) if scaled else None

    def products(backend):
        walked = lists if backend == "mosaic_gpu" else lists._replace(tiles=None, n_tiles=None)
        how = {"config": config, "backend": backend, "rule": rule}
        hidden = panel_up(gate, walked, x, w_up, keep=True, **how)
        pulled = panel_dh(hidden.gate, hidden.up, walked, dy, w_down, scale, **how)
        # Where a gate is zero, the projection means nothing.
        up = jnp.where(hidden.gate > 0, hidden.up, 0)
        slots = {"h": hidden.h, "gate": hidden.gate, "up": up}
        return hidden.l1, slots | {"dg": pulled.gate, "du": pulled.up, "h again": pulled.h}

    return lists, products("triton"), products("mosaic_gpu")


@pytest.mark.parametrize(
    ("sizes", "dtype", "activation", "scaled"),
    [
        ((16389, 2048, 5632), "bfloat16", "relu", True),
        ((1000, 64, 2816), "bfloat16", "drelu", False),
        ((4096, 320, 520), "float16", Threshold(3.5), True),
        ((777, 1024, 4104), "bfloat16", "relu2", True),
    ],
    ids=str,
)
def test_every_slot_as_on_triton(sizes, dtype, activation, scaled):
    arguments = whole_numbers(*sizes, dtype)
    rule = rules.rule(activation)
    lists, (_, expected), (l1, found) = jax.device_get(both(*arguments, rule, scaled))
    again = jax.device_get(both(*arguments, rule, scaled))[2][1]
    pad = configs.choose(arguments[0], arguments[2], 128).pad
    slots = np.concatenate(
        [
            start + np.arange(-(-count // pad) * pad)
            for start, count in zip(lists.offsets, lists.counts, strict=False)
        ]
    )
    counts = np.sort(lists.counts)
    assert counts[0] > 0
    assert len(np.unique(counts)) > 1
    for name in expected:
        triton, mosaic, twice = (values[name][slots] for values in (expected, found, again))
        numbers = ~np.isnan(triton.astype(np.float32))
        assert 0.8 < numbers.mean() < 1, name
        np.testing.assert_array_equal(~np.isnan(mosaic.astype(np.float32)), numbers, err_msg=name)
        bits = [values.view(np.uint16) for values in (triton, mosaic, twice)]
        np.testing.assert_array_equal(bits[1][numbers], bits[0][numbers], err_msg=name)
        np.testing.assert_array_equal(bits[2], bits[1], err_msg=name)
    assert np.isnan(l1)


def test_l1_as_on_triton():
    finite = (jnp.nan_to_num(array, posinf=1) for array in whole_numbers(4000, 512, 2816, "bfloat16"))
    arguments = *finite, rules.RELU, True
    _, (expected, _), (found, _) = both(*arguments)
    again = both(*arguments)[2][0]
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
    assert panel_launches(function.lower(inputs).as_text())[1] == ["panel_gate", "panel_up", "panel_down"]
    y, stats = run(function, inputs)
    true, rounded = (forward(inputs, cast, activation) for cast in (exact, rounding_to(dtype)))
    judge("y", y, true["y"], rounded["y"], y.dtype)
    judge("l1", stats.l1, true["l1"], rounded["l1"], y.dtype)
    check_counts(stats, true["active"], 0)


@pytest.mark.parametrize(
    ("activation", "dtype", "dl1"),
    [("relu2", "bfloat16", DL1), ("drelu", "float16", DL1), (Threshold(0.3125), "bfloat16", None)],
    ids=str,
)
def test_the_gradients_of_a_call(activation, dtype, dl1):
    """Without a cotangent of l1 the kernel adds no signs."""
    options = dataclasses.replace(PATH.options, activation=activation)
    inputs, _ = PATH.layer("uneven", 1033, dtype)
    dy = cotangent(inputs)

    def objective(inputs, dy):
        y, stats = call(inputs, options)
        return jnp.sum(y.astype(jnp.float32) * dy) + (0 if dl1 is None else dl1 * stats.l1)

    step = jax.jit(jax.grad(objective))
    mosaic = panel_launches(step.lower(inputs, dy).as_text())[1]
    assert mosaic == ["panel_gate", "panel_up", "panel_dh", "panel_dx"]
    true, rounded = (
        gradients(inputs, dy, dl1 or 0.0, cast, activation=activation) for cast in (exact, rounding_to(dtype))
    )
    for name, gradient in run(step, inputs, dy).items():
        judge(f"gradient of {name}", gradient, true[name], rounded[name], gradient.dtype)


def test_layers_of_a_batch():
    """As experts are: each layer of mapped weights is its own grid of programs in one launch."""
    layers = [PATH.layer(pattern, 1033, "bfloat16") for pattern in ("few", "fully-dense", "uneven")]
    batch = {name: np.stack([inputs[name] for inputs, _ in layers]) for name in layers[0][0]}
    y, stats = run(jax.jit(jax.vmap(partial(call, options=PATH.options))), batch)
    for index, (inputs, active) in enumerate(layers):
        check_values(y[index], jax.tree.map(lambda leaf, index=index: leaf[index], stats), inputs)
        np.testing.assert_array_equal(stats.neuron_hits[index], active.sum(axis=0))
