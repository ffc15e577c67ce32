"""The Blackwell GEMM: lowered for CUDA under the formats, and run by an interpreter that sees races.

PTX epilogues need a GPU; here they are in jnp. What they do in PTX: test_gate_epilogues.py.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from lowering import B200, lowered, shapes
from op_checks import call, differentiate
from plain_gates import pack, write

from pallas_kernels import FFNOptions, device
from pallas_kernels.common import blackwell_gemm, tile_walk
from pallas_kernels.common.tile_walk import HALVES, TILE_M
from pallas_kernels.panel import pallas_mosaic_gpu as panel
from pallas_kernels.twell import pallas_mosaic_gpu as twell

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
GATES = {
    "twell": partial(twell.gate_pack, tile=256, slots=32),
    "twell, narrow tiles": partial(twell.gate_pack, tile=128, slots=32),
    "panel": panel.gate_panel,
    "panel, tiles of few tokens": partial(panel.gate_panel, tile=176),
}
interpreted = pytest.mark.skipif(
    VERSION < (0, 11, 2), reason="JAX interprets Mosaic GPU kernels from 0.11.2 on"
)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize(("tokens", "d_model"), [(65536, 2048), (1031, 64)], ids=str)
def test_lowers(gate, tokens, d_model):
    x, w = (jax.ShapeDtypeStruct((n, d_model), jnp.bfloat16) for n in (tokens, 5640))
    text = lowered(gate, x, w, gpu=B200)
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    assert "tcgen05" in text
    assert "wgmma" not in text


@pytest.mark.parametrize("format", ["panel", "twell"])
def test_a_call_by_name(format):
    """One gate for forward and backward."""
    options = FFNOptions(format=format, backend="mosaic_gpu")
    step = partial(differentiate, dl1=1.0, apply=partial(call, options=options))
    dy = jax.ShapeDtypeStruct((1031, 64), jnp.float32)
    text = lowered(step, shapes(1031, 64, 520), dy, gpu=B200)
    assert len(re.findall(rf"\\00{format}_gate_mosaic_gpu\\", text)) == 1


@pytest.fixture
def few_cores(monkeypatch):
    """More tiles than programs, in rounds, so that a program has several tiles and an odd number of them."""
    monkeypatch.setattr(tile_walk, "_TILES_EACH", 3)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", B200.device_kind, 100, 2))


def no_races():
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # has no public name

    assert not get_races().races_found


def integers(shape, seed):
    """Such that sums of their products are exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-1, 2, shape), jnp.bfloat16)


