"""The down projection of PanelELL for Hopper, and the gradient of x: gathered rows of weights on Mosaic GPU.

Why it exists. In `pallas_triton.panel_down` the threads that multiply also load. Here two warpgroups
multiply, 64 tokens and 256 columns each, and a third loads: h by TMA, which needs no thread, and rows of the
weights by cp.async, 16 bytes a thread, to where TMA would have put them, for TMA on Hopper cannot gather.
Slots are what is summed over, and in shared memory they stand row after row in both operands: wgmma reads
them so, but of the left one `plgpu.wgmma` does not offer it.

What was tried, in ms, on one NVIDIA H200: 65,536 tokens, D 2048, F 5632, bf16, panels of 596 active neurons,
y and the gradient of x, each to the bit what Triton's gives. In a row the lag is how many slices are on their
way when the loader waits for an older one, of eight in the ring.

    this design, a lag of 2                                          0.275   0.505
    a lag of 1                                                       0.292   0.535
    of 3                                                             0.275   0.508
    of 4                                                             0.283   0.519
    of 6                                                             0.311   0.543
    `pallas_triton.panel_down`                                       0.346   0.645
    two programs of a cluster share h by multicast, a lag of 4       0.282   0.516
    four programs do, a lag of 6                                     0.671   1.177

With 1,613 active neurons, at a lag of 4, it takes 0.664 and 1.300 where Triton's takes 0.718 and 1.502. A
cluster of two gains 2 % of one of these and nothing of the others, and was left out.

Work: 2 M union D FLOPs a term. Bytes, mostly from L2: M union D / 64 of weights, M union D / 128 of h.

Numerics. As `panel_down` on Triton: f32 accumulation, slots in their order, one rounding.

Limits. Those of the gate stage in `pallas_mosaic_gpu`; the whole of y at once. Slots of h up to a multiple of
`SLICE` behind a panel's count are multiplied by zeros, so they must be finite. The interpreter cannot run the
PTX of `ptx_down`: there a caller gives steps of another kind.
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
from pallas_kernels.common.hopper_gemm import COMPUTE_WARPGROUPS, ROWS, TILE_M, shared_transforms
from pallas_kernels.common.hopper_ring import Ring, ceil_div, launch, over_tiles
from pallas_kernels.panel import ptx_down
from pallas_kernels.panel.config import GATHERED_SLICE as SLICE
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

TILE = 256
"""Columns of y of a tile."""
_CHUNK = 128
"""Slots whose neurons the loader looks up together, a chunk before it copies their rows."""
_STAGES = 8  # with the buffer they take 208 of 227 KiB of shared memory
_LAG = 2  # slices on their way when the loader waits for an older one
_GROUP = 8  # panels whose programs walk over the same columns together, and share rows of weights in L2
_MULTIPLY_REGISTERS, _LOAD_REGISTERS = 216, 72


class Place(NamedTuple):
    """Where a tile stands: its panel and first column, and the panel's first slot and how many it has."""

    panel: jax.Array
    column: jax.Array
    slot: jax.Array
    valid: jax.Array


class Steps(Protocol):
    """What warpgroups do that JAX has no operation for: `ptx_down.Steps`, which says what each is."""

    def look_up(self, neurons: Any, slot: Any, valid: Any) -> Any: ...

    def gather(
        self, w: Any, ring: Any, rows: Any, stage: Any, part: int, column: Any, valid: Any
    ) -> None: ...

    def landed(self, but: int) -> None: ...

    def zeros(self) -> Any: ...

    def multiply(self, acc: Any, h: Any, w: Any, stage: Any, half: Any) -> Any: ...

    def store(self, acc: Any, buffer: Any, y: Any, half: Any, row: Any, column: Any) -> None: ...


