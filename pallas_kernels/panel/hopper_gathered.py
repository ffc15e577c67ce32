"""A product of gathered weight rows and panels of tokens for Hopper on Mosaic GPU, with a caller's epilogue.

Why it exists. In the Triton kernels `panel_up` and `panel_dh` the threads that multiply also load, and they
write results between two tiles. Here one warpgroup loads, two multiply and one writes, and the tensor cores
wait for neither. TMA on Hopper cannot gather, so cp.async copies rows of weights, 16 bytes a thread, to where
TMA would have put them.

What was tried, in ms, by a prototype of the up projection on one NVIDIA H100: 65,536 tokens, D 2048, F 5632,
bf16, panels of 596 active neurons.

    this design                                                      0.302
    `pallas_triton.panel_up`                                         0.375
    two programs of a cluster work on one panel and share its x      0.292
    four programs do                                                 0.603
    tiles of at most 208 neurons, in two products, four stages       0.331
    of at most 240                                                   0.323

    hot neurons apart, of panels of 1,613: up 0.711, down 0.734      0.660, 0.561
    the same of 2,464: up 1.002, down 1.014                          0.963, 0.831

The last two rows are a branch, on one NVIDIA H200: neurons that 85 % of the panels activate stand first in
every list, active or not, their rows of weights side by side, so that the copy engine brings them and up is
the gate's GEMM. Finding and copying them took 46 us, and a rested forward gained 0.00 and 0.03 ms of 3.24 and
3.91: too little for 770 lines.

With four warpgroups a thread may name 128 registers, and a product of more than 200 neurons needs more.
Sharing x takes 10 us less and was left out: it needs tiles in pairs and barriers across a cluster.

The epilogues, in ms on one NVIDIA H200 of the same sizes, and of panels of 2,464 active neurons:

    up, which keeps gates and projection    0.313    1.133    (Triton's 0.384, 1.370)
    dh                                      0.387    1.410    (Triton's 0.465, 1.529)
    dh without a cotangent of l1            0.336    1.248

What dh takes beyond up, whose product is as large, is its epilogue, which does not hide behind the next
product: it reads two arrays twice, writes three, and lays signs.

Work: 2 M union D FLOPs. A panel's neurons are cut evenly into tiles, whose filling up to multiples of eight
costs some 2 % more. Bytes, mostly from L2: M union D / 64 of weights, M union D / 96 of x, and what the
epilogue reads and writes.

Numerics. f32 accumulation, rounded once, to the type of x.

Limits. Those of the gate stage in `pallas_mosaic_gpu`; the whole of x at once. The interpreter cannot run the
PTX of `ptx_gathered`: there a caller gives steps of another kind.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.common import varying_axes
from pallas_kernels.common.hopper_gemm import COMPUTE_WARPGROUPS, ROWS, TILE_K, TILE_M, shared_transforms
from pallas_kernels.common.hopper_ring import Ring, ceil_div, launch, over_tiles
from pallas_kernels.panel.config import GATHERED_TILE
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

_LOADER = COMPUTE_WARPGROUPS
_STAGES = 5  # with the buffer they take 224 of 227 KiB of shared memory
_LAG = 2  # slices on their way when the loader waits for an older one
WIDTHS = (32, 64, *range(96, GATHERED_TILE + 1, 8))
"""Neurons of a product, each a branch of the kernel: panels of few neurons are rare, and need no more."""
_MULTIPLY_REGISTERS, _LOAD_REGISTERS, _PACK_REGISTERS = 176, 56, 104


class Place(NamedTuple):
    """Where a tile stands.

    Attributes:
      panel: whose it is.
      slot: its first.
      code: which of `WIDTHS` it has.
      valid: how many neurons it has.
      rows: how many slots of the results are written, from the first on.
    """

    panel: jax.Array
    slot: jax.Array
    code: jax.Array
    valid: jax.Array
    rows: jax.Array


class Steps(Protocol):
    """What warpgroups do at a tile: `ptx_gathered.Steps` says what each step is. ``refs`` are the lists'
    neurons, the epilogue's inputs and its outputs, whole and in global memory."""

    def offsets(self, neurons: Any, slot: Any, valid: Any) -> Any: ...

    def gather(self, w: Any, ring: Any, offsets: Any, stage: Any, k: Any, valid: Any) -> None: ...

    def landed(self, but: int) -> None: ...

    def prepare(self, refs: Any, place: Place, half: Any) -> Any: ...

    def lay(self, prepared: Any, buffer: Any) -> None: ...

    def store(self, product: Any, buffer: Any, refs: Any) -> None: ...

    def take(self, buffer: Any) -> Any: ...

    def nothing(self) -> Any: ...

    def pack(self, taken: Any, refs: Any, place: Place, half: Any, carry: Any) -> Any: ...

    def finish(self, carry: Any, refs: Any, program: Any) -> None: ...


