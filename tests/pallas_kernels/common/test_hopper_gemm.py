"""The Hopper GEMM: lowered for CUDA under the formats, and run by an interpreter that sees races.

PTX epilogues need a GPU; here an epilogue in jnp shows who multiplies what, and when.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from lowering import lowered

from pallas_kernels import device
from pallas_kernels.common import hopper_gemm, tile_walk
from pallas_kernels.common.hopper_gemm import ROWS, TILE_M
from pallas_kernels.panel import pallas_mosaic_gpu as panel
from pallas_kernels.twell import pallas_mosaic_gpu as twell

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
GATES = {
    "twell": partial(twell.gate_pack, tile=256, slots=32),
    "twell, narrow tiles": partial(twell.gate_pack, tile=128, slots=32),
    "panel": panel.gate_panel,
    "panel, tiles of few tokens": partial(panel.gate_panel, tile=176),
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize(("tokens", "d_model"), [(65536, 2048), (1031, 64)], ids=str)
def test_lowers(gate, tokens, d_model):
    x, w = (jax.ShapeDtypeStruct((n, d_model), jnp.bfloat16) for n in (tokens, 5640))
    assert lowered(gate, x, w).count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.skipif(VERSION < (0, 11, 2), reason="JAX interprets Mosaic GPU kernels from 0.11.2 on")
@pytest.mark.parametrize(
    ("sizes", "stages", "tile"),
    [
        ((389, 192, 264), 2, 128),
        ((389, 192, 264), 4, 128),
        ((389, 192, 264), 3, 48),
        ((264, 64, 128), 2, 128),
    ],
    ids=str,
)
def test_every_row_and_column(monkeypatch, sizes, stages, tile):
    """More tiles than programs, so that a ring goes around them; two rounds of programs; a D of one slice;
    a cut row block, of a number of rows that copies do not count in; tiles of an odd number of swizzles."""
    tokens, d_model, d_ff = sizes
    cores = 4
    rows, columns = (pl.cdiv(n, m) * m for n, m in ((tokens, TILE_M), (d_ff, tile)))
    monkeypatch.setattr(tile_walk, "_TILES_EACH", 2)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", 90, cores))
    for_x, for_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(for_x, (tokens, d_model), jnp.bfloat16)
    w = jax.random.normal(for_w, (d_ff, d_model), jnp.bfloat16)

    def store(acc, place, out):
        out[pl.ds(place.row, ROWS), pl.ds(place.tile_id * tile, tile)] = acc + 1

    (y,) = hopper_gemm.gemm(
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
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # has no public name

    assert not get_races().races_found
    product = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    whole = np.pad(product, ((0, rows - tokens), (0, columns - d_ff)))  # past the edge there are zeros
    # What an epilogue gets is rounded to the type of x.
    np.testing.assert_allclose(np.asarray(y) - 1, whole, rtol=float(jnp.finfo(x.dtype).eps), atol=1e-3)
