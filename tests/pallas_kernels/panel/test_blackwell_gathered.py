"""The gathered products for Blackwell, where there is no GPU: their warpgroups' protocol under an interpreter
that sees races, with rows copied one by one where the copy engine would gather them; and when a call takes
them. No B200 has run them: what only a GPU shows is open.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from lowering import B200, lowered, panel_launches, shapes
from op_checks import call, differentiate
from plain_gather import plain_gather

from pallas_kernels import FFNOptions, device
from pallas_kernels.activations import Rule
from pallas_kernels.panel import blackwell_dh, blackwell_down, blackwell_up, gathered
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.pallas_triton import panel_down, panel_up
from pallas_kernels.panel.pallas_triton_backward import panel_dh
from pallas_kernels.panel.pallas_triton_counts import GatePanel, count_active
from pallas_kernels.panel.pallas_triton_lists import build_lists

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
BLACKWELL = device.Device("gpu", "NVIDIA B200", 100, 148)
PANEL, SEGMENTS = 128, 8
TOKENS = PANEL // SEGMENTS

interpreted = pytest.mark.skipif(
    VERSION < (0, 11, 2), reason="JAX interprets Mosaic GPU kernels from 0.11.2 on"
)


def gates_and_lists(counts, d_ff, dtype):
    """Gates of panels with so many active neurons, NaN in the segments that have none, and their lists."""
    rng = np.random.default_rng(0)
    hits = np.zeros((len(counts), SEGMENTS, d_ff), np.uint8)
    for panel, count in enumerate(counts):
        neurons = rng.permutation(d_ff)[:count]
        hits[panel][:, neurons] = rng.integers(0, 2, (SEGMENTS, count))
        hits[panel][rng.integers(0, SEGMENTS, count), neurons] = 1
    values = rng.integers(-2, 3, (len(counts), d_ff, PANEL)).clip(min=0)
    values = np.where(np.repeat(hits.transpose(0, 2, 1), TOKENS, axis=2), values, np.nan)
    nnz = np.zeros((1, len(counts) * PANEL), np.int32)
    gate = GatePanel(jnp.asarray(values, dtype), jnp.asarray(hits.reshape(-1, d_ff)), jnp.asarray(nnz))
    active = count_active(gate, d_ff=d_ff, interpret=True)
    lists, _ = build_lists(active, tokens=1, chunk=128, interpret=True)
    return gate, lists


def whole(rng, *shape, dtype):
    """Numbers whose products add up exactly."""
    return jnp.asarray(rng.integers(-1, 2, shape), dtype)


def no_races():
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # has no public name

    assert not get_races().races_found


@interpreted
@pytest.mark.parametrize(
    ("cores", "d_model", "dtype", "rule", "keep", "scale"),
    [
        (2, 192, "bfloat16", Rule(squared=True), False, 0.25),
        (5, 64, "float16", Rule(rectified_up=True), True, None),
    ],
    ids=str,
)
def test_the_products_of_tokens_under_the_interpreter(cores, d_model, dtype, rule, keep, scale, monkeypatch):
    """The up projection, and the gradient of h of what Triton's has kept. Programs with several tiles, one
    and none; tiles of two chunks and of one; more slices than the ring holds, and fewer; a panel of no
    neuron; a call that ends within a panel. To the bit what Triton's give, of whole numbers, over all slots.
    """
    counts, d_ff, cut = [70, 130, 0, 1], 152, 5
    monkeypatch.setattr(device, "current", lambda: dataclasses.replace(BLACKWELL, cores=cores))
    rng = np.random.default_rng(1)
    x = whole(rng, len(counts) * PANEL - cut, d_model, dtype=dtype)
    w = whole(rng, d_ff, d_model, dtype=dtype)
    gate, lists = gates_and_lists(counts, d_ff, dtype)
    last = gate.values[-1, :, -cut:]
    gate = gate._replace(values=gate.values.at[-1, :, -cut:].set(jnp.where(jnp.isnan(last), last, 0)))
    used = slice(0, int(lists.offsets[-1]))
    on_triton = {"config": configs.StageConfig(128, 64, 4, 2), "rule": rule, "interpret": True}
    interpreter = plgpu.InterpretGPUParams(detect_races=True)
    on_mosaic = {"rule": rule, "gather": plain_gather, "interpret": interpreter}

    expected = panel_up(gate, lists, x, w, keep=True, **on_triton)
    found = blackwell_up.panel_up(gate, lists, x, w, keep=keep, **on_mosaic)
    no_races()
    np.testing.assert_array_equal(found.h[used], expected.h[used])
    assert np.isfinite(expected.h[used].astype(jnp.float32)).all()
    np.testing.assert_allclose(found.l1, expected.l1, rtol=1e-6)
    assert expected.l1 > 0
    if keep:
        np.testing.assert_array_equal(found.gate[used], expected.gate[used])
        # Where a gate is zero, the projection means nothing.
        ups = [jnp.where(expected.gate > 0, hidden.up, 0)[used] for hidden in (found, expected)]
        np.testing.assert_array_equal(*ups)
    else:
        assert found.gate is None
        assert found.up is None

    scale = None if scale is None else jnp.full((1,), scale, jnp.float32)
    kept = expected.gate, expected.up
    wanted = panel_dh(*kept, lists, x, w, scale, **on_triton)
    gradients = blackwell_dh.panel_dh(*kept, lists, x, w, scale, **on_mosaic)
    no_races()
    for mine, triton in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(mine[used], triton[used])
        assert (np.asarray(triton[used]) != 0).any()


@interpreted
@pytest.mark.parametrize(
    ("terms", "cores", "d_model", "dtype"), [(1, 2, 64, "float16"), (2, 4, 320, "bfloat16")], ids=str
)
def test_the_down_projection_under_the_interpreter(terms, cores, d_model, dtype, monkeypatch):
    """Programs with several tiles, and more slices than the ring holds; panels of two chunks, of one, and of
    none; calls that end within a panel and within a tile of columns. To the bit what Triton's gives, of whole
    numbers."""
    counts, d_ff, cut = [70, 0, 1, 130, 0], 136, 5
    monkeypatch.setattr(device, "current", lambda: dataclasses.replace(BLACKWELL, cores=cores))
    _, lists = gates_and_lists(counts, d_ff, dtype)
    tokens, slots = len(counts) * PANEL - cut, lists.neurons.shape[0]
    rng = np.random.default_rng(1)
    listed = np.asarray(lists.segments)[:, None] > 0
    operands = [
        (jnp.where(listed, whole(rng, slots, PANEL, dtype=dtype), 0), whole(rng, d_ff, d_model, dtype=dtype))
        for _ in range(terms)
    ]
    stage = configs.StageConfig(256, 32, 4, 2)
    expected = panel_down(operands, lists, tokens=tokens, config=stage, interpret=True)
    found = blackwell_down.panel_down(
        operands,
        lists,
        tokens=tokens,
        gather=plain_gather,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    no_races()
    np.testing.assert_array_equal(found, expected)
    assert (np.asarray(expected) != 0).any()


# -- when, and what a call becomes -------------------------------------------------------------------------


def config_on_blackwell(**changes):
    x = jax.ShapeDtypeStruct((65536, 2048), "bfloat16")
    return dataclasses.replace(configs.heuristic(x, PANEL, BLACKWELL), **changes)


def launches(config, backend="mosaic_gpu", gated=True, d_model=192, by_token=False, gradient=False):
    """The kernels of an up and a down projection of 300 tokens, or of the gradients of both: Triton's, and
    Mosaic GPU's."""
    d_ff = 384
    gate, lists = jax.eval_shape(partial(gates_and_lists_as_arrays, d_ff, config.chunk))
    x, w = (jax.ShapeDtypeStruct((n, d_model), "bfloat16") for n in (300, d_ff))
    how = {"config": config, "backend": backend}

    def both(gate, lists, x, w):
        w_up = w if gated else None
        rule = Rule(squared=True)
        hidden = gathered.panel_up(gate, lists, x, w_up, rule=rule, keep=gradient, by_token=by_token, **how)
        h = hidden.h
        if gradient:
            scale = jnp.ones((300 if by_token else 1,), jnp.float32)
            h = gathered.panel_dh(hidden.gate, hidden.up, lists, x, w, scale, rule=rule, **how).gate
        return hidden.l1, gathered.panel_down([(h, w)], lists, tokens=300, gradient=gradient, **how)

    text = lowered(both, gate, lists, x, w, gpu=B200)
    triton, mosaic = panel_launches(text)
    assert ("tile::gather4" in text) == bool(mosaic)  # rows are the copy engine's, and not `plain_gather`'s
    return triton, mosaic


