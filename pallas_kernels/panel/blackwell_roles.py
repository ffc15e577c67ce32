"""What PanelELL's products over gathered rows of weights share on Blackwell: who does what in a program, and
the gather.

Why it exists. On Hopper threads gather with cp.async, for which JAX has no operation (`ptx_gathered`). On
Blackwell the copy engine gathers by itself, four rows an instruction, and tensor cores keep their sums in a
memory of their own. So these kernels are plain Pallas, and no thread holds an accumulator while products are
added to it.

Who does what. A program walks over its tiles: one warpgroup starts copies, one warp of the second starts
products, and the third packs. Sums stand in tensor memory, in two accumulators of `COLUMNS` columns that
tiles take in turn, so that a tile is packed while the next one is multiplied.

The barriers, beside those of a `Ring`, whose ``empty`` the tensor cores arrive at themselves:

done[accumulator]: all products of a tile have been added up.
taken[accumulator]: the packing warpgroup has read a tile, and the tensor cores may write over it.

Nobody waits in a circle: a copy waits for the products of the slices ``stages`` before it, a product for its
copies and for the tile two before to be packed, and packing for the products of its tile.

Limits. Compute capability 10.0, for which these kernels have been compiled; they were interpreted, but have
not run on such a GPU, and nothing was measured. bf16 or f16; D a multiple of 64; chunks of 128 slots, every
one of which has a neuron in bounds, also behind a panel's count.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.common.hopper_gemm import TILE_K, shared_transforms
from pallas_kernels.common.hopper_ring import Ring, over_tiles

WARPGROUPS = 3
CHUNK = PANEL = 128
"""Slots of a chunk, and tokens of a panel: lanes of tensor memory."""
PIECE = 64
"""Columns that are packed together: one swizzle of shared memory."""
COLUMNS = 256
"""Columns of an accumulator: half of tensor memory."""
_ACCUMULATORS = 2
_LOAD_REGISTERS, _MULTIPLY_REGISTERS, _PACK_REGISTERS = 136, 56, 248

Gather = Callable[[Any, Any, Any, Any, Any], None]
"""``gather(array, rows, columns, to, barrier)``: called by a whole warpgroup, starts copying rows of an array
(n, columns), whose numbers stand in registers, to shared memory. The barrier has one arrival of it."""


def unsupported_reason(d_model: int, chunk: int) -> str | None:
    """What of a call that Mosaic GPU's gate stage can do these kernels cannot, in one sentence; or None."""
    if chunk != CHUNK:
        return f"a gathered product on Blackwell needs chunks of {CHUNK} slots; got {chunk}"
    if d_model % TILE_K:
        return f"a gathered product on Blackwell needs D to be a multiple of {TILE_K}; got {d_model}"
    return None


_index = inspect.signature(plgpu.load).parameters.get("idx")
# JAX 0.10 must be given an index, 0.11 should not be, and 0.12 cannot.
_load = partial(plgpu.load, idx=()) if _index and _index.default is inspect.Parameter.empty else plgpu.load


def load_vector(ref: Any, first: Any, size: int, layout: Any) -> Any:
    """So many elements of an array in global memory, in a layout of registers."""
    # What JAX calls optimized are loads from shared memory alone.
    return _load(ref.at[pl.ds(first, size)], layout=layout, optimized=False)


def look_up(neurons: Any, slot: Any, size: int) -> Any:
    """The neurons of so many slots, a multiple of 16, as the copy engine takes them."""
    return load_vector(neurons, slot, size, plgpu.Layout.TMA_INDICES).astype(jnp.uint32)


def gather(array: Any, rows: Any, columns: Any, to: Any, barrier: Any) -> None:
    """`Gather` by the copy engine."""
    plgpu.copy_gmem_to_smem(array.at[rows, columns], to, barrier)


def programs(tiles: int) -> int:
    """Programs that share so many tiles."""
    return min(device.current().cores or 1, tiles)


def shared_memory(*shape: int, dtype: Any) -> Any:
    """Scratch that the copy engine and the tensor cores address, in rows of one swizzle."""
    return plgpu.SMEM(shape, dtype, transforms=shared_transforms(dtype))


