"""The down projection on Mosaic GPU, and dx, on a Hopper GPU: against Triton's, and in layers without a gate.
Whole gated calls are those of the other gathered products."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import panel_launches
from op_checks import DL1, call, cotangent, differentiate, run
from panel_path import PanelPath
from truth import exact, forward, gradients, judge, rounding_to

from pallas_kernels import FFNOptions, Panel, device
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import gathered
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PANEL = CHUNK = 128


@pytest.fixture(autouse=True)
def hopper():
    if device.current().capability != 90:
        pytest.skip("needs a Hopper GPU")


@partial(jax.jit, static_argnames=("tokens", "gradient"))
def both(terms, lists, tokens, gradient):
    """Triton's y and Mosaic GPU's."""
    x = jax.ShapeDtypeStruct((tokens, terms[0][1].shape[1]), terms[0][0].dtype)
    down = partial(gathered.panel_down, terms, lists, tokens=tokens, gradient=gradient)
    config = configs.heuristic(x, PANEL, device.current())
    return down(config=config, backend="triton"), down(config=config, backend="mosaic_gpu")


@pytest.mark.parametrize(
    ("sizes", "dtype", "terms"),
    [
        ((16389, 2048, 1408), "bfloat16", 1),
        ((16389, 2048, 1408), "bfloat16", 2),
        ((1000, 64, 2816), "bfloat16", 2),
        ((4100, 320, 520), "float16", 2),
        ((777, 1088, 4104), "float16", 1),
    ],
    ids=str,
)
def test_to_the_bit_as_on_triton(sizes, dtype, terms):
    """Of values that round, with panels of no, one, some and all neurons. Slots not written are NaN."""
    tokens, d_model, d_ff = sizes
    rng = np.random.default_rng(tokens)
    counts = rng.integers(0, d_ff + 1, -(-tokens // PANEL))
    counts[1:4] = 0, 1, d_ff
    room = -(-counts // CHUNK) * CHUNK
    offsets = np.concatenate([[0], np.cumsum(room)])
    neurons, written = np.zeros(offsets[-1], np.int32), np.full((offsets[-1], 1), np.nan)
    for start, count in zip(offsets, counts, strict=False):
        neurons[start : start + count] = np.sort(rng.permutation(d_ff)[:count])
        written[start : start - (-count // 32) * 32] = 0
        written[start : start + count] = 1
    fields = dict.fromkeys(NeuronLists._fields)
    fields |= {"counts": counts, "offsets": offsets, "neurons": neurons}
    lists = NeuronLists(
        **{name: None if f is None else jnp.asarray(f, "int32") for name, f in fields.items()}
    )

    def term(key):
        h, w = (jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key), shapes, strict=True))
        return (h * written).astype(dtype), w.astype(dtype)

    shapes = (len(neurons), PANEL), (d_ff, d_model)
    operands = [term(key) for key in jax.random.split(jax.random.key(0), terms)]
    expected, found = jax.device_get(both(operands, lists, tokens, terms == 2))
    again = jax.device_get(both(operands, lists, tokens, terms == 2))[1]
    assert np.isfinite(expected.astype(np.float32)).all()
    assert not expected[PANEL : 2 * PANEL].any()
    assert expected[-1].any()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again, found)


PATH = PanelPath(
    FFNOptions(format=Panel(capacity=1.0), backend="mosaic_gpu"),
    d_model=192,
    d_ff=544,  # as in no other test
    many_tokens=0,
    tile=64,
    slots=16,
)


def test_a_layer_without_a_gate():
    """y and the gradients, that of x of one term."""
    inputs, _ = PATH.layer("uneven", 1033, "bfloat16")
    inputs = {name: value for name, value in inputs.items() if name != "w_gate"}
    dy = cotangent(inputs)
    options = dataclasses.replace(PATH.options, activation="relu2")
    step = jax.jit(partial(differentiate, apply=partial(call, options=options)))
    launched = panel_launches(step.lower(inputs, dy, DL1).as_text())[1]
    assert launched == ["panel_gate", "panel_down", "panel_dx"]
    (y, _), found = run(step, inputs, dy, DL1)
    true, rounded = (forward(inputs, cast, "relu2") for cast in (exact, rounding_to("bfloat16")))
    judge("y", y, true["y"], rounded["y"], y.dtype)
    true, rounded = (
        gradients(inputs, dy, DL1, cast, activation="relu2") for cast in (exact, rounding_to("bfloat16"))
    )
    for name, gradient in found.items():
        judge(f"gradient of {name}", gradient, true[name], rounded[name], gradient.dtype)