def unsupported_reason(d_model: int, d_ff: int, pad: int) -> str | None:
    """What of a call's shape this kernel cannot do, but Mosaic GPU's gate stage can, in one sentence; or
    None.

    ``pad`` is what `gathered_gemm` takes by this name.
    """
    if 2 * d_model * d_ff > 1 << 32:
        return f"a gathered product counts weights up to 4 GiB in bytes; got F={d_ff}, D={d_model}"
    if GATHERED_TILE % pad:
        return (
            f"a gathered product needs slices of the down projection that divide {GATHERED_TILE}; got {pad}"
        )
    return None


def programs(lists: NeuronLists) -> int:
    """Programs that share the tiles of lists."""
    assert lists.tiles is not None
    return min(device.current().cores or 1, lists.tiles.shape[0])


def gathered_gemm(
    steps: Steps,
    lists: NeuronLists,
    x: jax.Array,
    w: jax.Array,
    inputs: Sequence[jax.Array],
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    pad: int,
    name: str,
    interpret: Any = None,
) -> Sequence[jax.Array]:
    """Runs ``w x^T`` over the lists, in tiles of `GATHERED_TILE`, for x (M, D) and w (F, D), and gives each
    half of a tile, of 64 tokens, to an epilogue.

    Args:
      steps: with the epilogue.
      inputs: the epilogue's.
      out_type: shapes of its outputs.
      pad: what a panel's slots are written up to a multiple of; those behind mean nothing.
      name: what profilers call it.
      interpret: what `plgpu.kernel` takes by this name.
    """
    assert lists.tiles is not None
    assert lists.n_tiles is not None
    grid = programs(lists)
    # Copies describe x in groups of eight rows. The gate stage's x is padded alike: the two are one array.
    x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
    outputs = launch(
        partial(_kernel, steps=steps, transforms=shared_transforms(x.dtype), pad=pad, programs=grid),
        out_type=tuple(out_type),
        programs=grid,
        warpgroups=COMPUTE_WARPGROUPS + 2,
        name=name,
        interpret=interpret,
    )(lists.tiles, lists.n_tiles, lists.counts, lists.offsets, x, w, lists.neurons, *inputs)
    # Mosaic GPU's outputs do not say so themselves.
    return varying_axes.vary_with(x, outputs)


def place_of(tiles, n_tiles, counts, offsets, number, *, pad) -> Place:
    """The tile of a number, or where there is none some tile in bounds with no row to write."""
    most = tiles.shape[0] // counts.shape[0]
    exists = number < n_tiles[0]
    entry = jnp.where(exists, tiles[jnp.minimum(number, tiles.shape[0] - 1)], 0)
    panel, nth = lax.div(entry, jnp.int32(most)), lax.rem(entry, jnp.int32(most))
    count = counts[panel]
    wanted = ceil_div(count, pad) * pad  # what the down projection reads
    # All tiles of a panel have one width.
    least = ceil_div(wanted, jnp.maximum(ceil_div(count, GATHERED_TILE), 1))
    code = jnp.where(least <= 96, ceil_div(least, 32) - 1, ceil_div(least, 8) - 10)
    code = jnp.maximum(code, 0)
    width = jnp.where(code <= 2, 32 * (code + 1), 8 * (code + 10))
    first = nth * width
    return Place(
        panel,
        offsets[panel] + first,
        code,
        jnp.minimum(count - first, width),
        jnp.where(exists, jnp.minimum(wanted - first, width), 0),
    )


