"""PanelELL's lists: which neurons each panel of tokens activates, made from what `pallas_triton_counts` has
counted.

**`build_lists`**: reads 2 M F / P bytes, writes 5 an active (panel, neuron) pair and for a backward 4 M F / P
of slots; adds up what has been counted, for which XLA would take a launch each. A program lists one block of
a panel's neurons: where the block begins follows from the counts, so no program waits for another, and there
are enough of them to fill the cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import varying_axes
from pallas_kernels.common.triton_tiles import scatter_index
from pallas_kernels.panel.pallas_triton_counts import Counts, block_of

_WARPS = 8
_PANELS = 8192
_HIT_ROWS = 128
HIT_COLUMNS = 64
"""Neurons of a program that adds up hits."""


class Totals(NamedTuple):
    """Sums of `Counts` over all panels.

    Attributes:
      hits: (F,) int32, for how many tokens a neuron is active.
      neurons: () int32, active (panel, neuron) pairs.
      gates: () f32, active gates.
      most: () int32, active gates of the token that has most.
      mean: () f32, active gates a token.
      overflow_rows, dense_tokens: () int32 each, all tokens if the lists have no room for them, else 0: what
        the statistics have twice, as two arrays, for one would be copied.
    """

    hits: jax.Array
    neurons: jax.Array
    gates: jax.Array
    most: jax.Array
    mean: jax.Array
    overflow_rows: jax.Array
    dense_tokens: jax.Array


class NeuronLists(NamedTuple):
    """Which neurons each panel has, as one array of slots that all panels share.

    Panel p owns the slots ``offsets[p]`` to ``offsets[p + 1]``, a multiple of the chunk; the first
    ``counts[p]`` hold neurons in ascending order, the rest neuron 0. Lists that would need more chunks than
    there are have no neuron: what a stage that runs all the same, as under ``vmap``, can walk in bounds.

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
      totals: (F,) int32, for how many tokens a neuron is active.
      needed: () int32, how many chunks the panels need.
      hits: (n_panels, F) uint8, for how many of a panel's tokens a neuron is active, also without room.
      slots: (n_panels, F) int32, the slot of a neuron in a panel, or -1; None where no backward reads it.
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
    totals: jax.Array
    needed: jax.Array
    hits: jax.Array
    slots: jax.Array | None = None
    tiles: jax.Array | None = None
    n_tiles: jax.Array | None = None

    @property
    def chunk(self) -> int:
        """What a panel's slots are a multiple of."""
        return self.neurons.shape[0] // self.owner.shape[0]


def n_chunks(n_panels: int, d_ff: int, chunk: int) -> int:
    """Chunks that hold every neuron of every panel."""
    return n_panels * pl.cdiv(d_ff, chunk)


def put(ref, place, value, mask):
    """Stores a vector's masked elements at places of an array."""
    plt.store(ref.at[scatter_index(place, mask)], value, mask=mask)


