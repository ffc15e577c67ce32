"""A product of gathered weight rows and panels of tokens for Blackwell on Mosaic GPU, with a caller's
epilogue: what `hopper_gathered` is for Hopper, by the warpgroups of `blackwell_roles`.

A tile is one chunk of a panel's slots, or two where the panel has two left, and the panel's 128 tokens: lists
are walked in pairs of chunks, as by Triton's kernels. Slots are lanes of tensor memory, so a tile stands
there as gates, projections and h stand in global memory, and the copy engine moves those: what an epilogue
reads arrives in shared memory piece by piece, and is overwritten by what it writes.

Work: 2 M union D FLOPs, a panel's union filled up to whole chunks. Bytes, mostly from L2: M union D / 64 of
weights, M union D / 128 of x, and what the epilogue reads and writes.

Numerics. f32 accumulation.

Limits. Those of `blackwell_roles`; the whole of x at once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import varying_axes
from pallas_kernels.common.hopper_gemm import TILE_K
from pallas_kernels.common.hopper_ring import launch
from pallas_kernels.panel import blackwell_roles
from pallas_kernels.panel.blackwell_roles import CHUNK, PANEL, PIECE, WARPGROUPS, shared_memory
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

LAYOUT = plgpu.Layout.TCGEN05
"""Where the registers of a warpgroup hold a piece, of 128 slots and 64 tokens."""
ROWS = LAYOUT.reduce(1)
"""Where they hold one value for each slot of a piece."""
_HALVES = 2
"""Chunks of a tile at most."""
_PIECES = PANEL // PIECE
_ROOM = 224 * 1024
"""Bytes of shared memory for slices and pieces; barriers and sums over a warpgroup take the rest."""


class Place(NamedTuple):
    """Where a tile stands: its panel and first slot, and whether it has a second chunk."""

    panel: jax.Array
    slot: jax.Array
    paired: jax.Array


class Piece(NamedTuple):
    """Where a piece stands: its panel, first slot, and first token within the panel."""

    panel: jax.Array
    slot: jax.Array
    token: jax.Array

    @property
    def slots(self) -> Any:
        return pl.ds(self.slot, CHUNK)

    @property
    def tokens(self) -> Any:
        return pl.ds(self.token, PIECE)


class Epilogue(Protocol):
    """What is made of a product by the packing warpgroup. ``inputs`` and ``others`` are whole and in global
    memory.

    Attributes:
      staged: pieces that it reads, of as many arrays.
      results: pieces that it writes, at least as many, of as many arrays.
    """

    @property
    def staged(self) -> int: ...

    @property
    def results(self) -> int: ...

    def ask(self, inputs: Any, neurons: Any, piece: Piece, to: Any, barrier: Any) -> None:
        """Starts the copies of what it reads, each to one of the references ``to``; the barrier has one
        arrival of each. Neurons are in global memory too."""

    def prepare(self, inputs: Any, piece: Piece) -> Any:
        """What else it wants to have in registers before the product is there."""

    def nothing(self) -> Any:
        """What `pack` carries from piece to piece, at first."""

    def pack(
        self, product: Any, staged: Sequence[Any], prepared: Any, inputs: Any, piece: Piece, carry: Any
    ) -> tuple[Sequence[Any], Any]:
        """The results, and the carry, of a product in f32 and what was asked for."""

    def finish(self, carry: Any, others: Any, program: Any) -> None:
        """Writes what `pack` has carried over all tiles of a program."""


def programs(lists: NeuronLists) -> int:
    """Programs that share the pairs of lists."""
    return blackwell_roles.programs(lists.pairs.shape[0])


def gathered_gemm(
    epilogue: Epilogue,
    lists: NeuronLists,
    x: jax.Array,
    w: jax.Array,
    inputs: Sequence[jax.Array],
    *,
    others: Sequence[jax.ShapeDtypeStruct] = (),
    name: str,
    gather: blackwell_roles.Gather,
    interpret: Any = None,
) -> Sequence[jax.Array]:
    """Runs ``w x^T`` over the lists, for x (M, D) and w (F, D), and gives pieces of it to an epilogue, whose
    results (n_slots, 128) it returns, and the other outputs behind them.

    Args:
      inputs: the epilogue's.
      others: shapes of outputs that it writes by itself.
      name: what profilers call it.
      gather: of weights.
      interpret: what `plgpu.kernel` takes by this name.
    """
    grid = programs(lists)
    slots = jax.ShapeDtypeStruct((lists.neurons.shape[0], PANEL), x.dtype)
    # Copies describe x in groups of eight rows. The gate stage's x is padded alike: the two are one array.
    x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
    outputs = launch(
        partial(_kernel, epilogue=epilogue, n_inputs=len(inputs), programs=grid, gather=gather),
        out_type=(*[slots] * epilogue.results, *others),
        programs=grid,
        warpgroups=WARPGROUPS,
        name=name,
        interpret=interpret,
    )(lists.pairs, lists.n_pairs, lists.owner, lists.neurons, x, w, *inputs)
    # Mosaic GPU's outputs do not say so themselves.
    return varying_axes.vary_with(x, outputs)


def _kernel(pairs, n_pairs, owner, neurons, x, w, *refs, epilogue, n_inputs, programs, gather):
    """The packing warpgroup asks for what it reads itself, a piece ahead, and overwrites it with results once
    it has it in registers.

    arrived[which]: what a piece reads is there. Pieces take two sets of buffers in turn; a set is asked for
      when the results that were in it have left.
    """
    inputs, results = refs[:n_inputs], refs[n_inputs : n_inputs + epilogue.results]
    n_slices, n_slots = x.shape[1] // TILE_K, neurons.shape[0]
    program = lax.axis_index("program")
    n_mine = lax.div(jnp.maximum(n_pairs[0] - program, 0) + programs - 1, jnp.int32(programs))
    unstaged = epilogue.results - epilogue.staged
    piece_bytes, slice_bytes = 2 * CHUNK * PIECE, 2 * (PANEL + _HALVES * CHUNK) * TILE_K
    stages = (_ROOM - (_PIECES * epilogue.staged + unstaged) * piece_bytes) // slice_bytes

    @partial(
        pl.run_scoped,
        x_ring=shared_memory(stages, PANEL, TILE_K, dtype=x.dtype),
        w_ring=shared_memory(stages, _HALVES * CHUNK, TILE_K, dtype=x.dtype),
        staged=[shared_memory(_PIECES, CHUNK, PIECE, dtype=x.dtype) for _ in range(epilogue.staged)],
        single=[shared_memory(CHUNK, PIECE, dtype=x.dtype) for _ in range(unstaged)],
        arrived=plgpu.Barrier(num_arrivals=epilogue.staged, num_barriers=_PIECES),
        common=blackwell_roles.scratch(stages, arrivals=1 + _HALVES),
        collective_axes="warpgroup",
    )
    def _program(x_ring, w_ring, staged, single, arrived, common):
        def look_up(nth):
            # Past the list's end nothing was written.
            number = program + nth * programs
            entry = jnp.where(number < n_pairs[0], pairs[jnp.minimum(number, pairs.shape[0] - 1)], 0)
            chunk = lax.shift_right_logical(entry, 1)
            return Place(owner[chunk], chunk * CHUNK, entry & 1)

        def half_of(place, half):
            """The first slot of a tile's half, in bounds also where there is none."""
            return jnp.minimum(place.slot + half * CHUNK, n_slots - CHUNK)

        def load(ring, first, place, _following, _state):
            rows = [blackwell_roles.look_up(neurons, half_of(place, half), CHUNK) for half in range(_HALVES)]

            def load_slice(k, _):
                stage = ring.claim(first + k)
                columns, full = pl.ds(k * TILE_K, TILE_K), ring.full.at[stage]
                tokens = pl.ds(place.panel * PANEL, PANEL)
                plgpu.copy_gmem_to_smem(x.at[tokens, columns], x_ring.at[stage], full)

                def load_half(half):
                    gather(w, rows[half], columns, w_ring.at[stage, pl.ds(half * CHUNK, CHUNK)], full)

                load_half(0)
                lax.cond(place.paired > 0, lambda: load_half(1), lambda: plgpu.barrier_arrive(full))

            lax.fori_loop(0, n_slices, load_slice, None)

        def multiply(accumulator, stage, place, accumulate):
            def multiply_half(half):
                plgpu.tcgen05_mma(
                    accumulator.at[:, pl.ds(half * PANEL, PANEL)],
                    w_ring.at[stage, pl.ds(half * CHUNK, CHUNK)],
                    x_ring.at[stage].T,
                    accumulate=accumulate,
                )

            multiply_half(0)
            pl.when(place.paired > 0)(lambda: multiply_half(1))

        def piece_of(place, number):
            """A tile's piece of a number, which of a half's it is, and which half that is."""
            half, which = lax.div(number, jnp.int32(_PIECES)), lax.rem(number, jnp.int32(_PIECES))
            return Piece(place.panel, half_of(place, half), which * PIECE), which, half

        def ask(place, number):
            piece, which, _ = piece_of(place, number)
            to = [buffers.at[which] for buffers in staged]
            epilogue.ask(inputs, neurons, piece, to, arrived.at[which])

        def first_of_all():
            pl.when(n_mine > 0)(lambda: ask(look_up(jnp.int32(0)), jnp.int32(0)))
            return epilogue.nothing()

        def pack(ready, accumulator, place, following, nth, carry):
            n_pieces = (1 + place.paired) * _PIECES

            def pack_piece(number, carry):
                piece, which, half = piece_of(place, number)
                prepared = epilogue.prepare(inputs, piece)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                last = number + 1 == n_pieces

                @pl.when(~last | (nth + 1 < n_mine))
                def _():
                    upcoming = jax.tree.map(partial(jnp.where, last), following, place)
                    ask(upcoming, jnp.where(last, 0, number + 1))

                pl.when(number == 0)(ready)
                tokens = pl.ds(half * PANEL + piece.token, PIECE)
                product = plgpu.async_load_tmem(accumulator.at[:, tokens], layout=LAYOUT)
                plgpu.barrier_wait(arrived.at[which])
                buffers = [buffer.at[which] for buffer in staged]
                read = [plgpu.layout_cast(buffer[...], LAYOUT) for buffer in buffers]
                values, carry = epilogue.pack(product, read, prepared, inputs, piece, carry)
                for buffer, value in zip((*buffers, *single), values, strict=True):
                    buffer[...] = value
                plgpu.commit_smem()
                for buffer, ref in zip((*buffers, *single), results, strict=True):
                    plgpu.copy_smem_to_gmem(buffer, ref.at[piece.slots, piece.tokens])
                return carry

            return lax.fori_loop(0, n_pieces, pack_piece, carry)

        def finish(carry):
            epilogue.finish(carry, refs[n_inputs + epilogue.results :], program)

        blackwell_roles.run(
            blackwell_roles.Work(look_up, lambda place: jnp.int32(n_slices), load, multiply, pack, finish),
            n_mine,
            stages=stages,
            loading=lambda: None,
            packing=first_of_all,
            **common,
        )
