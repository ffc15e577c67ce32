"""A persistent GEMM for Hopper with the caller's epilogue: TMA, wgmma and warp specialisation on Mosaic GPU.

Why it exists. Triton's GEMM loads through the threads that also compute and runs some 15 % behind a GEMM fed
by the copy engine. Here two warpgroups multiply, each 64 rows of a tile, out of a ring of shared-memory
stages that goes around over all tiles of a persistent program. The gate stages of all sparse formats are this
loop and an epilogue of their own, which no other GEMM of JAX lets them have.

Who does what. Two warpgroups multiply; they leave a rounded tile in shared memory and go on with the next
one, and the third warpgroup runs the epilogues. So the tensor cores do not idle while a tile is packed.

What else was tried, on one NVIDIA H100 at D = 2048 and F = 5632, as multiples of XLA's bare product timed in
turn: the gates of PanelELL and of TwELL at 65,536 tokens, and PanelELL's at 524,288.

    this design                                                     1.02 to 1.08   1.05           1.11
    one round of programs for all tiles                             1.00 to 1.09   1.01 to 1.08   1.17 to 1.23
    programs claim tiles from a counter                             1.08 to 1.12   1.04 to 1.14   1.15
    those who multiply pack too; a pipeline that drains at a tile   1.11           1.02 to 1.17
    the same; a ring over all tiles                                 1.11           1.10
    the same; one of the two lags                                   1.10           1.15
    the same; two programs share loads                              1.13           1.08
    each of the two has a tile of its own                           1.29           1.36

A fourth warpgroup that only loads leaves too few registers for products of 256 columns. The bare GEMM for
Hopper among JAX's own examples takes 1.04 to 1.10 in a run in which this one took 1.08. Of rounds of 22,
43, 64 and 86 tiles a program, 64 were best on each of two inputs and at 524,288 tokens.

Work: 2 M F D FLOPs. Bytes: (M D + F D) read at the least, and what the epilogue writes. Copies describe x in
groups of 8 rows, so where M is no multiple of 8, x is padded by up to 7 rows of zeros. That copy moves
4 M D bytes (0.54 GB at M 65,536 and D 2048, about 0.2 ms on Hopper), unless XLA pads while it makes x.

Numerics. f32 accumulation of products of 16-bit values.

Limits. Compute capability 9.0; bf16 or f16; F a multiple of 8 and D of 64, the shared-memory tiles that TMA
fills. Tiles past the edge of M or F hold zeros, or NaN where the row of x or of w that they share has a
NaN or an infinity: an epilogue must let neither rows past M nor columns past F through.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import device
from pallas_kernels.common import tile_walk
from pallas_kernels.common.hopper_ring import Ring, launch
from pallas_kernels.common.tile_walk import HALF_ROWS, HALVES, TILE_M, HalfRows, Place, TileWalk

WARPGROUP = 128
"""Threads of a warpgroup."""
ROWS = HALF_ROWS
"""Rows of a tile that one computing warpgroup holds: wgmma's M."""
COMPUTE_WARPGROUPS = HALVES
TILE_K = 64
_ROW_GROUP = 8
"""Rows of a tile of shared memory: what copies count the rows of x and w in."""
_HALVES = HalfRows(step=ROWS, warp_step=ROWS // 4)
_SHARED_MEMORY = 224 * 1024
_MOST_STAGES = 8
# A thread of the first two holds 128 accumulators; all three warpgroups together fit a core.
_MULTIPLY_REGISTERS, _PACK_REGISTERS = 176, 152


def unsupported_reason(d_model: int, d_ff: int, dtype: jnp.dtype) -> str | None:
    """What of a product's shape this GEMM cannot do, in one sentence; None if it can."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"backend='mosaic_gpu' multiplies bfloat16 or float16; got {jnp.dtype(dtype).name}"
    if d_ff % _ROW_GROUP or d_model % TILE_K:
        return (
            f"backend='mosaic_gpu' needs F to be a multiple of {_ROW_GROUP} and D of {TILE_K}; "
            f"got F={d_ff}, D={d_model}"
        )
    return None


def stages_for(tile: int, scratch_bytes: int = 0) -> int:
    """Slices of D that fit shared memory beside half a tile and an epilogue's scratch."""
    slice_bytes = 2 * TILE_K * (TILE_M + tile)
    return min((_SHARED_MEMORY - 2 * ROWS * tile - scratch_bytes) // slice_bytes, _MOST_STAGES)


def gemm(
    epilogue: Callable[..., None],
    x: jax.Array,
    w: jax.Array,
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    tile: int,
    stages: int,
    scratch: Mapping[str, Any],
    name: str,
    interpret: Any = None,
) -> Sequence[jax.Array]:
    """Runs ``x W^T`` for x (M, D) and w (F, D) and gives each tile to an epilogue.

    Args:
      epilogue: called as ``epilogue(acc, place, *outputs, **scratch)`` by one warpgroup, with a (64, tile)
        half of a tile, rounded to the type of x and in f32 in wgmma's layout, a `Place`, and the whole
        outputs in global memory. Rows may be past the M of x.
      out_type: shapes of the outputs.
      tile: columns of a tile, a multiple of 16 up to 256.
      stages: slices of D in flight, at least 2.
      scratch: the epilogue's shared memory, by name.
      name: what profilers call it.
      interpret: what `plgpu.kernel` takes by this name.
    """
    x = jnp.pad(x, ((0, -x.shape[0] % _ROW_GROUP), (0, 0)))
    cores = device.current().cores or 1
    tiles = tile_walk.tiles_of(x.shape[0], w.shape[0], tile)
    kernel = partial(
        _kernel,
        epilogue=epilogue,
        outputs=len(out_type),
        tile=tile,
        stages=stages,
        scratch=scratch,
        cores=cores,
    )
    return launch(
        kernel,
        out_type=tuple(out_type),
        programs=tile_walk.programs(tiles, cores),
        warpgroups=COMPUTE_WARPGROUPS + 1,
        name=name,
        interpret=interpret,
    )(x, w)


def shared_transforms(dtype, columns=TILE_K):
    """How wgmma reads shared memory: in rows of one swizzle, of so many columns."""
    swizzle = columns * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((_ROW_GROUP, columns)), plgpu.SwizzleTransform(swizzle)


def _kernel(x_gmem, w_gmem, *outputs_gmem, epilogue, outputs, tile, stages, scratch, cores):
    """One loop over the slices of all tiles of a program, which each warpgroup walks at its own pace.

    Slices go around a `Ring`. Warpgroups 0 and 1 multiply the halves of a tile, and 1 also issues the copies;
    2, the packer, runs the epilogues. The barriers, and why nothing is overwritten while it is read, or read
    before it is written:

    full[stage]: both copies of a slice have arrived. Warpgroups 0 and 1 wait for it before they multiply.
    empty[stage]: warpgroups 0 and 1 have read a slice. They arrive when ``wgmma_wait(1)``, with the next
      product issued, says so, and for a tile's last slice when reading the accumulator has waited for all
      products. Warpgroup 1 waits for it right after its own arrival and only then copies slice n + stages
      over slice n: the product just issued keeps the tensor cores busy meanwhile. In the last round it waits
      too and copies nothing, so that every phase of a barrier is seen.
    granted[half], written[half]: one buffer takes both halves of a tile to the packer, in the order 0, 1, 0,
      1, ... A warpgroup stores its half once that is granted: at the very start, or when the packer has the
      half before it in registers. The packer loads a half once it is written. So one of the three owns the
      buffer at any time. The grant that follows the last half is warpgroup 0's, which waits for it with
      nothing to store.

    Nobody waits in a circle, since all wait for what is earlier in the order of slices and halves: a copy for
    the products of ``stages`` slices before; a product for its copies, which warpgroup 1 issued at least a
    slice ahead (stages > 1); a store for the half before to be taken; and the packer for a store.
    """
    (tokens, d_model), d_ff = x_gmem.shape, w_gmem.shape[0]
    n_slices = pl.cdiv(d_model, TILE_K)
    assert len(outputs_gmem) == outputs
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    walk = TileWalk.of(program, cores, tile_walk.tiles_of(tokens, d_ff, tile))
    n_all = walk.count * n_slices
    transforms = shared_transforms(x_gmem.dtype)
    tile_columns = min(tile & -tile, TILE_K)  # the widest swizzle whose columns divide a tile's

    @partial(
        pl.run_scoped,
        x_ring=plgpu.SMEM((stages, TILE_M, TILE_K), x_gmem.dtype, transforms=transforms),
        w_ring=plgpu.SMEM((stages, tile, TILE_K), w_gmem.dtype, transforms=transforms),
        buffer=plgpu.SMEM(
            (ROWS, tile), x_gmem.dtype, transforms=shared_transforms(x_gmem.dtype, tile_columns)
        ),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        granted=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        written=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        scratch_refs=dict(scratch),
        collective_axes="warpgroup",
    )
    def _program(x_ring, w_ring, buffer, full, empty, granted, written, scratch_refs):
        ring = Ring(full, empty, stages)

        def load(number, _=None):
            stage = ring.stage_of(number)
            row_block, tile_id = walk.place_of(lax.div(number, jnp.int32(n_slices)))
            columns = pl.ds(lax.rem(number, jnp.int32(n_slices)) * TILE_K, TILE_K)
            for gmem, first, slices in (
                (x_gmem, row_block * TILE_M, x_ring),
                (w_gmem, tile_id * tile, w_ring),
            ):
                rows = pl.ds(first, slices.shape[1])
                plgpu.copy_gmem_to_smem(gmem.at[rows, columns], slices.at[stage], full.at[stage])

        def release(number):
            ring.release(number)

            @pl.when(warpgroup == 1)
            def _():
                plgpu.barrier_wait(empty.at[ring.stage_of(number)])
                pl.when(number + stages < n_all)(partial(load, number + stages))

        def multiply():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")

            @pl.when(warpgroup == 1)
            def _():
                lax.fori_loop(0, jnp.minimum(n_all, stages), load, None)

            def multiply_tile(nth, _):
                first = nth * n_slices

                def operands(stage):
                    return x_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)], w_ring.at[stage].T

                def with_accumulator(acc):
                    product = ring.multiply(acc, first, n_slices, operands, release)
                    plgpu.barrier_wait(granted.at[warpgroup])
                    buffer[...] = product.astype(buffer.dtype)
                    plgpu.barrier_arrive(written.at[warpgroup])

                pl.run_scoped(with_accumulator, plgpu.ACC((ROWS, tile), jnp.float32))

            lax.fori_loop(0, walk.count, multiply_tile, None)
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(granted.at[0]))

        def pack():
            plgpu.set_max_registers(_PACK_REGISTERS, action="decrease")
            plgpu.barrier_arrive(granted.at[0])

            def pack_tile(nth, _):
                row_block, tile_id = walk.place_of(nth)

                def pack_half(half, _):
                    plgpu.barrier_wait(written.at[half])
                    product = plgpu.layout_cast(buffer[...].astype(jnp.float32), plgpu.Layout.WGMMA)
                    plgpu.barrier_arrive(granted.at[1 - half])
                    place = Place(row_block, half, row_block * TILE_M + half * ROWS, tile_id, _HALVES)
                    epilogue(product, place, *outputs_gmem, **scratch_refs)

                lax.fori_loop(0, COMPUTE_WARPGROUPS, pack_half, None)

            lax.fori_loop(0, walk.count, pack_tile, None)

        # A branch for each role, for ptxas to know whose registers are whose.
        lax.cond(warpgroup < COMPUTE_WARPGROUPS, multiply, pack)


