"""The gathered products on Mosaic GPU, where there is no GPU: how lists are cut into their tiles, when a call
takes them, their lowering, and their warpgroups' protocol under an interpreter that sees races."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from lowering import lowered, panel_launches, shapes
from op_checks import call
from plain_gathered import PlainDh, PlainUp

from pallas_kernels import FFNOptions, Panel, device, sparse_ffn, tuning
from pallas_kernels.activations import RELU, Rule
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import gathered, hopper_gathered, pallas_mosaic_gpu_dh, pallas_mosaic_gpu_up
from pallas_kernels.panel.config import GATHERED_TILE
from pallas_kernels.panel.pallas_triton import panel_up
from pallas_kernels.panel.pallas_triton_backward import panel_dh
from pallas_kernels.panel.pallas_triton_counts import GatePanel, count_active
from pallas_kernels.panel.pallas_triton_lists import build_lists

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
HOPPER = device.Device("gpu", "NVIDIA H200", 90, 132)
PANEL, SEGMENTS, PAD = 128, 8, 32
SIZES = (16512, 1984, 5640)
"""Of calls, as no other test has: what was traced for them has the configs of this file."""


def gates_and_lists(counts, d_ff, dtype, tile=GATHERED_TILE):
    """Gates of panels with so many active neurons, in some of their segments, and lists cut into tiles."""
    rng = np.random.default_rng(0)
    hits = np.zeros((len(counts), SEGMENTS, d_ff), np.uint8)
    values = rng.integers(-2, 3, (len(counts), d_ff, PANEL)).clip(min=0)
    for panel, count in enumerate(counts):
        neurons = rng.permutation(d_ff)[:count]
        hits[panel][:, neurons] = rng.integers(0, 3, (SEGMENTS, count))
        hits[panel][rng.integers(0, SEGMENTS, count), neurons] = 1
    nnz = np.zeros((1, len(counts) * PANEL), np.int32)
    gate = GatePanel(jnp.asarray(values, dtype), jnp.asarray(hits.reshape(-1, d_ff)), jnp.asarray(nnz))
    active = count_active(gate, d_ff=d_ff, interpret=True)
    np.testing.assert_array_equal(active.neurons, counts)
    return gate, build_lists(active, tokens=1, chunk=128, tile=tile, interpret=True)[0]


def test_lists_in_tiles():
    counts = [0, 192, 193, 1, 0, 384, 577]
    gate, lists = gates_and_lists(counts, 600, "bfloat16")
    n_tiles = [-(-count // GATHERED_TILE) for count in counts]
    expected = [4 * panel + nth for panel, n in enumerate(n_tiles) for nth in range(n)]
    assert lists.n_tiles.tolist() == [len(expected)]
    assert lists.tiles.shape == (7 * 4,)
    assert lists.tiles[: len(expected)].tolist() == expected
    active = count_active(gate, d_ff=600, interpret=True)
    for room, n_tiles in ((13, len(expected)), (12, 0)):
        cut, _ = build_lists(active, tokens=1, chunk=128, room=room, tile=GATHERED_TILE, interpret=True)
        assert cut.n_tiles.tolist() == [n_tiles]
    without, _ = build_lists(active, tokens=1, chunk=128, interpret=True)
    assert without.tiles is None
    assert without.n_tiles is None


@pytest.mark.parametrize("pad", [16, 32, 64])
def test_tiles_cover_every_count(pad):
    """A panel's tiles have one width and a neuron each at least, and hold its slots up to the pad once."""
    most = 30
    counts = jnp.arange(1, most * GATHERED_TILE + 1)
    tiles = jnp.arange(len(counts) * most)
    in_use = np.asarray(tiles % most < -(-counts // GATHERED_TILE)[tiles // most])

    @jax.jit
    @jax.vmap
    def look_up(number):
        n_tiles = jnp.full((1,), len(tiles))
        offsets = jnp.zeros((len(counts) + 1,), jnp.int32)
        return hopper_gathered.place_of(tiles, n_tiles, counts, offsets, number, pad=pad)

    place = jax.tree.map(np.asarray, look_up(tiles))
    width = np.asarray(hopper_gathered.WIDTHS)[place.code]
    assert (place.valid[in_use] >= 1).all()
    assert (width >= place.rows)[in_use].all()
    np.testing.assert_array_equal(place.slot, tiles % most * width)
    covered = np.bincount(place.panel[in_use], place.valid[in_use], len(counts))
    np.testing.assert_array_equal(covered, counts)
    written = np.bincount(place.panel[in_use], place.rows[in_use], len(counts))
    np.testing.assert_array_equal(written, -(-np.asarray(counts) // pad) * pad)


def test_a_number_past_the_tiles_is_in_bounds():
    """Behind the tiles in use nothing was written."""
    tiles, counts = jnp.full((8,), 1 << 30), jnp.zeros((2,), jnp.int32)
    found = hopper_gathered.place_of(
        tiles, jnp.zeros((1,), jnp.int32), counts, jnp.zeros((3,), jnp.int32), 11, pad=PAD
    )
    assert [int(field) for field in found] == [0, 0, 0, 0, 0]


# -- the kernel --------------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two widths."""
    tile = 64
    for module in (hopper_gathered, pallas_mosaic_gpu_up, pallas_mosaic_gpu_dh):
        monkeypatch.setattr(module, "GATHERED_TILE", tile)
    monkeypatch.setattr(hopper_gathered, "WIDTHS", (32, 64))
    return tile


@pytest.mark.skipif(VERSION < (0, 11, 2), reason="JAX interprets Mosaic GPU kernels from 0.11.2 on")
@pytest.mark.parametrize(
    ("cores", "d_model", "dtype", "rule", "scale"),
    [(2, 384, "bfloat16", RELU, 0.25), (5, 64, "float16", Rule(rectified_up=True), None)],
    ids=str,
)
def test_the_protocol_under_the_interpreter(cores, d_model, dtype, rule, scale, small_tiles, monkeypatch):
    """Programs with several tiles, one and none; a tile of more slices than the ring holds, and of fewer; a
    panel of no neuron; a call that ends within a panel. To the bit what Triton's gives, of whole numbers."""
    counts, d_ff, cut = [70, 40, 0, 1], 88, 5
    monkeypatch.setattr(device, "current", lambda: dataclasses.replace(HOPPER, cores=cores))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-1, 2, (len(counts) * PANEL - cut, d_model)), dtype)
    w = jnp.asarray(rng.integers(-1, 2, (d_ff, d_model)), dtype)
    gate, lists = gates_and_lists(counts, d_ff, dtype, small_tiles)
    gate = gate._replace(values=gate.values.at[-1, :, -cut:].set(0))
    config = configs.StageConfig(128, 64, 4, 2)
    scale = None if scale is None else jnp.full((1,), scale, jnp.float32)
    interpreter = plgpu.InterpretGPUParams(detect_races=True)
    expected = panel_up(gate, lists, x, w, config=config, rule=rule, keep=True, interpret=True)
    found = pallas_mosaic_gpu_up.panel_up(
        gate, lists, x, w, pad=PAD, rule=rule, keep=True, steps=PlainUp(rule), interpret=interpreter
    )
    no_races()
    kept = expected.gate, expected.up
    wanted = panel_dh(*kept, lists, x, w, scale, config=config, rule=rule, interpret=True)
    steps = PlainDh(rule, small_tiles, scaled=scale is not None)
    gradients = pallas_mosaic_gpu_dh.panel_dh(
        *kept, lists, x, w, scale, pad=PAD, rule=rule, steps=steps, interpret=interpreter
    )
    no_races()
    pairs = [(found.h, expected.h), (found.gate, expected.gate), *zip(gradients, wanted, strict=True)]
    # Where a gate is zero, the projection means nothing.
    pairs.append(tuple(jnp.where(expected.gate > 0, hidden.up, 0) for hidden in (found, expected)))
    for start, count in zip(np.asarray(lists.offsets), counts, strict=False):
        slots = slice(start, start + -(-count // PAD) * PAD)
        for mine, triton in pairs:
            np.testing.assert_array_equal(mine[slots], triton[slots])
    np.testing.assert_allclose(found.l1, expected.l1, rtol=1e-6)
    assert expected.l1 > 0


def no_races():
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # has no public name

    assert not get_races().races_found


# -- when, and what a call becomes -------------------------------------------------------------------------


def chosen(
    config, *, backend="mosaic_gpu", gated=True, d_model=2048, d_ff=5632, in_blocks=False, by_token=False
):
    x, w = (jax.ShapeDtypeStruct((n, d_model), "bfloat16") for n in (65536, d_ff))
    w = w if gated else None
    return gathered.implementation(config, backend, x, w, in_blocks=in_blocks, by_token=by_token)


def test_the_implementation_of_a_call(monkeypatch):
    x, w = (jax.ShapeDtypeStruct((n, 2048), "bfloat16") for n in (65536, 5632))
    config = configs.heuristic(x, 128, HOPPER)
    assert config.gathered_backend == "mosaic_gpu"
    assert chosen(config) == "hopper"
    newer = dataclasses.replace(HOPPER, capability=103)
    assert configs.heuristic(x, 128, newer).gathered_backend == "triton"
    f32 = jax.ShapeDtypeStruct(x.shape, "float32")
    assert configs.heuristic(f32, 128, HOPPER).gathered_backend == "triton"
    for other in (
        {"backend": "triton"},
        {"backend": "interpret"},
        {"gated": False},
        {"in_blocks": True},
        {"by_token": True},
        {"d_model": 1 << 15, "d_ff": (1 << 16) + 8},
    ):
        assert chosen(config, **other) == "triton", other
    assert chosen(config, d_model=1 << 15, d_ff=1 << 16) == "hopper"
    for stage in ("down", "dx"):
        slices = {stage: dataclasses.replace(getattr(config, stage), tile_k=128)}
        assert chosen(dataclasses.replace(config, **slices)) == "triton"
    monkeypatch.setattr(tuning, "lookup", lambda *arguments: {"gathered_backend": "triton"})
    assert configs.choose(x, w, 128, HOPPER) == dataclasses.replace(config, gathered_backend="triton")
    with pytest.raises(ValueError, match="gathered_backend must be 'triton' or 'mosaic_gpu'; got 'xla'"):
        dataclasses.replace(config, gathered_backend="xla")


@pytest.mark.parametrize(
    ("options", "kind", "on_mosaic"),
    [
        (FFNOptions(format="panel", backend="mosaic_gpu"), "gated", True),
        (FFNOptions(activation="drelu"), "gated", True),
        (FFNOptions(format="panel", backend="triton"), "gated", False),
        (FFNOptions(format="panel"), "non-gated", False),
        (FFNOptions(format=Panel(block_tokens=8192)), "gated", False),
    ],
    ids=str,
)
def test_a_forward_call(options, kind, on_mosaic):
    """One kernel beside the gate's, and nothing more; where it cannot be, Triton's."""
    text = lowered(partial(call, options=options), shapes(*SIZES, kind=kind))
    triton, mosaic = panel_launches(text)
    assert ("panel_up" in triton) != on_mosaic
    if on_mosaic:
        assert mosaic == ["panel_gate", "panel_up", "panel_down"]
        assert sorted(triton) == ["panel_count", "panel_lists"]


def test_a_training_call_of_layers_in_a_loop():
    """Mapped weights, as of experts, each layer rematerialised in a ``scan``: the forward's gate, up and down
    projection, and in the backward the first two again, dh and dx."""
    options = FFNOptions(format="panel", backend="mosaic_gpu")
    x, *weights = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 256, 192), *[(3, 2, 520, 192)] * 3)
    )

    @jax.checkpoint
    def layer(x, weights):
        y, stats = sparse_ffn(x, *weights, options=options)
        return y, stats.l1

    @jax.vmap
    def objective(x, *weights):
        y, l1 = jax.lax.scan(layer, x, weights)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(l1)

    step = jax.grad(lambda *arguments: jnp.sum(objective(*arguments)), argnums=(0, 1, 2, 3))
    text = lowered(step, x, *weights)
    triton, mosaic = panel_launches(text)
    again = ["panel_gate", "panel_up"]
    assert sorted(mosaic) == sorted([*again, "panel_down", *again, "panel_dh", "panel_dx"])
    assert not {*mosaic} & {*triton}


def test_a_training_call_whose_tokens_are_mapped():
    """Each row of tokens has an l1: Triton's, but for dx. Nobody asks for y."""
    options = FFNOptions(format="panel", backend="mosaic_gpu")

    def objective(x, *weights):
        y, stats = jax.vmap(lambda x: sparse_ffn(x, *weights, options=options))(x)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(stats.l1)

    weight = jax.ShapeDtypeStruct((520, 192), jnp.bfloat16)
    text = lowered(jax.grad(objective), jax.ShapeDtypeStruct((3, 256, 192), jnp.bfloat16), *[weight] * 3)
    triton, mosaic = panel_launches(text)
    assert mosaic == ["panel_gate", "panel_dx"]
    assert {"panel_up", "panel_dh"} < {*triton}