@interpreted
@pytest.mark.usefixtures("few_cores")
@pytest.mark.parametrize(
    ("sizes", "stages", "tile"),
    [((389, 192, 264), 2, 128), ((389, 192, 264), 4, 80), ((264, 64, 128), 2, 128)],
    ids=str,
)
def test_every_row_and_column(sizes, stages, tile):
    """A ring that goes around a program's tiles; a D of one slice; a cut row block, of a number of rows that
    copies do not count in; columns that leave tensor memory in two steps."""
    tokens, d_model, d_ff = sizes
    rows, columns = (pl.cdiv(n, m) * m for n, m in ((tokens, TILE_M), (d_ff, tile)))
    x, w = integers((tokens, d_model), 0), integers((d_ff, d_model), 1)

    def store(acc, place, out):
        for warp in range(4):
            first = place.row + warp * place.rows.warp_step
            out[pl.ds(first, 16), pl.ds(place.tile_id * tile, tile)] = acc[16 * warp : 16 * warp + 16] + 1

    (y,) = blackwell_gemm.gemm(
        store,
        x,
        w,
        out_type=[jax.ShapeDtypeStruct((rows, columns), jnp.float32)],
        tile=tile,
        stages=stages,
        scratch={},
        name="plus_one",
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    no_races()
    product = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    whole = np.pad(product, ((0, rows - tokens), (0, columns - d_ff)))  # past the edge there are zeros
    np.testing.assert_array_equal(np.asarray(y) - 1, whole)


@interpreted
@pytest.mark.usefixtures("few_cores")
def test_panels(monkeypatch):
    """The whole gate but for its PTX, where neither a panel nor a tile of columns is whole."""
    monkeypatch.setattr(panel, "_write", write)
    tokens, d_ff, tile = 261, 168, 64
    x, w = integers((tokens, 64), 0), integers((d_ff, 64), 1)
    found = panel.gate_panel(x, w, tile=tile, interpret=plgpu.InterpretGPUParams(detect_races=True))
    no_races()
    gate = np.zeros((3 * TILE_M, 3 * tile), np.float32)
    gate[:tokens, :d_ff] = np.maximum(np.asarray(x, np.float32) @ np.asarray(w, np.float32).T, 0)
    hits = (gate > 0).reshape(-1, 16, 3 * tile).sum(axis=1)
    np.testing.assert_array_equal(found.hits, hits)
    np.testing.assert_array_equal(found.nnz.sum(axis=0), (gate > 0).sum(axis=1))
    by_panel = gate.reshape(3, TILE_M, -1).swapaxes(1, 2)
    is_hit = hits.repeat(16, axis=0).reshape(by_panel.swapaxes(1, 2).shape).swapaxes(1, 2) > 0
    np.testing.assert_array_equal(np.asarray(found.values, np.float32)[is_hit], by_panel[is_hit])


@interpreted
@pytest.mark.usefixtures("few_cores")
def test_words(monkeypatch):
    monkeypatch.setattr(twell, "_pack", pack)
    tokens, d_ff, tile = 133, 392, 128
    x, w = integers((tokens, 64), 0), integers((d_ff, 64), 1)
    packed, hits = twell.gate_pack(
        x, w, tile=tile, slots=tile, interpret=plgpu.InterpretGPUParams(detect_races=True)
    )
    no_races()
    gate = np.maximum(np.asarray(x, np.float32) @ np.asarray(w, np.float32).T, 0)
    np.testing.assert_array_equal(hits, (gate > 0).sum(axis=0))
    np.testing.assert_array_equal(np.asarray(packed.to_dense(), np.float32), gate)


def coordinates(layout, rows, columns):
    """Row and column of what each thread's registers hold: (warps, lanes, *registers, values of one, 2)."""
    found = np.stack(np.indices((rows, columns)), axis=-1)
    for tile in layout.tiling.tiles:
        lead = found.ndim - 1 - len(tile)
        split = [part for n, t in zip(found.shape[lead:-1], tile, strict=True) for part in (n // t, t)]
        axes = [
            *range(lead),
            *range(lead, lead + 2 * len(tile), 2),
            *range(lead + 1, lead + 2 * len(tile), 2),
        ]
        found = found.reshape(*found.shape[:lead], *split, 2).transpose(*axes, -1)
    n_dims = found.ndim - 1
    warp, *lanes = (dim % n_dims for dim in (*layout.warp_dims, *layout.lane_dims))
    registers = layout.registers_shape((rows, columns))
    found = np.moveaxis(found, (warp, *lanes), (0, 1, 2))
    return found.reshape(4, 32, *registers, -1, 2)


def test_halves_are_rows_of_wgmma():
    """An epilogue's threads have the rows that a `Place` says, in the order that `hopper_gemm.values` has."""
    columns, rows = 48, blackwell_gemm._HALVES
    whole = coordinates(mgpu.TCGEN05_LAYOUT, TILE_M, columns)
    of_pieces = slice(0, 4), slice(4, None)  # of groups of 8 columns
    expected = coordinates(mgpu.WGMMA_LAYOUT, TILE_M // HALVES, columns)
    for warp in range(4):
        for lane in range(32):
            pieces = [whole[warp, lane][:, piece] for piece in of_pieces]
            halves = blackwell_gemm.registers_of_halves(pieces)
            for half, found in enumerate(halves):
                moved = expected[warp, lane] + [half * rows.step + warp * (rows.warp_step - 16), 0]
                np.testing.assert_array_equal(found, moved)
