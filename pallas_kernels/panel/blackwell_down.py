"""The down projection of PanelELL for Blackwell, and the gradient of x: `blackwell_roles` of Wd.

A tile is a panel's 128 tokens and at most 256 columns of y. Slots are what is summed over, and in shared
memory they stand row after row in both operands, which the tensor cores read as they are.

Work: 2 M union D FLOPs a term. Bytes, mostly from L2: M union D / 64 of weights, M union D / 128 of h. Copies
describe y in groups of eight rows, so where M is no multiple of 8, y is copied once more.

Numerics. As `panel_down` on Triton: f32 accumulation, slots in their order, one rounding. Slots behind a
count are multiplied too: there h is zero, and the neuron is 0.

Limits. Those of `blackwell_roles`; the whole of y at once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import varying_axes
from pallas_kernels.common.hopper_ring import ceil_div, launch
from pallas_kernels.panel import blackwell_roles
from pallas_kernels.panel.blackwell_roles import CHUNK, COLUMNS, PANEL, PIECE, WARPGROUPS, shared_memory
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

_DEPTH = 64
"""Slots of a slice."""
_STAGES = 4  # with the buffers they take 224 of 227 KiB of shared memory
_BUFFERS = 2
_GROUP = 8  # panels whose programs walk over the same columns together, and share rows of weights in L2


class Place(NamedTuple):
    """Where a tile stands: its panel and first column, and the panel's first slot and how many it has."""

    panel: jax.Array
    column: jax.Array
    slot: jax.Array
    valid: jax.Array


def panel_down(
    terms: Sequence[tuple[jax.Array, jax.Array]],
    lists: NeuronLists,
    *,
    tokens: int,
    name: str = "panel_down",
    gather: blackwell_roles.Gather = blackwell_roles.gather,
    interpret: Any = None,
) -> jax.Array:
    """`pallas_triton.panel_down` for panels of 128 tokens and chunks of 128 slots: (M, D) in the type of h.

    Args:
      terms: of h (n_slots, 128), which is zero behind each panel's count up to a whole chunk, and W (F, D), D
        a multiple of 64; in bf16 or f16.
      tokens: M.
      gather: another than the copy engine's, for an interpreter.
      interpret: what `plgpu.kernel` takes by this name.
    """
    h, weight = terms[0]
    d_model = weight.shape[1]
    width = min(COLUMNS, d_model)
    programs = blackwell_roles.programs(lists.counts.shape[0] * pl.cdiv(d_model, width))
    y = launch(
        partial(_kernel, terms=len(terms), width=width, programs=programs, gather=gather),
        out_type=jax.ShapeDtypeStruct((tokens + -tokens % 8, d_model), h.dtype),
        programs=programs,
        warpgroups=WARPGROUPS,
        name=name,
        interpret=interpret,
    )(lists.counts, lists.offsets, lists.neurons, *[array for term in terms for array in term])
    # Mosaic GPU's outputs do not say so themselves.
    return varying_axes.vary_with(h, y)[:tokens]