def gates_and_lists_as_arrays(d_ff, chunk):
    gate = GatePanel(
        jnp.zeros((3, d_ff, PANEL), "bfloat16"),
        jnp.zeros((3 * SEGMENTS, d_ff), "uint8"),
        jnp.zeros((1, 3 * PANEL), "int32"),
    )
    active = count_active(gate, d_ff=d_ff, interpret=True)
    return gate, build_lists(active, tokens=1, chunk=chunk, interpret=True)[0]


def test_the_implementation_of_a_call():
    """Where the gate is Mosaic GPU's, for calls whose tokens are not cut into blocks and have one l1."""
    config = config_on_blackwell()
    assert config.gathered_backend == "mosaic_gpu"
    assert config.dw_backend == "triton"
    on_mosaic = ["panel_up", "panel_down"]
    assert launches(config) == ([], on_mosaic)
    backward = ["panel_up", "panel_dh", "panel_dx"]
    assert launches(config, gradient=True, d_model=64) == ([], backward)
    assert launches(config, gradient=True, backend="triton") == (backward, [])
    assert launches(config, backend="triton") == (on_mosaic, [])
    assert launches(config_on_blackwell(gathered_backend="triton")) == (on_mosaic, [])
    assert launches(config, gated=False) == (["panel_up"], ["panel_down"])
    by_token = ["panel_up", "panel_token_l1", "panel_dh"], ["panel_dx"]
    assert launches(config, by_token=True, gradient=True) == by_token
    gradients_alone = launches(config, gated=False, gradient=True)
    assert gradients_alone == (["panel_up", "panel_dh"], ["panel_dx"])
    assert launches(config, d_model=200) == (on_mosaic, [])
    stages = {name: dataclasses.replace(getattr(config, name), tile=64) for name in ("up", "up_keep", "dh")}
    assert launches(config_on_blackwell(chunk=64, **stages)) == (on_mosaic, [])


