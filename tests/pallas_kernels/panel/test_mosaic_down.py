"""The down projection on Mosaic GPU, and dx, where there is no GPU: its warpgroups' protocol under an
interpreter that sees races, and when a call takes it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from lowering import lowered, on_h200, panel_launches, shapes
from op_checks import call, differentiate
from plain_down import PlainSteps

from pallas_kernels import FFNOptions, Panel, device
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import gathered, pallas_mosaic_gpu_down
from pallas_kernels.panel.config import GATHERED_SLICE
from pallas_kernels.panel.pallas_triton import panel_down
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
HOPPER = device.Device("gpu", "NVIDIA H200", 90, 132)
PANEL = CHUNK = 128


def lists_of(counts, d_ff):
    """What the kernel reads of the lists of panels with so many neurons."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum([-(-count // CHUNK) * CHUNK for count in counts])])
    neurons = np.concatenate([rng.permutation(d_ff)[: -(-count // CHUNK) * CHUNK] for count in counts])
    fields = dict.fromkeys(NeuronLists._fields)
    fields |= {"counts": counts, "offsets": offsets, "neurons": neurons}
    return NeuronLists(**{name: None if f is None else jnp.asarray(f, "int32") for name, f in fields.items()})


def slots_of(lists, fill_up_to):
    """Which slots are a panel's first ones, its count filled up to a multiple."""
    found = np.zeros(lists.neurons.shape[0], bool)
    for start, count in zip(np.asarray(lists.offsets), np.asarray(lists.counts), strict=False):
        found[start : start - (-count // fill_up_to) * fill_up_to] = True
    return found[:, None]


@pytest.mark.skipif(VERSION < (0, 11, 2), reason="JAX interprets Mosaic GPU kernels from 0.11.2 on")
@pytest.mark.parametrize(
    ("terms", "cores", "d_model", "dtype"), [(1, 9, 64, "float16"), (2, 4, 192, "bfloat16")], ids=str
)
def test_the_protocol_under_the_interpreter(terms, cores, d_model, dtype, monkeypatch):
    """Programs with several tiles, one and none; panels of more slices than the ring holds, of fewer, and of
    none; calls that end within a panel and within a tile of columns. To the bit what Triton's gives, of whole
    numbers, though h holds NaN behind what is written of it and slots past a count name a neuron of NaN."""
    counts, d_ff, cut, tile, stages = [70, 0, 1, 129, 0], 384, 5, 128, 4
    monkeypatch.setattr(device, "current", lambda: dataclasses.replace(HOPPER, cores=cores))
    monkeypatch.setattr(pallas_mosaic_gpu_down, "TILE", tile)
    monkeypatch.setattr(pallas_mosaic_gpu_down, "_STAGES", stages)
    lists, tokens = lists_of(counts, d_ff), len(counts) * PANEL - cut
    listed, written = slots_of(lists, 1), slots_of(lists, GATHERED_SLICE)
    rng = np.random.default_rng(1)

    def term():
        h = np.where(listed, rng.integers(-1, 2, (len(listed), PANEL)), np.where(written, 0, np.nan))
        return jnp.asarray(h, dtype), jnp.asarray(rng.integers(-1, 2, (d_ff, d_model)), dtype)

    operands = [term() for _ in range(terms)]
    expected = panel_down(
        operands, lists, tokens=tokens, config=configs.StageConfig(256, 32, 4, 2), interpret=True
    )
    nowhere = jnp.setdiff1d(jnp.arange(d_ff), lists.neurons[listed[:, 0]])[0]
    neurons = jnp.where(listed[:, 0], lists.neurons, nowhere)
    found = pallas_mosaic_gpu_down.panel_down(
        [(h, w.at[nowhere].set(jnp.nan)) for h, w in operands],
        lists._replace(neurons=neurons),
        tokens=tokens,
        steps=PlainSteps(tile, GATHERED_SLICE, CHUNK),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # has no public name

    assert not get_races().races_found
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(expected.astype(jnp.float32)).all()
    assert (np.asarray(expected) != 0).any()


def launches(config, backend="mosaic_gpu", terms=1, **how):
    """The kernel of a call of 300 tokens: Triton's, and Mosaic GPU's."""
    lists = jax.eval_shape(partial(lists_of, [100, 300, 7], 384))
    h, w = jax.ShapeDtypeStruct((640, PANEL), "bfloat16"), jax.ShapeDtypeStruct((384, 192), "bfloat16")
    down = partial(gathered.panel_down, tokens=300, config=config, backend=backend, **how)
    return panel_launches(lowered(down, [(h, w)] * terms, lists))


def test_the_implementation_of_a_call():
    x = jax.ShapeDtypeStruct((65536, 2048), "bfloat16")
    config = on_h200(partial(configs.heuristic, x, 128, HOPPER))
    assert launches(config) == ([], ["panel_down"])
    assert launches(config, terms=2, gradient=True) == ([], ["panel_dx"])
    assert launches(config, backend="triton") == (["panel_down"], [])
    assert launches(dataclasses.replace(config, gathered_backend="triton")) == (["panel_down"], [])
    narrow = {stage: dataclasses.replace(getattr(config, stage), tile_k=16) for stage in ("down", "dx")}
    assert launches(dataclasses.replace(config, **narrow)) == (["panel_down"], [])


@pytest.mark.parametrize(
    ("options", "kind", "on_mosaic"),
    [
        (FFNOptions(format="panel"), "gated", ["panel_gate", "panel_up", "panel_down"]),
        (FFNOptions(format="panel"), "non-gated", ["panel_gate", "panel_down"]),
        (FFNOptions(format=Panel(block_tokens=8192)), "gated", ["panel_gate"]),
    ],
    ids=str,
)
def test_a_forward_call(options, kind, on_mosaic):
    """In blocks of tokens, all of which write to one y, it is Triton's."""
    triton, mosaic = panel_launches(
        lowered(partial(call, options=options), shapes(16500, 1984, 5640, kind=kind))
    )
    assert set(mosaic) == set(on_mosaic)
    assert ("panel_down" in triton) != ("panel_down" in on_mosaic)


def test_the_gradient_of_a_layer_without_a_gate():
    """One term, and h from Triton's up projection."""
    options, inputs = FFNOptions(format="panel"), shapes(2100, 192, 528, kind="non-gated")
    step = partial(differentiate, dl1=1.0, apply=partial(call, options=options))
    triton, mosaic = panel_launches(lowered(step, inputs, jax.ShapeDtypeStruct((2100, 192), jnp.float32)))
    assert mosaic == ["panel_gate", "panel_down", "panel_dx"]
    assert {"panel_up", "panel_dh"} < {*triton}