def _kernel(counts, offsets, neurons, *refs, terms, width, programs, gather):
    hs, ws, y = refs[: 2 * terms : 2], refs[1 : 2 * terms : 2], refs[-1]
    n_panels, n_tiles = counts.shape[0], pl.cdiv(y.shape[1], width)
    program = lax.axis_index("program")
    n_mine = lax.div(jnp.maximum(n_panels * n_tiles - program, 0) + programs - 1, jnp.int32(programs))

    @partial(
        pl.run_scoped,
        h_ring=shared_memory(_STAGES, _DEPTH, PANEL, dtype=y.dtype),
        w_ring=shared_memory(_STAGES, _DEPTH, width, dtype=y.dtype),
        buffers=shared_memory(_BUFFERS, PANEL, PIECE, dtype=y.dtype),
        common=blackwell_roles.scratch(_STAGES, arrivals=2),
        collective_axes="warpgroup",
    )
    def _program(h_ring, w_ring, buffers, common):
        def look_up(nth):
            number = jnp.minimum(program + nth * programs, n_panels * n_tiles - 1)
            # `plgpu.planar_snake` asks for operations that a warp by itself does not have.
            band, within = lax.div(number, _GROUP * n_tiles), lax.rem(number, _GROUP * n_tiles)
            height = jnp.minimum(n_panels - band * _GROUP, _GROUP)
            panel, tile_id = band * _GROUP + lax.rem(within, height), lax.div(within, height)
            count = counts[panel]
            # An empty panel's offset may be the end of the lists.
            return Place(panel, tile_id * width, jnp.where(count > 0, offsets[panel], 0), count)

        def chunk_of(slot):
            """The neurons of a chunk, by slices."""
            return [blackwell_roles.look_up(neurons, slot + part, _DEPTH) for part in range(0, CHUNK, _DEPTH)]

        def load(ring, first, place, following, own):
            # An empty panel has a chunk too: the one that looks up the next tile's neurons.
            chunks = jnp.maximum(ceil_div(place.valid, CHUNK), 1)

            def load_chunk(which, j, state):
                number, own = state
                left = place.valid - j * CHUNK
                # Read a chunk ahead: who uses them then does not wait for them.
                after = place.slot if which + 1 < terms else following.slot
                ahead = chunk_of(jnp.where(j + 1 < chunks, place.slot + (j + 1) * CHUNK, after))
                for part, rows in enumerate(own):

                    @pl.when(part * _DEPTH < left)
                    def _(part=part, rows=rows):
                        stage = ring.claim(number + part)
                        slots = pl.ds(place.slot + j * CHUNK + part * _DEPTH, _DEPTH)
                        plgpu.copy_gmem_to_smem(hs[which].at[slots], h_ring.at[stage], ring.full.at[stage])
                        columns = pl.ds(place.column, width)
                        gather(ws[which], rows, columns, w_ring.at[stage], ring.full.at[stage])

                return number + jnp.clip(ceil_div(left, _DEPTH), 0, len(own)), ahead

            for which in range(terms):
                first, own = lax.fori_loop(0, chunks, partial(load_chunk, which), (first, own))
            return own

        def multiply(accumulator, stage, _place, accumulate):
            sums = accumulator.at[:, pl.ds(0, width)]
            plgpu.tcgen05_mma(sums, h_ring.at[stage].T, w_ring.at[stage], accumulate=accumulate)

        def pack(ready, accumulator, place, _following, _nth, number):
            ready()
            pieces = jnp.minimum(lax.div(y.shape[1] - place.column, PIECE), width // PIECE)

            def pack_piece(piece, number):
                buffer = buffers.at[lax.rem(number, jnp.int32(_BUFFERS))]
                columns = pl.ds(piece * PIECE, PIECE)
                value = plgpu.async_load_tmem(accumulator.at[:, columns], layout=plgpu.Layout.TCGEN05)
                value = jnp.where(place.valid > 0, value, 0)  # an empty panel has multiplied nothing
                plgpu.wait_smem_to_gmem(_BUFFERS - 1, wait_read_only=True)
                buffer[...] = value.astype(y.dtype)
                plgpu.commit_smem()
                rows, columns = pl.ds(place.panel * PANEL, PANEL), pl.ds(place.column + piece * PIECE, PIECE)
                plgpu.copy_smem_to_gmem(buffer, y.at[rows, columns])
                return number + 1

            return lax.fori_loop(0, pieces, pack_piece, number)

        blackwell_roles.run(
            blackwell_roles.Work(
                look_up,
                lambda place: terms * ceil_div(place.valid, _DEPTH),
                load,
                multiply,
                pack,
                lambda number: None,
            ),
            n_mine,
            stages=_STAGES,
            loading=lambda: chunk_of(look_up(jnp.int32(0)).slot),
            packing=lambda: jnp.int32(0),
            **common,
        )
