"""The up projection of PanelELL for Blackwell: `blackwell_gathered` of Wu, with h as its epilogue.

A tile is one chunk of a panel's slots, or two where the panel has two left, and the panel's 128 tokens: lists
are walked in pairs of chunks, as by Triton's kernel. Slots are lanes of tensor memory, so a tile stands there
as gates, projection and h stand in global memory, and the copy engine moves all three: it gathers gates as it
gathers weights, and stores h from where its gates were.

Work: 2 M union D FLOPs, a panel's union filled up to whole chunks. Bytes, mostly from L2: M union D / 64 of
weights, M union D / 128 of x; 4 M union of gates and h, and 4 M union more where both projections are kept.

Numerics. As `panel_up` on Triton: f32 accumulation; the projection and h are rounded. l1 is summed in another
order, which is always the same.

Limits. Those of `blackwell_gathered`; gated layers, one l1 for all tokens, and the whole of x at once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.common.hopper_gemm import TILE_K
from pallas_kernels.common.hopper_ring import launch
from pallas_kernels.panel import blackwell_gathered
from pallas_kernels.panel.blackwell_gathered import CHUNK, PANEL, PIECE, WARPGROUPS, shared_memory
from pallas_kernels.panel.config import SEGMENT
from pallas_kernels.panel.pallas_triton import Hidden, hidden
from pallas_kernels.panel.pallas_triton_lists import GatePanel, NeuronLists

_HALVES = 2
"""Chunks of a tile at most."""
_PIECES = PANEL // PIECE
_GATES = 2
"""Pieces of gates in shared memory: one is packed while the next one arrives."""
_ROWS = plgpu.Layout.TCGEN05.reduce(1)


class Place(NamedTuple):
    """Where a tile stands: its panel and first slot, and whether it has a second chunk."""

    panel: jax.Array
    slot: jax.Array
    paired: jax.Array


def panel_up(
    gate: GatePanel,
    lists: NeuronLists,
    x: jax.Array,
    w_up: jax.Array,
    *,
    rule: Rule = RELU,
    keep: bool = False,
    gather: blackwell_gathered.Gather = blackwell_gathered.gather,
    interpret: Any = None,
) -> Hidden:
    """`pallas_triton.panel_up` for panels of 128 tokens in segments of 16, and chunks of 128 slots: x (M, D),
    w_up (F, D), D a multiple of 64; in bf16 or f16.

    Args:
      keep: whether the gates and the up projection are wanted too.
      gather: another than the copy engine's, for an interpreter.
      interpret: what `plgpu.kernel` takes by this name.
    """
    programs = blackwell_gathered.programs(lists.pairs.shape[0])
    slots = jax.ShapeDtypeStruct((lists.neurons.shape[0], PANEL), x.dtype)
    sums = jax.ShapeDtypeStruct((programs * CHUNK,), jnp.float32)
    # Copies describe x in groups of eight rows. The gate stage's x is padded alike: the two are one array.
    x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
    outputs = launch(
        partial(_kernel, programs=programs, keep=keep, rule=rule, width=gate.values.shape[1], gather=gather),
        out_type=(slots, sums, *[slots] * (2 * keep)),
        programs=programs,
        warpgroups=WARPGROUPS,
        name="panel_up",
        interpret=interpret,
    )(
        lists.pairs,
        lists.n_pairs,
        lists.owner,
        lists.neurons,
        lists.segments,
        gate.values.reshape(-1, PANEL),
        x,
        w_up,
    )
    # Mosaic GPU's outputs do not say so themselves.
    h, l1, *kept = varying_axes.vary_with(x, outputs)
    return Hidden(h, jnp.sum(l1), *(kept or (None, None)))


def _kernel(
    pairs,
    n_pairs,
    owner,
    neurons,
    segments,
    values,
    x,
    w,
    h,
    l1,
    *kept,
    programs,
    keep,
    rule,
    width,
    gather,
):
    """Gates arrive in pieces of 128 slots and 64 tokens, which the packing warpgroup asks for itself, a piece
    ahead, and overwrites with a result once it has them in registers."""
    n_slices, n_slots = x.shape[1] // TILE_K, neurons.shape[0]
    stages = 3 if keep else 4  # with the pieces they take 208 and 224 of 227 KiB of shared memory
    program = lax.axis_index("program")
    n_mine = lax.div(jnp.maximum(n_pairs[0] - program, 0) + programs - 1, jnp.int32(programs))

    @partial(
        pl.run_scoped,
        x_ring=shared_memory(stages, PANEL, TILE_K, dtype=x.dtype),
        w_ring=shared_memory(stages, _HALVES * CHUNK, TILE_K, dtype=x.dtype),
        gates=shared_memory(_GATES, CHUNK, PIECE, dtype=x.dtype),
        others=[shared_memory(CHUNK, PIECE, dtype=x.dtype) for _ in kept],
        arrived=plgpu.Barrier(num_barriers=_GATES),
        common=blackwell_gathered.scratch(stages, arrivals=1 + _HALVES),
        collective_axes="warpgroup",
    )
    def _program(x_ring, w_ring, gates, others, arrived, common):
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
            rows = [
                blackwell_gathered.look_up(neurons, half_of(place, half), CHUNK) for half in range(_HALVES)
            ]

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
                slots = pl.ds(half * CHUNK, CHUNK)
                plgpu.tcgen05_mma(
                    accumulator.at[:, pl.ds(half * PANEL, PANEL)],
                    w_ring.at[stage, slots],
                    x_ring.at[stage].T,
                    accumulate=accumulate,
                )

            multiply_half(0)
            pl.when(place.paired > 0)(lambda: multiply_half(1))

        def ask(place, half, piece):
            """Starts copying a piece of gates to where the last one but one was, whose results have left."""
            rows = blackwell_gathered.look_up(neurons, half_of(place, half), CHUNK)
            rows += (place.panel * width).astype(jnp.uint32)
            columns, which = pl.ds(piece * PIECE, PIECE), lax.rem(piece, jnp.int32(_GATES))
            gather(values, rows, columns, gates.at[which], arrived.at[which])

        def first_gates():
            pl.when(n_mine > 0)(lambda: ask(look_up(jnp.int32(0)), jnp.int32(0), jnp.int32(0)))
            return plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), _ROWS)

        def pack(ready, accumulator, place, following, nth, sums):
            n_pieces = (1 + place.paired) * _PIECES

            def pack_piece(number, sums):
                half, piece = lax.div(number, jnp.int32(_PIECES)), lax.rem(number, jnp.int32(_PIECES))
                slot, columns = half_of(place, half), pl.ds(piece * PIECE, PIECE)
                bits = blackwell_gathered.load_vector(segments, slot, CHUNK, _ROWS).astype(jnp.int32)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                last = number + 1 == n_pieces

                @pl.when(~last | (nth + 1 < n_mine))
                def _():
                    upcoming = jax.tree.map(partial(jnp.where, last), following, place)
                    behind = jnp.where(last, 0, number + 1)
                    ask(upcoming, lax.div(behind, jnp.int32(_PIECES)), lax.rem(behind, jnp.int32(_PIECES)))

                pl.when(number == 0)(ready)
                tokens = pl.ds(half * PANEL + piece * PIECE, PIECE)
                up = plgpu.async_load_tmem(accumulator.at[:, tokens], layout=plgpu.Layout.TCGEN05)
                up = up.astype(x.dtype)
                plgpu.barrier_wait(arrived.at[piece])
                gate = plgpu.layout_cast(gates[piece], plgpu.Layout.TCGEN05)
                token = plgpu.broadcasted_iota(jnp.int32, gate.shape, 1, layout=plgpu.Layout.TCGEN05)
                segment = lax.shift_right_logical(token + piece * PIECE, SEGMENT.bit_length() - 1)
                bits = lax.broadcast_in_dim(bits, gate.shape, (0,))
                gate = jnp.where(lax.shift_right_logical(bits, segment) & 1 > 0, gate, jnp.zeros_like(gate))
                value = hidden(gate, up, rule)
                buffers = gates.at[piece], *others
                for buffer, array in zip(buffers, (value, gate, up), strict=False):
                    buffer[...] = array
                plgpu.commit_smem()
                for buffer, ref in zip(buffers, (h, *kept), strict=True):
                    plgpu.copy_smem_to_gmem(buffer, ref.at[pl.ds(slot, CHUNK), columns])
                return sums + jnp.sum(jnp.abs(value.astype(jnp.float32)), axis=1)

            return lax.fori_loop(0, n_pieces, pack_piece, sums)

        def finish(sums):
            l1[pl.ds(program * CHUNK, CHUNK)] = sums

        blackwell_gathered.run(
            blackwell_gathered.Work(look_up, lambda place: jnp.int32(n_slices), load, multiply, pack, finish),
            n_mine,
            stages=stages,
            loading=lambda: None,
            packing=first_gates,
            **common,
        )
