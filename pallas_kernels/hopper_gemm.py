"""A persistent GEMM for Hopper whose epilogue is the caller's: TMA, wgmma and warp specialisation on Mosaic GPU.

Why it exists. Triton's GEMM loads through the threads that also compute and runs some 15 % behind a GEMM fed by the
copy engine. Here one warpgroup feeds a ring of shared-memory stages and two compute, each 64 rows of a tile;
programs are persistent, so the next tile's loads run while this one's epilogue does. The gate stages of all sparse
formats are this loop and an epilogue of their own, which no other GEMM of JAX lets them have.

Work: 2 M F D FLOPs. Bytes: (M D + F D) read at the least, and what the epilogue writes.

Numerics. f32 accumulation of products of 16-bit values.

Limits. Compute capability 9.0; bf16 or f16; M and F multiples of 8 and D of 64, the shared-memory tiles that TMA
fills. Tiles past the edge of M or F hold zeros, except that the columns past F of a row with a NaN or an infinity may
be NaN: an epilogue must not let them through.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import device

WARPGROUP = 128
"""Threads of a warpgroup."""
ROWS = 64
"""Rows of a tile that one computing warpgroup holds: wgmma's M."""
COMPUTE_WARPGROUPS = 2
TILE_M = ROWS * COMPUTE_WARPGROUPS
TILE_K = 64

_GROUP_M = 8
_PRODUCER_REGISTERS = 40


class Place(NamedTuple):
    """Where a computing warpgroup's part of a tile stands: its row block, warpgroup, first row and tile of columns."""

    row_block: jax.Array
    warpgroup: jax.Array
    row: jax.Array
    tile_id: jax.Array