def _kernel(tiles, n_tiles, counts, offsets, x, w, *refs, steps, transforms, pad, programs):
    """Warpgroups 0 and 1 multiply 64 tokens of a panel each, 2 loads, 3 packs.

    Slices of D go around a `Ring`: the copy of x arrives by itself, and for what is gathered the loader says
    so.

    granted[half], written[half]: as in `hopper_gemm`. The buffer may hold what the epilogue has laid there
      when a half is granted, which a multiplier reads before it writes.
    """
    n_slices = x.shape[1] // TILE_K
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

    @partial(
        pl.run_scoped,
        x_ring=plgpu.SMEM((_STAGES, TILE_M, TILE_K), x.dtype, transforms=transforms),
        w_ring=plgpu.SMEM((_STAGES, GATHERED_TILE, TILE_K), w.dtype, transforms=transforms),
        buffer=plgpu.SMEM((GATHERED_TILE, ROWS), x.dtype),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=_STAGES),
        granted=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        written=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        collective_axes="warpgroup",
    )
    def _program(x_ring, w_ring, buffer, full, empty, granted, written):
        n_mine = lax.div(jnp.maximum(n_tiles[0] - program, 0) + programs - 1, jnp.int32(programs))
        n_all = n_mine * n_slices

        ring = Ring(full, empty, _STAGES, _LAG)

        def look_up(nth):
            return place_of(tiles, n_tiles, counts, offsets, program + nth * programs, pad=pad)

        def multiply():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")

            def multiply_tile(nth, place, _following, _):
                first = nth * n_slices

                def with_width(width):
                    def operands(stage):
                        tokens = x_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)]
                        return tokens, w_ring.at[stage, pl.ds(0, width)].T

                    def with_accumulator(acc):
                        product = ring.multiply(acc, first, n_slices, operands, ring.release)
                        plgpu.barrier_wait(granted.at[warpgroup])
                        steps.store(product, buffer, refs)
                        plgpu.barrier_arrive(written.at[warpgroup])

                    pl.run_scoped(with_accumulator, plgpu.ACC((ROWS, width), jnp.float32))

                lax.switch(place.code, [partial(with_width, width) for width in WIDTHS])

            over_tiles(n_mine, look_up, multiply_tile, None)
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(granted.at[0]))

        def load():
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

            def load_tile(nth, place, _following, _):
                rows = pl.ds(place.panel * TILE_M, TILE_M)
                own = steps.offsets(refs[0], place.slot, place.valid)

                def load_slice(k, _):
                    number = nth * n_slices + k
                    stage = ring.claim(number)
                    columns = pl.ds(k * TILE_K, TILE_K)
                    plgpu.copy_gmem_to_smem(x.at[rows, columns], x_ring.at[stage], full.at[stage])
                    steps.gather(w, w_ring, own, stage, k, place.valid)
                    ring.hand_over(number, steps.landed)

                lax.fori_loop(0, n_slices, load_slice, None)

            over_tiles(n_mine, look_up, load_tile, None)

            pl.when(n_mine > 0)(lambda: ring.drain(n_all, steps.landed))

        def pack():
            plgpu.set_max_registers(_PACK_REGISTERS, action="decrease")
            steps.lay(steps.prepare(refs, look_up(jnp.int32(0)), jnp.int32(0)), buffer)
            plgpu.barrier_arrive(granted.at[0])

            def pack_tile(nth, place, following, carry):
                def pack_half(half, carry):
                    # What the next half asks for is read while this one is being multiplied.
                    upcoming = jax.tree.map(partial(jnp.where, half == 0), place, following)
                    prepared = steps.prepare(refs, upcoming, 1 - half)
                    plgpu.barrier_wait(written.at[half])
                    taken = steps.take(buffer)
                    steps.lay(prepared, buffer)
                    plgpu.barrier_arrive(granted.at[1 - half])
                    return steps.pack(taken, refs, place, half, carry)

                return lax.fori_loop(0, COMPUTE_WARPGROUPS, pack_half, carry)

            carry = over_tiles(n_mine, look_up, pack_tile, steps.nothing())
            steps.finish(carry, refs, program)

        # A branch for each role, for ptxas to know whose registers are whose.
        lax.cond(warpgroup < COMPUTE_WARPGROUPS, multiply, lambda: lax.cond(warpgroup == _LOADER, load, pack))