def build_lists(
    counts: Counts,
    *,
    tokens: int,
    chunk: int,
    room: int | None = None,
    tile: int | None = None,
    with_slots: bool = True,
    interpret: bool = False,
) -> tuple[NeuronLists, Totals]:
    """Lists of each panel's active neurons, and what the counts add up to.

    Args:
      tokens: that the panels are of.
      room: chunks of the lists, None for as many as there could be.
      tile: None, or the lists have tiles: as few as hold a panel's neurons if one holds so many.
      with_slots: whether the weight gradients will be wanted, which read the slots.
    """
    n_panels, d_ff = counts.hits.shape
    all_chunks = n_chunks(n_panels, d_ff, chunk)
    room = all_chunks if room is None else room
    output: Callable[..., Any] = partial(varying_axes.output, counts.hits)
    one, real, each_chunk = output((1,), jnp.int32), output((1,), jnp.float32), output((room,), jnp.int32)
    by_neuron, absent = output((d_ff,), jnp.int32), cast(Any, None)
    shapes = NeuronLists(
        neurons=output((room * chunk,), jnp.int32),
        segments=output((room * chunk,), jnp.uint8),
        owner=each_chunk,
        pairs=each_chunk,
        n_pairs=one,
        offsets=output((n_panels + 1,), jnp.int32),
        counts=output((n_panels,), jnp.int32),
        totals=by_neuron,
        needed=one,
        hits=absent,
        slots=output((n_panels, d_ff), jnp.int32) if with_slots else None,
        tiles=None if tile is None else output((n_panels * pl.cdiv(d_ff, tile),), jnp.int32),
        n_tiles=None if tile is None else one,
    )
    grid = _Grid(pl.cdiv(d_ff, HIT_COLUMNS), 1, n_panels, n_panels * counts.before.shape[1])
    lists, totals = pl.pallas_call(
        partial(
            _lists_kernel, grid=grid, tokens=tokens, chunk=chunk, tile=tile, may_overflow=room < all_chunks
        ),
        out_shape=(shapes, Totals(by_neuron, one, real, one, real, one, one)),
        grid=(sum(grid),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="panel_lists",
    )(counts)
    hits, *sums = totals
    lists = lists._replace(needed=lists.needed.reshape(()), hits=counts.hits)
    return lists, Totals(hits, *(value.reshape(()) for value in sums))


class _Grid(NamedTuple):
    """Programs of each kind, in the order in which they start: those that take longest first."""

    columns: int
    sums: int
    panels: int
    blocks: int


def _lists_kernel(counts, lists, totals, *, grid, tokens, chunk, tile, may_overflow):
    """Programs that each add up the hits of some neurons, one that adds up the rest, one for each panel's
    place in the lists, and one for each block of a panel's neurons."""
    n_panels, n_blocks = counts.before.shape

    def masked():
        """What leaves a value of lists that have room, and makes one of others 0."""
        if not may_overflow:
            return lambda value: value
        (needed,) = _earlier(counts.neurons, n_panels, chunk)
        return lambda value: jnp.where(needed <= lists.owner.shape[0], value, 0)

    def add_columns(nth):
        columns, hits = hits_of(counts.hits, nth, _HIT_ROWS)
        inside = columns < totals.hits.shape[0]
        plt.store(totals.hits.at[columns], hits, mask=inside)
        plt.store(lists.totals.at[columns], masked()(hits), mask=inside)

    def add_panels(_):
        totals.neurons[0] = _over_panels(counts.neurons, jnp.add, jnp.sum, jnp.int32)
        totals.most[0] = _over_panels(counts.most, jnp.maximum, jnp.max, jnp.int32)
        # f32, for there may be more gates than an int32 counts.
        gates = _over_panels(counts.gates, jnp.add, jnp.sum, jnp.float32)
        totals.gates[0], totals.mean[0] = gates, gates * (np.float32(1) / np.float32(tokens))
        dense = tokens - masked()(jnp.int32(tokens))
        totals.overflow_rows[0] = totals.dense_tokens[0] = dense

    def place(which):
        fitting = masked()
        _place_panel(which, counts, lists, chunk, fitting)
        if tile is not None:
            _cut_panel(which, counts, lists, tile, fitting)

    def list_block(nth):
        _list_block(nth // n_blocks, nth % n_blocks, counts, lists, chunk)

    first, program = 0, pl.program_id(0)
    for programs, work in zip(grid, (add_columns, add_panels, place, list_block), strict=True):
        own = (program >= first) & (program < first + programs)
        pl.when(own)(partial(work, program - first))
        first += programs


def _over_panels(ref, combine, reduce, dtype):
    """What the values of all panels, which are not negative, come to."""
    n_panels = ref.shape[0]
    width = min(_PANELS, pl.next_power_of_2(n_panels))

    def block(nth, found):
        panels = nth * width + lax.iota(jnp.int32, width)
        return combine(found, reduce(plt.load(ref.at[panels], mask=panels < n_panels, other=0).astype(dtype)))

    return lax.fori_loop(jnp.int32(0), jnp.int32(pl.cdiv(n_panels, width)), block, dtype(0))


def hits_of(by_rows_ref, nth, rows_at_once):
    """Block ``nth`` of the columns of hits (n_rows, F'), and the sum of each."""
    n_rows, width = by_rows_ref.shape
    height = min(rows_at_once, pl.next_power_of_2(n_rows))
    columns = nth * HIT_COLUMNS + lax.iota(jnp.int32, HIT_COLUMNS)

    def add_rows(block, total):
        rows = block * height + lax.iota(jnp.int32, height)
        here = (rows < n_rows)[:, None] & (columns < width)[None, :]
        hits = plt.load(by_rows_ref.at[rows[:, None], columns[None, :]], mask=here, other=0)
        return total + jnp.sum(hits.astype(jnp.int32), axis=0)

    blocks = jnp.int32(pl.cdiv(n_rows, height))
    return columns, lax.fori_loop(jnp.int32(0), blocks, add_rows, jnp.zeros((HIT_COLUMNS,), jnp.int32))


def _place_panel(which, counts, lists, chunk, fitting):
    """Writes where one panel's slots begin, what fills its last chunk, and its entries of the work lists."""
    n_panels, room = counts.neurons.shape[0], lists.owner.shape[0]
    chunks_before, pairs_before = _earlier(counts.neurons, which, chunk, 2 * chunk)
    count = counts.neurons[which]
    n_own = _groups(count, chunk)
    lists.counts[which] = fitting(count)
    lists.offsets[which] = fitting(chunks_before * chunk)

    @pl.when(which == n_panels - 1)
    def _():
        lists.needed[0] = chunks_before + n_own
        lists.offsets[n_panels] = fitting((chunks_before + n_own) * chunk)
        lists.n_pairs[0] = fitting(pairs_before + _groups(n_own, 2))

    tail = count + lax.iota(jnp.int32, chunk)
    slot = chunks_before * chunk + tail
    for ref in (lists.neurons, lists.segments):
        empty = (tail < n_own * chunk) & (slot < room * chunk)
        put(ref, slot, jnp.zeros((chunk,), ref.dtype), empty)
    nth = lax.iota(jnp.int32, pl.next_power_of_2(pl.cdiv(counts.hits.shape[1], chunk)))
    chunks = chunks_before + nth
    used = (nth < n_own) & (chunks < room)
    put(lists.owner, chunks, jnp.full(chunks.shape, which), used)
    followed = (nth + 1 < n_own).astype(jnp.int32)
    put(lists.pairs, pairs_before + nth // 2, 2 * chunks + followed, used & (nth % 2 == 0))


def _cut_panel(which, counts, lists, tile, fitting):
    """Writes one panel's tiles."""
    n_panels, most = counts.neurons.shape[0], pl.cdiv(counts.hits.shape[1], tile)
    (before,) = _earlier(counts.neurons, which, tile)
    n_own = _groups(counts.neurons[which], tile)

    @pl.when(which == n_panels - 1)
    def _():
        lists.n_tiles[0] = fitting(before + n_own)

    nth = lax.iota(jnp.int32, pl.next_power_of_2(most))
    put(lists.tiles, before + nth, which * most + nth, nth < n_own)


def _list_block(which, block, counts, lists, chunk):
    """Writes one block of a panel's neurons."""
    d_ff, n_slots = counts.hits.shape[1], lists.neurons.shape[0]
    width = block_of(d_ff)
    neuron = block * width + lax.iota(jnp.int32, width)
    inside = neuron < d_ff
    bits = plt.load(counts.segments.at[which, neuron], mask=inside, other=0)
    # Every program sums up the panels before its own: n² additions, and no launch of their own.
    (chunks_before,) = _earlier(counts.neurons, which, chunk)
    listed = (bits > 0).astype(jnp.int32)
    slot = chunks_before * chunk + counts.before[which, block] + jnp.cumsum(listed) - listed
    here = (listed > 0) & (slot < n_slots)
    put(lists.neurons, slot, neuron, here)
    put(lists.segments, slot, bits, here)
    if lists.slots is not None:
        plt.store(lists.slots.at[which, neuron], jnp.where(here, slot, -1), mask=inside)


def _earlier(counts_ref, which, *sizes):
    """How many groups of each size the neurons of all panels before one make, each panel's its own."""
    width = min(_PANELS, pl.next_power_of_2(counts_ref.shape[0]))

    def block(nth, sums):
        panels = nth * width + lax.iota(jnp.int32, width)
        counts = plt.load(counts_ref.at[panels], mask=panels < which, other=0)
        return tuple(total + jnp.sum(_groups(counts, size)) for total, size in zip(sums, sizes, strict=True))

    nothing = (jnp.int32(0),) * len(sizes)
    return lax.fori_loop(jnp.int32(0), (which + width - 1) // width, block, nothing)


def _groups(count, size):
    """As few groups as hold ``count`` if one holds ``size``."""
    return (count + (size - 1)) // size
