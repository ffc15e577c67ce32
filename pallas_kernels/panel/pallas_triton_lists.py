"""PanelELL's lists: which neurons each panel of tokens activates, made from what the gate stage has counted.

**`count_active`**: reads the counts of hits and of each token's gates, writes M F / P bytes.
**`build_lists`**: reads the hits again, writes 4 M F / P bytes of slots and 4 an active (panel, neuron) pair;
adds up what has been counted, for which XLA would take a launch each.

Limits. Those of the gate stages that write a `GatePanel`; panels of at most 128 tokens, whose hits a byte
counts.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import varying_axes
from pallas_kernels.common.triton_tiles import scatter_index

_LIST_BLOCK = 8192
_HIT_ROWS = 256
HIT_COLUMNS = 64
"""Neurons of a program that adds up hits."""


class GatePanel(NamedTuple):
    """What a gate stage gives of the panels.

    Attributes:
      values: (n_panels, F', P), F' of at least F: the rectified gates, written where ``hits`` is above 0.
      hits: (n_panels * segments, F') uint8: for how many of a segment's P / segments tokens a
        neuron is active.
      nnz: (n_tiles, n_panels * P) int32, active gates of each token in each tile of columns.
    """

    values: jax.Array
    hits: jax.Array
    nnz: jax.Array

    @property
    def segments(self) -> int:
        """Segments of a panel: values stand only in those that the neuron is active in."""
        return self.hits.shape[0] // self.values.shape[0]


class Counts(NamedTuple):
    """How many gates of each panel are active.

    Attributes:
      neurons: (n_panels,) int32, neurons that are active for at least one token.
      gates: (n_panels,) int32, active gates of all tokens.
      most: (n_panels,) int32, active gates of the token that has most.
      hits: (n_panels, F) uint8, for how many of the tokens a neuron is active.
    """

    neurons: jax.Array
    gates: jax.Array
    most: jax.Array
    hits: jax.Array


class Totals(NamedTuple):
    """Sums of `Counts` over all panels.

    Attributes:
      hits: (F,) int32, for how many tokens a neuron is active.
      neurons: () int32, active (panel, neuron) pairs.
      gates: () f32, active gates.
      most: () int32, active gates of the token that has most.
    """

    hits: jax.Array
    neurons: jax.Array
    gates: jax.Array
    most: jax.Array


class NeuronLists(NamedTuple):
    """Which neurons each panel has, as one array of slots that all panels share.

    Panel p owns the slots ``offsets[p]`` to ``offsets[p + 1]``, a multiple of the chunk; the first
    ``counts[p]`` hold neurons in ascending order, the rest neuron 0.

    Attributes:
      neurons: (n_slots,) int32.
      segments: (n_slots,) uint8, a bit for each segment of the panel in which the neuron is active; 0
        past the count.
      owner: (n_slots / chunk,) int32, the panel of each chunk in use.
      pairs: (n_slots / chunk,) int32, every panel's first chunk, third, and so on: twice its number, and one
        more where the panel has the next chunk too.
      n_pairs: (1,) int32, how many those are.
      offsets: (n_panels + 1,) int32.
      counts: (n_panels,) int32.
      slots: (n_panels, F) int32, the slot of a neuron in a panel, or -1.
      hits: (n_panels, F) uint8, for how many of a panel's tokens a neuron is active.
      tiles: (n_panels * most,) int32, where the lists are also cut into tiles, of which a panel has ``most``
        at most: ``panel * most + nth`` of each, panel by panel; else None.
      n_tiles: (1,) int32, how many those are, or None.
    """

    neurons: jax.Array
    segments: jax.Array
    owner: jax.Array
    pairs: jax.Array
    n_pairs: jax.Array
    offsets: jax.Array
    counts: jax.Array
    slots: jax.Array
    hits: jax.Array
    tiles: jax.Array | None = None
    n_tiles: jax.Array | None = None

    @property
    def chunk(self) -> int:
        """What a panel's slots are a multiple of."""
        return self.neurons.shape[0] // self.owner.shape[0]

    @property
    def needed(self) -> jax.Array:
        """() int32, how many chunks the panels need: with more than there are, only ``hits`` means something,
        and a stage may have no other lists than `only_if` this fits."""
        return self.offsets[-1] // self.chunk

    def only_if(self, fits: jax.Array) -> "NeuronLists":
        """The lists, or lists without a neuron: what a stage that runs all the same can walk in bounds.

        Under ``vmap`` both branches of a conditional run.
        """
        names = ["n_pairs", "offsets", "counts", "hits", *(["n_tiles"] if self.tiles is not None else [])]
        return self._replace(**{name: jnp.where(fits, getattr(self, name), 0) for name in names})


def n_chunks(n_panels: int, d_ff: int, chunk: int) -> int:
    """Chunks that hold every neuron of every panel."""
    return n_panels * pl.cdiv(d_ff, chunk)


def count_active(gate: GatePanel, *, d_ff: int, interpret: bool = False) -> Counts:
    """Sums what the gate stage has counted by segments of a panel and tiles of columns."""
    n_panels = gate.values.shape[0]
    each = varying_axes.output(gate.hits, (n_panels,), jnp.int32)
    neurons, gates, most, hits = pl.pallas_call(
        partial(_count_kernel, segments=gate.segments, panel=gate.values.shape[2], d_ff=d_ff),
        out_shape=(each, each, each, varying_axes.output(gate.hits, (n_panels, d_ff), jnp.uint8)),
        grid=(n_panels,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        name="panel_count",
    )(gate.hits, gate.nnz)
    return Counts(neurons, gates, most, hits)


def _count_kernel(
    by_segment_ref, nnz_ref, neurons_ref, gates_ref, most_ref, hits_ref, *, segments, panel, d_ff
):
    which = pl.program_id(0)

    def add_tile(tile, nnz):
        return nnz + plt.load(nnz_ref.at[tile, which * panel + lax.iota(jnp.int32, panel)])

    n_tiles = jnp.int32(nnz_ref.shape[0])
    nnz = lax.fori_loop(jnp.int32(0), n_tiles, add_tile, jnp.zeros((panel,), jnp.int32))
    gates_ref[which], most_ref[which] = jnp.sum(nnz), jnp.max(nnz)

    def add_block(neuron, inside, neurons):
        hits = jnp.zeros(neuron.shape, jnp.int32)
        for segment in range(segments):
            place = by_segment_ref.at[which * segments + segment, neuron]
            hits += plt.load(place, mask=inside, other=0).astype(jnp.int32)
        plt.store(hits_ref.at[which, neuron], hits.astype(jnp.uint8), mask=inside)  # at most P of 128
        return neurons + jnp.sum((hits > 0).astype(jnp.int32))

    neurons_ref[which] = over_neurons(d_ff, add_block)


def over_neurons(d_ff, body):
    """Sums ``body(neurons, which of them are below F, sum so far)`` up over blocks of all neurons."""
    width = min(_LIST_BLOCK, pl.next_power_of_2(d_ff))

    def block(nth, total):
        neuron = nth * width + lax.iota(jnp.int32, width)
        return body(neuron, neuron < d_ff, total)

    return lax.fori_loop(jnp.int32(0), jnp.int32(pl.cdiv(d_ff, width)), block, jnp.int32(0))


def put(ref, place, value, mask):
    """Stores a vector's masked elements at places of an array."""
    plt.store(ref.at[scatter_index(place, mask)], value, mask=mask)


def build_lists(
    gate: GatePanel,
    counts: Counts,
    *,
    chunk: int,
    room: int | None = None,
    tile: int | None = None,
    interpret: bool = False,
) -> tuple[NeuronLists, Totals]:
    """Lists of each panel's active neurons, in ``room`` chunks (by default as many as there could be), and
    what the counts add up to.

    With ``tile`` the lists have tiles: as few as hold a panel's neurons if one holds so many.
    """
    n_panels, d_ff = counts.hits.shape
    room = n_chunks(n_panels, d_ff, chunk) if room is None else room
    output = partial(varying_axes.output, gate.hits)
    one, each_chunk = output((1,), jnp.int32), output((room,), jnp.int32)
    in_tiles = [] if tile is None else [output((n_panels * pl.cdiv(d_ff, tile),), jnp.int32), one]
    neurons, segments, owner, pairs, n_pairs, offsets, slots, hits, *others = pl.pallas_call(
        partial(_lists_kernel, d_ff=d_ff, segments=gate.segments, chunk=chunk, tile=tile),
        out_shape=(
            output((room * chunk,), jnp.int32),
            output((room * chunk,), jnp.uint8),
            each_chunk,
            each_chunk,
            one,
            output((n_panels + 1,), jnp.int32),
            output((n_panels, d_ff), jnp.int32),
            output((d_ff,), jnp.int32),
            one,
            output((1,), jnp.float32),
            one,
            *in_tiles,
        ),
        grid=(n_panels + pl.cdiv(d_ff, HIT_COLUMNS) + 1,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        name="panel_lists",
    )(gate.hits, *counts)
    sums, tiles = others[:3], others[3:]
    lists = NeuronLists(
        neurons, segments, owner, pairs, n_pairs, offsets, counts.neurons, slots, counts.hits, *tiles
    )
    return lists, Totals(hits, *(value.reshape(()) for value in sums))


def _lists_kernel(
    by_segment_ref, counts_ref, gates_ref, most_ref, hits_ref, *outputs, d_ff, segments, chunk, tile
):
    """The first programs list a panel each, others add up the hits of some neurons, the last one the rest."""
    list_refs, (total_hits_ref, pairs_ref, total_gates_ref, total_most_ref), tile_refs = (
        outputs[:7],
        outputs[7:11],
        outputs[11:],
    )
    program, n_panels = pl.program_id(0), counts_ref.shape[0]
    n_columns = pl.cdiv(d_ff, HIT_COLUMNS)

    @pl.when(program < n_panels)
    def _():
        _list_panel(
            program, by_segment_ref, counts_ref, *list_refs, d_ff=d_ff, segments=segments, chunk=chunk
        )
        if tile is not None:
            _cut_panel(program, counts_ref, *tile_refs, d_ff=d_ff, tile=tile)

    @pl.when((program >= n_panels) & (program < n_panels + n_columns))
    def _():
        add_hits(hits_ref, total_hits_ref, program - n_panels)

    @pl.when(program == n_panels + n_columns)
    def _():
        pairs_ref[0] = _over_panels(counts_ref, jnp.add, jnp.sum, jnp.int32)
        # f32, for there may be more gates than an int32 counts.
        total_gates_ref[0] = _over_panels(gates_ref, jnp.add, jnp.sum, jnp.float32)
        total_most_ref[0] = _over_panels(most_ref, jnp.maximum, jnp.max, jnp.int32)


def _over_panels(ref, combine, reduce, dtype):
    """What the values of all panels, which are not negative, come to."""
    n_panels = ref.shape[0]
    width = min(_LIST_BLOCK, pl.next_power_of_2(n_panels))

    def block(nth, found):
        panels = nth * width + lax.iota(jnp.int32, width)
        return combine(found, reduce(plt.load(ref.at[panels], mask=panels < n_panels, other=0).astype(dtype)))

    return lax.fori_loop(jnp.int32(0), jnp.int32(pl.cdiv(n_panels, width)), block, dtype(0))


def add_hits(by_rows_ref, hits_ref, nth):
    """Sums block ``nth`` of the columns of hits (n_rows, F') up into hits (F,)."""
    n_rows, (d_ff,) = by_rows_ref.shape[0], hits_ref.shape
    height = min(_HIT_ROWS, pl.next_power_of_2(n_rows))
    columns = nth * HIT_COLUMNS + lax.iota(jnp.int32, HIT_COLUMNS)

    def add_rows(block, total):
        rows = block * height + lax.iota(jnp.int32, height)
        here = (rows < n_rows)[:, None] & (columns < d_ff)[None, :]
        hits = plt.load(by_rows_ref.at[rows[:, None], columns[None, :]], mask=here, other=0)
        return total + jnp.sum(hits.astype(jnp.int32), axis=0)

    blocks = jnp.int32(pl.cdiv(n_rows, height))
    total = lax.fori_loop(jnp.int32(0), blocks, add_rows, jnp.zeros((HIT_COLUMNS,), jnp.int32))
    plt.store(hits_ref.at[columns], total, mask=columns < d_ff)


def _list_panel(
    which,
    by_segment_ref,
    counts_ref,
    neurons_ref,
    segments_ref,
    owner_ref,
    pairs_ref,
    n_pairs_ref,
    offsets_ref,
    slots_ref,
    *,
    d_ff,
    segments,
    chunk,
):
    n_panels = counts_ref.shape[0]
    # Every program sums up the panels before its own: n² additions, and no launch of their own.
    chunks_before, pairs_before = _earlier(counts_ref, which, chunk, 2 * chunk)
    count = counts_ref[which]
    n_own = _groups(count, chunk)
    start, end, room = chunks_before * chunk, (chunks_before + n_own) * chunk, neurons_ref.shape[0]
    offsets_ref[which] = start

    @pl.when(which == n_panels - 1)
    def _():
        offsets_ref[n_panels] = end
        n_pairs_ref[0] = pairs_before + (n_own + 1) // 2

    def list_block(neuron, inside, found):
        bits = jnp.zeros(neuron.shape, jnp.int32)
        for segment in range(segments):
            hits = plt.load(by_segment_ref.at[which * segments + segment, neuron], mask=inside, other=0)
            bits |= (hits > 0).astype(jnp.int32) << segment
        listed = (bits > 0).astype(jnp.int32)
        slot = start + found + jnp.cumsum(listed) - listed
        here = (listed > 0) & (slot < room)
        put(neurons_ref, slot, neuron, here)
        put(segments_ref, slot, bits.astype(jnp.uint8), here)
        plt.store(slots_ref.at[which, neuron], jnp.where(here, slot, -1), mask=inside)
        return found + jnp.sum(listed)

    over_neurons(d_ff, list_block)
    tail = start + count + lax.iota(jnp.int32, chunk)
    for ref in (neurons_ref, segments_ref):
        put(ref, tail, jnp.zeros((chunk,), ref.dtype), (tail < end) & (tail < room))
    nth = lax.iota(jnp.int32, pl.next_power_of_2(pl.cdiv(d_ff, chunk)))
    chunks = chunks_before + nth
    used = (nth < n_own) & (chunks * chunk < room)
    put(owner_ref, chunks, jnp.full(chunks.shape, which), used)
    followed = (nth + 1 < n_own).astype(jnp.int32)
    put(pairs_ref, pairs_before + nth // 2, 2 * chunks + followed, used & (nth % 2 == 0))


def _cut_panel(which, counts_ref, tiles_ref, n_tiles_ref, *, d_ff, tile):
    """Writes one panel's tiles."""
    n_panels, most = counts_ref.shape[0], pl.cdiv(d_ff, tile)
    (before,) = _earlier(counts_ref, which, tile)
    n_own = _groups(counts_ref[which], tile)

    @pl.when(which == n_panels - 1)
    def _():
        n_tiles_ref[0] = before + n_own

    nth = lax.iota(jnp.int32, pl.next_power_of_2(most))
    put(tiles_ref, before + nth, which * most + nth, nth < n_own)


def _earlier(counts_ref, which, *sizes):
    """How many groups of each size the neurons of all panels before one make, each panel's its own."""
    n_panels = counts_ref.shape[0]
    width = min(_LIST_BLOCK, pl.next_power_of_2(n_panels))

    def block(nth, sums):
        panels = nth * width + lax.iota(jnp.int32, width)
        counts = plt.load(counts_ref.at[panels], mask=panels < which, other=0)
        return tuple(total + jnp.sum(_groups(counts, size)) for total, size in zip(sums, sizes, strict=True))

    nothing = (jnp.int32(0),) * len(sizes)
    return lax.fori_loop(jnp.int32(0), (which + width - 1) // width, block, nothing)


def _groups(count, size):
    """As few groups as hold ``count`` if one holds ``size``."""
    return (count + size - 1) // size