def scratch(stages: int, arrivals: int) -> dict[str, Any]:
    """What `run` needs: the accumulators, and the barriers of a ring whose slices take so many copies."""
    return {
        "accumulators": plgpu.TMEM((CHUNK, _ACCUMULATORS * COLUMNS), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
        "done": plgpu.Barrier(num_barriers=_ACCUMULATORS, orders_tensor_core=True),
        "taken": plgpu.Barrier(num_barriers=_ACCUMULATORS, orders_tensor_core=True),
    }


class Work(NamedTuple):
    """What the warpgroups of a kernel do at the tiles of a program.

    Attributes:
      look_up: the place of the nth tile, also past the last one, in bounds.
      slices: how many slices a place has.
      load: ``load(ring, first, place, following, state)`` claims the stages of a tile's slices, the first of
        which has a number, and starts their copies; returns the state for the following tile.
      multiply: ``multiply(accumulator, stage, place, accumulate)`` starts the products of a slice.
      pack: ``pack(ready, accumulator, place, following, nth, carry)`` calls ``ready()`` and then reads the
        accumulator; returns the carry for the following tile.
      finish: called with the carry at the end.
    """

    look_up: Callable[[Any], Any]
    slices: Callable[[Any], Any]
    load: Callable[[Ring, Any, Any, Any, Any], Any]
    multiply: Callable[[Any, Any, Any, Any], None]
    pack: Callable[[Callable[[], None], Any, Any, Any, Any, Any], Any]
    finish: Callable[[Any], None]


def run(
    work: Work,
    count: Any,
    *,
    stages: int,
    loading: Callable[[], Any],
    packing: Callable[[], Any],
    accumulators: Any,
    full: Any,
    empty: Any,
    done: Any,
    taken: Any,
) -> None:
    """Walks over ``count`` tiles, each warpgroup at its own pace.

    Args:
      loading: what loads with the first state.
      packing: what packs with the first carry.
      accumulators: and the others, of `scratch`.
    """
    ring = Ring(full, empty, stages)

    def accumulator_of(nth):
        which = lax.rem(nth, jnp.int32(_ACCUMULATORS))
        return which, accumulators.at[:, pl.ds(which * COLUMNS, COLUMNS)]

    def load():
        plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

        def load_tile(_nth, place, following, state):
            first, own = state
            return first + work.slices(place), work.load(ring, first, place, following, own)

        n_all, _ = over_tiles(count, work.look_up, load_tile, (jnp.int32(0), loading()))
        pl.when(n_all > 0)(lambda: ring.drain(n_all, lambda but: None))

    def multiply_tile(nth, place, _following, first):
        which, accumulator = accumulator_of(nth)
        pl.when(nth >= _ACCUMULATORS)(lambda: plgpu.barrier_wait(taken.at[which]))
        n = work.slices(place)

        def step(k, _):
            stage = ring.stage_of(first + k)
            plgpu.barrier_wait(full.at[stage])
            work.multiply(accumulator, stage, place, k > 0)
            plgpu.tcgen05_commit_arrive(empty.at[stage])

        lax.fori_loop(0, n, step, None)
        plgpu.tcgen05_commit_arrive(done.at[which])
        return first + n

    def multiply():
        plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="decrease")

        # One warp alone: the others of a warpgroup would wait for phases of barriers that nobody keeps from
        # ending before they have looked.
        @plgpu.warp_map
        def _warp(warp):
            @pl.when(warp == 0)
            def _():
                over_tiles(count, work.look_up, multiply_tile, jnp.int32(0))
                for back in range(_ACCUMULATORS, 0, -1):
                    which, _ = accumulator_of(jnp.maximum(count - back, 0))
                    pl.when(count >= back)(partial(plgpu.barrier_wait, taken.at[which]))

    def pack():
        plgpu.set_max_registers(_PACK_REGISTERS, action="increase")

        def pack_tile(nth, place, following, carry):
            which, accumulator = accumulator_of(nth)
            ready = partial(plgpu.barrier_wait, done.at[which])
            carry = work.pack(ready, accumulator, place, following, nth, carry)
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(taken.at[which])
            return carry

        work.finish(over_tiles(count, work.look_up, pack_tile, packing()))
        plgpu.wait_smem_to_gmem(0)

    role = lax.axis_index("warpgroup")
    # A branch for each role, for ptxas to know whose registers are whose.
    lax.cond(role == 0, load, lambda: lax.cond(role == 1, multiply, pack))