def test_lists_have_no_tiles(monkeypatch):
    """Blocks of tokens and every other call walk over the same lists."""
    monkeypatch.setattr(device, "current", lambda: BLACKWELL)
    x, w = (jax.ShapeDtypeStruct((n, 192), "bfloat16") for n in (384, 384))
    config = config_on_blackwell()
    chosen = partial(gathered.implementation, config, "mosaic_gpu", x, w)
    assert chosen(in_blocks=False, by_token=False) == "blackwell"
    assert chosen(in_blocks=True, by_token=False) == "triton"
    assert chosen(in_blocks=False, by_token=True) == "triton"

    def make():
        gate, _ = gates_and_lists_as_arrays(384, 128)
        counts = count_active(gate, d_ff=384, interpret=True)
        return gathered.make_lists(counts, x, w, config=config, backend="mosaic_gpu")[0]

    assert jax.eval_shape(make).tiles is None


def test_a_training_call():
    """One that asks for Mosaic GPU by name has it in all products but those of weight gradients."""
    inputs, dy = shapes(8320, 192, 528), jax.ShapeDtypeStruct((8320, 192), jnp.float32)

    def kernels(backend):
        options = FFNOptions(format="panel", backend=backend)
        step = partial(differentiate, dl1=1.0, apply=partial(call, options=options))
        return panel_launches(lowered(step, inputs, dy, gpu=B200))

    on_mosaic = ["panel_up", "panel_down", "panel_dh", "panel_dx"]
    triton, mosaic = kernels("mosaic_gpu")
    assert mosaic == ["panel_gate", *on_mosaic]
    assert "panel_dw_hot" in triton
    triton, mosaic = kernels("auto")
    assert mosaic == []
    assert {*on_mosaic} < {*triton}