# -- what an epilogue in PTX needs: a thread does what it finds in its own registers ------------------------

CONVERT = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}
"""PTX that rounds two f32 values to a type and packs them, the second operand into the low half."""


def constant(value: float) -> str:
    """An f32 number in PTX."""
    return f"0f{np.float32(value).view(np.uint32):08X}"


def address(ref: ir.Value, bits: int) -> ir.Value:
    """The address of a reference's first element, for PTX: 64 bits for global memory, 32 for shared."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), mgpu_utils.memref_ptr(ref))


def assemble(text: str, operands: Sequence[ir.Value], constraints: str, result: str = "!llvm.void") -> Any:
    """Runs PTX whose operands are $0, $1, ..., first those of its result, a value of an MLIR type."""
    return llvm.inline_asm(ir.Type.parse(result), operands, text, constraints, has_side_effects=True)


def values(acc: Any) -> list[ir.Value]:
    """A thread's tile / 2 accumulators: first those of its upper row, then those eight rows below, by
    ascending column.

    The k-th of a row stands in column ``8 (k / 2) + 2 (lane % 4) + k % 2`` of the tile; a thread's upper row
    is ``16 warp + lane / 4``.
    """
    i32 = ir.IntegerType.get_signless(32)
    pairs = acc.registers.reshape(-1, 2)  # (tile / 8 groups of columns, 2 rows) of two neighbouring columns
    return [
        llvm.extractelement(pair, mgpu_utils.c(nth, i32))
        for half in range(2)
        for pair in pairs[:, half]
        for nth in range(2)
    ]
