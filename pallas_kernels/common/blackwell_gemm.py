"""A persistent GEMM for Blackwell with the caller's epilogue: TMA, tcgen05 and tensor memory on Mosaic GPU.

Why it exists: as `hopper_gemm`, whose epilogues this GEMM runs. A tensor core of Blackwell reads both
operands from shared memory and accumulates in tensor memory, so products take no registers and one thread
issues them. This kernel has been interpreted, and compiled for a B200. It has not run on one, and nothing
here was measured.

Who does what. One warp copies, one warp multiplies, and two warpgroups, the packers, run epilogues, each for
every other tile. Tensor memory holds two accumulators of 256 columns, one for each packer. A packer takes
half of the rows to its registers, rounds and packs them, and then takes the other half, after which the next
tile may be multiplied into the accumulator.

Work and bytes: those of `hopper_gemm`. A slice of both operands is 48 KiB for 4.2 MFLOPs; two cores that
multiply one tile of 256 rows together (tcgen05's collective form) would read two thirds of that each. JAX's
interpreter does not run that form, so this kernel leaves it out.

Numerics. f32 accumulation of products of 16-bit values.

Limits. Compute capability 10.0; otherwise those of `hopper_gemm`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import device
from pallas_kernels.common import tile_walk
from pallas_kernels.common.hopper_gemm import TILE_K, shared_transforms
from pallas_kernels.common.hopper_ring import Ring, launch
from pallas_kernels.common.tile_walk import HALF_ROWS, HALVES, TILE_M, HalfRows, Place, TileWalk

CAPABILITY = 100
"""Compute capability times ten."""
_PACKERS = 2
_ACCUMULATOR_COLUMNS = 256
"""Of tensor memory for a tile: `_PACKERS` of them are all 512 that there are."""
_LOAD_COLUMNS = 64
"""Columns that a packer takes from tensor memory before it rounds them: a thread has no registers for 256
columns in f32."""
_HALVES = HalfRows(step=16, warp_step=32)
"""A warp reaches 32 rows of tensor memory: 16 of either half."""
_ROW_GROUP = 8
_SHARED_MEMORY = 226 * 1024  # of 227 KiB: barriers are in the last
_MOST_STAGES = 8
# All three warpgroups together fit the registers with which a kernel of 384 threads starts, 168 a thread.
_FEED_REGISTERS, _PACK_REGISTERS = 40, 232
# Axes of a thread's registers: a tile's groups of 8 columns, and a warp's groups of 8 rows.
_COLUMN_GROUPS, _ROW_GROUPS = 1, 4


def stages_for(tile: int, scratch_bytes: int = 0) -> int:
    """Slices of D that fit shared memory beside the scratch of two epilogues."""
    slice_bytes = 2 * TILE_K * (TILE_M + tile)
    return min((_SHARED_MEMORY - _PACKERS * scratch_bytes) // slice_bytes, _MOST_STAGES)


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
    """`hopper_gemm.gemm`, with the same arguments; each of two packers has a ``scratch`` of its own."""
    x = jnp.pad(x, ((0, -x.shape[0] % _ROW_GROUP), (0, 0)))
    cores = device.current().cores or 1
    kernel = partial(
        _kernel,
        epilogue=epilogue,
        tile=tile,
        stages=stages,
        scratch=scratch,
        cores=cores,
        half_of=_half_of if interpret is None else _plain_half_of,
    )
    return launch(
        kernel,
        out_type=tuple(out_type),
        programs=tile_walk.programs(tile_walk.tiles_of(x.shape[0], w.shape[0], tile), cores),
        warpgroups=1 + _PACKERS,
        name=name,
        interpret=interpret,
    )(x, w)


def _kernel(x_gmem, w_gmem, *outputs_gmem, epilogue, tile, stages, scratch, cores, half_of):
    """Loops over the tiles of a program, which the copying warp, the multiplying warp and the packers walk at
    their own pace: a packer takes every other tile. The barriers:

    full[stage]: both copies of a slice have arrived. The multiplier waits for it.
    empty[stage]: the product of a slice is done, and its operands were read: the tensor core says so itself.
      The copier waits for it before it copies slice n + stages over slice n.
    done[packer]: all products of a tile are done. Its packer waits for it.
    taken[packer]: the packer has the second half of a tile in registers. The multiplier waits for it before
      it overwrites the accumulator with the packer's next tile.

    At the end the copier and the multiplier wait for what was not waited for yet, so that every phase of a
    barrier is seen. Nobody waits in a circle, since all wait for what is earlier in the order of slices and
    tiles: a copy for a product of ``stages`` slices before, a product for its own copies and for the tile
    before the last to be taken, and a packer for its own tile's products.
    """
    (tokens, d_model), d_ff = x_gmem.shape, w_gmem.shape[0]
    n_slices = pl.cdiv(d_model, TILE_K)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    walk = TileWalk.of(program, cores, tile_walk.tiles_of(tokens, d_ff, tile))
    transforms = shared_transforms(x_gmem.dtype)

    @partial(
        pl.run_scoped,
        x_ring=plgpu.SMEM((stages, TILE_M, TILE_K), x_gmem.dtype, transforms=transforms),
        w_ring=plgpu.SMEM((stages, tile, TILE_K), w_gmem.dtype, transforms=transforms),
        accumulators=plgpu.TMEM((TILE_M, _PACKERS * _ACCUMULATOR_COLUMNS), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
        done=plgpu.Barrier(num_barriers=_PACKERS, orders_tensor_core=True),
        taken=plgpu.Barrier(num_barriers=_PACKERS, orders_tensor_core=True),
        scratch_refs={name: plgpu.SMEM((_PACKERS, *one.shape), one.dtype) for name, one in scratch.items()},
        collective_axes="warpgroup",
    )
    def _program(x_ring, w_ring, accumulators, full, empty, done, taken, scratch_refs):
        ring = Ring(full, empty, stages)

        def accumulator_of(packer):
            return accumulators.at[:, pl.ds(packer * _ACCUMULATOR_COLUMNS, tile)]

        def copy():
            def copy_tile(nth, _):
                row_block, tile_id = walk.place_in_warp(nth)

                def copy_slice(k, _):
                    stage = ring.claim(nth * n_slices + k)
                    for gmem, first, slices in (
                        (x_gmem, row_block * TILE_M, x_ring),
                        (w_gmem, tile_id * tile, w_ring),
                    ):
                        source = gmem.at[pl.ds(first, slices.shape[1]), pl.ds(k * TILE_K, TILE_K)]
                        plgpu.copy_gmem_to_smem(source, slices.at[stage], full.at[stage])

                lax.fori_loop(0, n_slices, copy_slice, None)

            lax.fori_loop(0, walk.count, copy_tile, None)
            _see_last(empty, walk.count * n_slices, stages)

        def multiply():
            def multiply_tile(nth, _):
                packer = lax.rem(nth, jnp.int32(_PACKERS))
                accumulator = accumulator_of(packer)
                pl.when(nth >= _PACKERS)(lambda: plgpu.barrier_wait(taken.at[packer]))

                def multiply_slice(k, _):
                    stage = ring.stage_of(nth * n_slices + k)
                    plgpu.barrier_wait(full.at[stage])
                    operands = x_ring.at[stage], w_ring.at[stage].T
                    plgpu.tcgen05_mma(accumulator, *operands, empty.at[stage], accumulate=k > 0)

                lax.fori_loop(0, n_slices, multiply_slice, None)
                plgpu.tcgen05_commit_arrive(done.at[packer])

            lax.fori_loop(0, walk.count, multiply_tile, None)
            _see_last(taken, walk.count, _PACKERS)

        def feed():
            plgpu.set_max_registers(_FEED_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(copy)
                pl.when(warp == 1)(multiply)

        def pack():
            plgpu.set_max_registers(_PACK_REGISTERS, action="increase")
            packer = warpgroup - 1
            mine = {name: ref.at[packer] for name, ref in scratch_refs.items()}

            def pack_tile(nth, _):
                row_block, tile_id = walk.place_of(nth * _PACKERS + packer)
                plgpu.barrier_wait(done.at[packer])

                def pack_half(half, _):
                    product = _load_half(accumulator_of(packer), half, x_gmem.dtype, half_of)
                    plgpu.wait_load_tmem()
                    pl.when(half == HALVES - 1)(lambda: plgpu.barrier_arrive(taken.at[packer]))
                    row = row_block * TILE_M + half * _HALVES.step
                    place = Place(row_block, half, row, tile_id, _HALVES)
                    epilogue(product.astype(jnp.float32), place, *outputs_gmem, **mine)

                lax.fori_loop(0, HALVES, pack_half, None)

            n_mine = lax.div(walk.count - packer + _PACKERS - 1, jnp.int32(_PACKERS))
            lax.fori_loop(0, n_mine, pack_tile, None)

        # A branch for each role, for ptxas to know whose registers are whose.
        lax.cond(warpgroup == 0, feed, pack)


def _see_last(barriers, count, n_barriers):
    """Waits for the last phases of barriers that take turns, of ``count`` phases in all."""
    for back in range(n_barriers, 0, -1):
        number = count - back
        barrier = barriers.at[lax.rem(jnp.maximum(number, 0), jnp.int32(n_barriers))]
        pl.when(number >= 0)(partial(plgpu.barrier_wait, barrier))


def _load_half(accumulator, half, dtype, half_of):
    """Half of the rows (64, tile) of an accumulator in tensor memory, rounded."""
    tile = accumulator.shape[1]
    pieces = []
    for first in range(0, tile, _LOAD_COLUMNS):
        piece = accumulator.at[:, pl.ds(first, min(_LOAD_COLUMNS, tile - first))]
        pieces.append(plgpu.async_load_tmem(piece).astype(dtype))
    return half_of(pieces, half)


def _half_of(pieces, half):
    """Half of the rows (64, tile) of pieces (128, columns) from tensor memory, in wgmma's layout.

    A warp has 32 rows in the one layout and 16 in the other, in the same order: its first 16 are of the first
    half and the others of the second, and each thread picks from its own registers.
    """
    shape = HALF_ROWS, sum(piece.shape[1] for piece in pieces)
    out = plgpu.ShapeDtypeStruct(shape, pieces[0].dtype, layout=plgpu.Layout.WGMMA)
    layouts = [plgpu.Layout.TCGEN05] * len(pieces), plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=layouts, return_type=out)
    def pick(_, pieces, half):
        is_first = arith.cmpi(arith.CmpIPredicate.eq, half.registers.flat[0], mgpu.c(0, half.mlir_dtype))
        first, second = registers_of_halves([piece.registers for piece in pieces])
        registers = np.empty(first.shape, dtype=object)
        for at in np.ndindex(registers.shape):
            registers[at] = arith.select(is_first, first[at], second[at])
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return pick(pieces, half)


def registers_of_halves(pieces: Sequence[np.ndarray]) -> list[Any]:
    """A thread's registers of pieces from tensor memory: those of the first half, and those of the second."""
    return np.split(np.concatenate(pieces, axis=_COLUMN_GROUPS), HALVES, axis=_ROW_GROUPS)


def _plain_half_of(pieces, half):
    """`_half_of` for the interpreter, which does not run Mosaic GPU's own code."""
    rows = jnp.concatenate(pieces, axis=1)
    by_half = rows.reshape(-1, HALVES, _HALVES.step, rows.shape[1])
    return lax.dynamic_index_in_dim(by_half, half, 1, keepdims=False).reshape(HALF_ROWS, -1)