def unsupported_reason(tokens: int, d_model: int, d_ff: int, dtype: jnp.dtype) -> str | None:
    """What of a product's shape this GEMM cannot do, in one sentence; None if it can."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"backend='mosaic_gpu' multiplies bfloat16 or float16; got {jnp.dtype(dtype).name}"
    if tokens % 8 or d_ff % 8 or d_model % TILE_K:
        return (
            f"backend='mosaic_gpu' needs tokens and F to be multiples of 8 and D of {TILE_K}; "
            f"got {tokens} tokens, F={d_ff}, D={d_model}"
        )
    return None


def gemm(
    epilogue: Callable[..., None],
    x: jax.Array,
    w: jax.Array,
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    tile: int,
    stages: int,
    scratch: Mapping[str, Any],
) -> Sequence[jax.Array]:
    """Runs ``x W^T`` for x (M, D) and w (F, D) and gives each tile to an epilogue.

    Args:
      epilogue: called as ``epilogue(acc, place, *outputs, **scratch)`` by each computing warpgroup, with its (64,
        tile) f32 part of the product in wgmma's layout, a `Place`, and the whole outputs in global memory.
      out_type: shapes of the outputs.
      tile: columns of a tile.
      stages: slices of D in flight.
      scratch: shared memory of each warpgroup, by name: the leading axis of each is the warpgroup's.
    """
    programs = min(device.current().cores or 1, pl.cdiv(w.shape[0], tile) * pl.cdiv(x.shape[0], TILE_M))
    return plgpu.kernel(
        partial(_kernel, epilogue=epilogue, outputs=len(out_type), tile=tile, stages=stages, scratch=scratch),
        out_type=tuple(out_type),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, w)


def _kernel(x_gmem, w_gmem, *outputs_gmem, epilogue, outputs, tile, stages, scratch):
    (tokens, d_model), d_ff = x_gmem.shape, w_gmem.shape[0]
    n_blocks, n_tiles = pl.cdiv(tokens, TILE_M), pl.cdiv(d_ff, tile)
    assert len(outputs_gmem) == outputs

    def pipeline(body, compute_context):
        swizzle = 128
        transforms = (
            plgpu.TilingTransform((8, swizzle // x_gmem.dtype.itemsize)),
            plgpu.SwizzleTransform(swizzle),
        )
        operand = partial(plgpu.BlockSpec, index_map=lambda k: (0, k), transforms=transforms, delay_release=1)
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(pl.cdiv(d_model, TILE_K),),
            in_specs=[operand((TILE_M, TILE_K)), operand((tile, TILE_K))],
            memory_registers=_PRODUCER_REGISTERS,
            wg_axis="warpgroup",
            num_compute_wgs=COMPUTE_WARPGROUPS,
            max_concurrent_steps=stages,
            compute_context=compute_context,
        )

    def nothing(*_, **__):
        pass

    ring = pipeline(nothing, nothing).get_allocations(x_gmem, w_gmem)
    multiplied = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS)

    @partial(pl.run_scoped, ring=ring, multiplied=multiplied, **scratch, collective_axes="warpgroup")
    def _program(ring, multiplied, **scratch_refs):
        warpgroup = lax.axis_index("warpgroup")

        @plgpu.nd_loop((n_blocks * n_tiles,), collective_axes="program")
        def _tile(loop):
            row_block, tile_id = plgpu.planar_snake(loop.index[0], (n_blocks, n_tiles), 0, _GROUP_M)
            row = row_block * TILE_M + warpgroup * ROWS

            # The pipeline does not wait for the last product of the tile before (delay_release): this does, lest
            # the next loads overwrite the slice that it reads.
            @pl.when((warpgroup == COMPUTE_WARPGROUPS) & (loop.local_index > 0))
            def _():
                plgpu.barrier_wait(multiplied)

            def multiply(_, x_smem, w_smem, acc):
                plgpu.wgmma(acc, x_smem.at[pl.ds(warpgroup * ROWS, ROWS)], w_smem.T)
                plgpu.wgmma_wait(1)
                return acc

            def compute(run_pipeline):
                def with_accumulator(acc):
                    run_pipeline(acc)
                    product = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
                    plgpu.barrier_arrive(multiplied)
                    own = {key: ref.at[warpgroup] for key, ref in scratch_refs.items()}
                    epilogue(product, Place(row_block, warpgroup, row, tile_id), *outputs_gmem, **own)

                pl.run_scoped(with_accumulator, plgpu.ACC((ROWS, tile), jnp.float32))

            pipeline(multiply, compute)(
                x_gmem.at[pl.ds(row_block * TILE_M, TILE_M), :],
                w_gmem.at[pl.ds(tile_id * tile, tile), :],
                allocations=ring,
            )


# -- what an epilogue in PTX needs: a thread does what it finds in its own registers ------------------------------

ACTIVE_ABOVE = {"bfloat16": "0f00008000", "float16": "0f33000000"}
"""Half of a type's least subnormal, as a PTX constant: an f32 gate above it rounds to an active one."""
CONVERT = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}
"""PTX that rounds two f32 values to a type and packs them, the second operand into the low half."""


def address(ref: ir.Value, bits: int) -> ir.Value:
    """The address of a reference's first element, for PTX: 64 bits for global memory, 32 for shared."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), mgpu_utils.memref_ptr(ref))


def assemble(text: str, operands: Sequence[ir.Value], constraints: str) -> None:
    """Runs PTX whose operands are $0, $1, ...; it gives nothing back."""
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)


def values(acc: Any) -> list[ir.Value]:
    """A thread's tile / 2 accumulators: first those of its upper row, then those eight rows below, by ascending column.

    The k-th of a row stands in column ``8 (k / 2) + 2 (lane % 4) + k % 2`` of the tile; a thread's upper row is
    ``16 warp + lane / 4``.
    """
    i32 = ir.IntegerType.get_signless(32)
    pairs = acc.registers.reshape(-1, 2)  # (tile / 8 groups of columns, 2 rows) of two neighbouring columns
    return [
        llvm.extractelement(pair, mgpu_utils.c(nth, i32))
        for half in range(2)
        for pair in pairs[:, half]
        for nth in range(2)
    ]