def panel_down(
    terms: Sequence[tuple[jax.Array, jax.Array]],
    lists: NeuronLists,
    *,
    tokens: int,
    name: str = "panel_down",
    steps: Steps | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`pallas_triton.panel_down` for panels of 128 tokens: (M, D) in the type of h.

    Args:
      terms: of h (n_slots, 128), which is zero behind each panel's count up to a multiple of `SLICE`, and W
        (F, D), D a multiple of 64; in bf16 or f16.
      tokens: M.
      steps: None for those of a GPU.
      interpret: what `plgpu.kernel` takes by this name.
    """
    h, weight = terms[0]
    d_model = weight.shape[1]
    programs = min(device.current().cores or 1, lists.counts.shape[0] * pl.cdiv(d_model, TILE))
    if steps is None:
        steps = ptx_down.Steps(TILE, SLICE, _CHUNK, h.dtype, d_model)
    kernel = partial(
        _kernel, steps=steps, terms=len(terms), transforms=shared_transforms(h.dtype), programs=programs
    )
    y = launch(
        kernel,
        out_type=jax.ShapeDtypeStruct((tokens, d_model), h.dtype),
        programs=programs,
        warpgroups=COMPUTE_WARPGROUPS + 1,
        name=name,
        interpret=interpret,
    )(lists.counts, lists.offsets, lists.neurons, *[array for term in terms for array in term])
    # Mosaic GPU's outputs do not say so themselves.
    return varying_axes.vary_with(h, y)


def _kernel(counts, offsets, neurons, *refs, steps, terms, transforms, programs):
    """Warpgroups 0 and 1 multiply 64 tokens of a panel each, 2 loads.

    Slices of slots go around a `Ring`, those of all terms of a tile one after the other: the copy of h
    arrives by itself, and for what is gathered the loader says so.
    """
    hs, ws, y = refs[: 2 * terms : 2], refs[1 : 2 * terms : 2], refs[-1]
    n_panels, n_tiles = counts.shape[0], pl.cdiv(y.shape[1], TILE)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    n_mine = lax.div(jnp.maximum(n_panels * n_tiles - program, 0) + programs - 1, jnp.int32(programs))

    @partial(
        pl.run_scoped,
        h_ring=plgpu.SMEM((_STAGES, SLICE, TILE_M), hs[0].dtype, transforms=transforms),
        w_ring=plgpu.SMEM((_STAGES, SLICE, TILE), hs[0].dtype, transforms=transforms),
        buffer=plgpu.SMEM((TILE_M, ptx_down.BOX), hs[0].dtype),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=_STAGES),
        collective_axes="warpgroup",
    )
    def _program(h_ring, w_ring, buffer, full, empty):
        ring = Ring(full, empty, _STAGES, _LAG)

        def look_up(nth):
            number = jnp.minimum(program + nth * programs, n_panels * n_tiles - 1)
            panel, tile_id = plgpu.planar_snake(number, (n_panels, n_tiles), 0, _GROUP)
            count = counts[panel]
            # An empty panel's offset may be the end of the lists.
            return Place(panel, tile_id * TILE, jnp.where(count > 0, offsets[panel], 0), count)

        def multiply():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")

            def multiply_tile(_nth, place, _following, first):
                n = terms * ceil_div(place.valid, SLICE)

                def step(k, acc):
                    stage = ring.stage_of(first + k)
                    plgpu.barrier_wait(full.at[stage])
                    acc = steps.multiply(acc, h_ring, w_ring, stage, warpgroup)
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: ring.release(first + k - 1))
                    return acc

                acc = lax.fori_loop(0, n, step, steps.zeros())
                plgpu.wgmma_wait(0)
                pl.when(n > 0)(lambda: ring.release(first + n - 1))
                row = place.panel * TILE_M + warpgroup * ROWS
                steps.store(acc, buffer, y, warpgroup, row, place.column)
                return first + n

            over_tiles(n_mine, look_up, multiply_tile, jnp.int32(0))

        def load():
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

            def load_tile(_nth, place, following, state):
                # An empty panel has a chunk too: the one that looks up the next tile's neurons.
                chunks = jnp.maximum(ceil_div(place.valid, _CHUNK), 1)

                def load_chunk(which, j, state):
                    number, own = state
                    h, w = hs[which], ws[which]
                    left = place.valid - j * _CHUNK
                    after = place if which + 1 < terms else following
                    last = j + 1 >= chunks
                    ahead = steps.look_up(
                        neurons,
                        jnp.where(last, after.slot, place.slot + (j + 1) * _CHUNK),
                        jnp.where(last, after.valid, left - _CHUNK),
                    )

                    def load_slice(part):
                        slot = number + part
                        stage = ring.claim(slot)
                        rows = pl.ds(place.slot + j * _CHUNK + part * SLICE, SLICE)
                        plgpu.copy_gmem_to_smem(h.at[rows], h_ring.at[stage], full.at[stage])
                        steps.gather(w, w_ring, own, stage, part, place.column, left - part * SLICE)
                        ring.hand_over(slot, steps.landed)

                    for part in range(_CHUNK // SLICE):
                        pl.when(part * SLICE < left)(partial(load_slice, part))
                    return number + jnp.minimum(ceil_div(left, SLICE), _CHUNK // SLICE), ahead

                for which in range(terms):
                    state = lax.fori_loop(0, chunks, partial(load_chunk, which), state)
                return state

            first = look_up(jnp.int32(0))
            state = jnp.int32(0), steps.look_up(neurons, first.slot, first.valid)
            n_all, _ = over_tiles(n_mine, look_up, load_tile, state)

            pl.when(n_all > 0)(lambda: ring.drain(n_all, steps.landed))

        # A branch for each role, for ptxas to know whose registers are whose.
        lax.cond(warpgroup < COMPUTE_WARPGROUPS, multiply, load)
