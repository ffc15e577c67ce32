"""The weight gradients of PanelELL in Pallas Triton: frequent neurons on tensor cores, the others
token by token.

    dWg = dg^T x      dWu = du^T x      dWd = h^T dy      over the slots of all panels

A neuron that is active for many tokens is worth a row of a dense product over all of them; one that is active
for few is not, and most neurons are like that: in a layer of 5632 at a mean of 30 active gates a token, 430
neurons hold 60 % of all activity, and 3500 share the rest. The border is where both ways take the
same time, `RareConfig.share`. The dense product runs in rounds of as many programs as the cores hold, and a
round that is not full takes as long as a full one; so the busiest rare neurons fill the last round.

**`panel_rank`**: the neurons from busy to quiet, and how many tokens of earlier panels activate each. A
program has some of the neurons and counts those before them among all, so no program waits for another.
Reads M F / P bytes, writes 4 M F / P.

**`panel_dw_hot`**, frequent neurons: 6 M hot D FLOPs on tensor cores. A program owns a tile of hot neurons
and of D in one of the gradients, and walks all panels: what a panel has of its neurons is gathered by slot, P
contiguous values a neuron. All gradients are one launch: a program's walk is long, and those of one gradient
alone are too few to hide it.

**`panel_token_lists`**: for every rare neuron its tokens, ascending, written from the panels' lists: where
each panel's part of a neuron's list begins is known, so no program waits for another. Reads the gates, 2 M
union bytes; writes 8 bytes an active (token, rare neuron) pair.

**`panel_dw_rare`**, one program a neuron and slice of D: 4 n D bytes of x and dy gathered from L2 for n
tokens, all three gradients in registers. Programs run slice by slice, so that a slice of x and dy stays in
L2, and in a slice the longer lists first, so that no long one is left last. It also writes the rows of
neurons that no token activated, which are zeros.

No two programs write one value and none is added in memory: the same input gives the same bits.

**Numerics.** f32 accumulation over all tokens, one rounding to the result's type at the end.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import device
from pallas_kernels.activations import stored_active
from pallas_kernels.common import varying_axes
from pallas_kernels.common.products import dot
from pallas_kernels.common.triton_tiles import scatter_index
from pallas_kernels.panel.config import HotConfig
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

_LIST_TILE = 32
_RANK_ROWS, _RANK_COLUMNS = 128, 32
_ORDER_BLOCK = 8192


# -- which neurons are hot -----------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """The neurons, from busy to quiet.

    Attributes:
      totals: (F,) int32, for how many tokens each neuron is active.
      order: (F,) int32, all neurons, by classes of their totals.
      n_hot: (1,) int32, how many of the first are hot; the others are rare.
      starts: (n_panels, F) int32, how many tokens of earlier panels activate a rare neuron; -1 for a hot one.
    """

    totals: jax.Array
    order: jax.Array
    n_hot: jax.Array
    starts: jax.Array


def rank(
    hits: jax.Array,
    totals: jax.Array,
    *,
    limit: int,
    round_up: Callable[[jax.Array], jax.Array],
    interpret: bool = False,
) -> Ranking:
    """Orders the neurons by their hits (n_panels, F), which sum up to totals (F,). Those of more than
    ``limit`` tokens are hot, and so are the next in the order, up to ``round_up`` of how many exceed the
    limit."""
    output = partial(varying_axes.output, totals)
    order, n_hot, starts = pl.pallas_call(
        partial(_rank_kernel, bounds=(limit, limit // 2, limit // 8, 0, -1), round_up=round_up),
        out_shape=(
            output(totals.shape, jnp.int32),
            output((1,), jnp.int32),
            output(hits.shape, jnp.int32),
        ),
        grid=(pl.cdiv(totals.shape[0], _RANK_COLUMNS),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="panel_rank",
    )(hits, totals)
    return Ranking(totals, order, n_hot, starts)


def fill_rounds(neurons: jax.Array, *, tiles: int, config: HotConfig) -> jax.Array:
    """The most neurons whose dense product takes no longer than that of ``neurons``.

    ``config.tile`` neurons are ``tiles`` programs, and the cores hold ``config.per_core`` programs each.
    """
    rows = (neurons + (config.tile - 1)) // config.tile
    at_once = device.current().cores * config.per_core
    if at_once >= tiles:
        rounds = (rows * tiles + (at_once - 1)) // at_once
        rows = rounds * at_once // tiles
    return rows * config.tile


def _rank_kernel(hits_ref, totals_ref, order_ref, n_hot_ref, starts_ref, *, bounds, round_up):
    """A program finds the places of some neurons in the order, and where their tokens begin in each panel.

    Every program looks at the totals of all neurons, and waits for no other.
    """
    (d_ff,) = totals_ref.shape
    first = pl.program_id(0) * _RANK_COLUMNS
    neurons = first + lax.iota(jnp.int32, _RANK_COLUMNS)
    totals = plt.load(totals_ref.at[neurons], mask=neurons < d_ff, other=-1)
    above, earlier = _counts_above(totals_ref, first, bounds)
    n_hot = jnp.minimum(round_up(above[0]), d_ff)
    # A class begins where all neurons above its upper bound end, and in it come those before this program's.
    upper, place = jnp.zeros(neurons.shape, bool), jnp.full(neurons.shape, d_ff)
    begins = [jnp.int32(0), *above[:-1]], [jnp.int32(0), *earlier[:-1]]
    for bound, before, begin, before_begin in zip(bounds, earlier, *begins, strict=True):
        own = (totals > bound) & ~upper
        counted = own.astype(jnp.int32)
        nth = begin + before - before_begin + jnp.cumsum(counted) - counted
        upper, place = upper | own, jnp.where(own, nth, place)
    plt.store(order_ref.at[scatter_index(place, neurons < d_ff)], neurons, mask=neurons < d_ff)

    @pl.when(pl.program_id(0) == 0)
    def _():
        n_hot_ref[0] = n_hot

    _find_starts(hits_ref, starts_ref, neurons, place < n_hot)


def _counts_above(totals_ref, first, bounds):
    """How many neurons have more hits than each bound, and how many of those come before ``first``."""
    (d_ff,) = totals_ref.shape
    width = min(_ORDER_BLOCK, pl.next_power_of_2(d_ff))

    def add_block(nth, found):
        neuron = nth * width + lax.iota(jnp.int32, width)
        totals = plt.load(totals_ref.at[neuron], mask=neuron < d_ff, other=-1)
        # One sum of a block for both numbers, each of which has less than 16 bits.
        weight = jnp.where(neuron < first, 0x10001, 1)
        sums = [jnp.sum(jnp.where(totals > bound, weight, 0)) for bound in bounds]
        each = [(total & 0xFFFF, total >> 16) for total in sums]
        return jax.tree.map(jnp.add, found, each)

    blocks = jnp.int32(pl.cdiv(d_ff, width))
    found = lax.fori_loop(jnp.int32(0), blocks, add_block, [(jnp.int32(0), jnp.int32(0))] * len(bounds))
    above, earlier = zip(*found, strict=True)
    return above, earlier


def _find_starts(hits_ref, starts_ref, neurons, is_hot):
    n_panels, d_ff = hits_ref.shape
    height = min(_RANK_ROWS, pl.next_power_of_2(n_panels))

    def add_block(nth, before):
        panels = nth * height + lax.iota(jnp.int32, height)
        here = (panels < n_panels)[:, None] & (neurons < d_ff)[None, :]
        place = (panels[:, None], neurons[None, :])
        hits = plt.load(hits_ref.at[place], mask=here, other=0).astype(jnp.int32)
        starts = before[None, :] + jnp.cumsum(hits, axis=0) - hits
        plt.store(starts_ref.at[place], jnp.where(is_hot[None, :], -1, starts), mask=here)
        return before + jnp.sum(hits, axis=0)

    blocks = jnp.int32(pl.cdiv(n_panels, height))
    lax.fori_loop(jnp.int32(0), blocks, add_block, jnp.zeros(neurons.shape, jnp.int32))


# -- hot neurons ---------------------------------------------------------------------------------------------


def panel_dw_hot(zs, xs, ranking, slots, *, config, dtype, interpret=False):
    """For each z (n_slots, P) and its x (M, D): ``dW[j] = sum over tokens of z[j] x`` in the rows of
    hot neurons j.

    Other rows of the (F, D) results are not written.
    """
    (d_ff,), d_model = ranking.order.shape, xs[0].shape[1]
    tiles = pl.cdiv(d_ff, config.tile) * pl.cdiv(d_model, config.tile_d)
    return pl.pallas_call(
        partial(_hot_kernel, panel=zs[0].shape[1], count=len(zs), config=config),
        out_shape=(varying_axes.output(zs[0], (d_ff, d_model), dtype),) * len(zs),
        grid=(tiles * len(zs),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="panel_dw_hot",
    )(ranking.order, ranking.n_hot, slots, *zs, xs[0], xs[-1])


def _hot_kernel(order_ref, n_hot_ref, slots_ref, *refs, panel, count, config):
    z_refs, (x_ref, dy_ref), outputs = refs[:count], refs[count : count + 2], refs[count + 2 :]
    (tokens, d_model), (d_ff,), n_hot = x_ref.shape, order_ref.shape, n_hot_ref[0]
    n_columns = pl.cdiv(d_model, config.tile_d)
    tile_id, which_z = pl.program_id(0) // count, pl.program_id(0) % count
    first = tile_id // n_columns * config.tile
    slices = panel // config.tile_k

    def sum_into(out_ref, z_ref, x_ref):
        nth = first + lax.iota(jnp.int32, config.tile)
        hot, neurons = nth < n_hot, plt.load(order_ref.at[jnp.minimum(nth, d_ff - 1)])
        columns = (tile_id % n_columns * config.tile_d + lax.iota(jnp.int32, config.tile_d))[None, :]

        def step(i, acc):
            which, within = i // slices, i % slices * config.tile_k + lax.iota(jnp.int32, config.tile_k)
            slot = plt.load(slots_ref.at[which, neurons])
            present = jnp.broadcast_to(((slot >= 0) & hot)[:, None], (config.tile, config.tile_k))
            rows = (which * panel + within)[:, None]
            inside = jnp.broadcast_to((rows < tokens) & (columns < d_model), (config.tile_k, config.tile_d))
            x = plt.load(x_ref.at[rows, columns], mask=inside, other=0)
            z = plt.load(z_ref.at[jnp.maximum(slot, 0)[:, None], within[None, :]], mask=present, other=0)
            return acc + dot(z, x)

        steps = jnp.int32(slots_ref.shape[0] * slices)
        acc = lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((config.tile, config.tile_d), jnp.float32))
        mask = jnp.broadcast_to(hot[:, None] & (columns < d_model), acc.shape)
        target = scatter_index(neurons, hot)[:, None]
        plt.store(out_ref.at[target, columns], acc.astype(out_ref.dtype), mask=mask)

    for nth, (z_ref, out_ref) in enumerate(zip(z_refs, outputs, strict=True)):
        operand = dy_ref if nth == count - 1 else x_ref
        pl.when((first < n_hot) & (which_z == nth))(partial(sum_into, out_ref, z_ref, operand))


# -- rare neurons --------------------------------------------------------------------------------------------


class TokenLists(NamedTuple):
    """The tokens of every rare neuron, ascending: 8 F limit bytes, at a limit of M / 64 a sixteenth of
    an (M, F) array in bf16.

    Attributes:
      rows: (F, limit) int32, tokens; of a rare neuron, as many as it is active for mean something.
      slots: (F, limit) int32, the neuron's slot in the token's panel.
    """

    rows: jax.Array
    slots: jax.Array


def token_lists(
    gate: jax.Array, lists: NeuronLists, ranking: Ranking, *, limit: int, interpret: bool = False
) -> TokenLists:
    """The panels' lists transposed for rare neurons, of at most ``limit`` tokens: gate (n_slots, P)."""
    chunk = gate.shape[0] // lists.owner.shape[0]
    tile = min(_LIST_TILE, chunk)
    shape = varying_axes.output(gate, (ranking.order.shape[0], limit), jnp.int32)
    rows, slots = pl.pallas_call(
        partial(_token_lists_kernel, chunk=chunk, tile=tile),
        out_shape=(shape, shape),
        grid=(gate.shape[0] // tile,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="panel_token_lists",
    )(lists.neurons, lists.owner, lists.offsets, lists.counts, ranking.starts, gate)
    return TokenLists(rows, slots)


def _token_lists_kernel(
    neurons_ref, owner_ref, offsets_ref, counts_ref, begin_ref, gate_ref, rows_ref, slots_ref, *, chunk, tile
):
    panel, first = gate_ref.shape[1], pl.program_id(0) * tile

    @pl.when(first < offsets_ref[offsets_ref.shape[0] - 1])
    def _():
        which = owner_ref[first // chunk]
        slots = first + lax.iota(jnp.int32, tile)
        within = lax.iota(jnp.int32, panel)[None, :]
        neurons = plt.load(neurons_ref.at[slots])
        listed = slots < offsets_ref[which] + counts_ref[which]
        begin = plt.load(begin_ref.at[which, neurons], mask=listed, other=-1)

        @pl.when(jnp.max(begin) >= 0)
        def _():
            gate = plt.load(gate_ref.at[slots[:, None], within])
            mask = stored_active(gate.astype(jnp.float32)) & (begin >= 0)[:, None]
            counted = mask.astype(jnp.int32)
            place = begin[:, None] + jnp.cumsum(counted, axis=1) - counted
            target = scatter_index(neurons[:, None], mask)
            for ref, value in ((rows_ref, which * panel + within), (slots_ref, slots[:, None])):
                plt.store(ref.at[target, place], jnp.broadcast_to(value, mask.shape), mask=mask)


def panel_dw_rare(zs, xs, ranking: Ranking, tokens: TokenLists, rows, *, config, interpret):
    """Fills the rows of rare neurons into ``rows``, one (F, D) for each z (n_slots, P) and
    its x (M, D)."""
    d_ff, d_model = rows[0].shape
    config = dataclasses.replace(config, slice_d=min(config.slice_d, pl.next_power_of_2(max(d_model, 16))))
    operands = [ranking.order, ranking.totals, ranking.n_hot, *tokens, *zs, xs[0], xs[-1]]
    return pl.pallas_call(
        partial(_rare_kernel, count=len(zs), panel=zs[0].shape[1], config=config),
        out_shape=tuple(varying_axes.output(zs[0], row.shape, row.dtype) for row in rows),
        grid=(d_ff * pl.cdiv(d_model, config.slice_d),),
        input_output_aliases={len(operands) + nth: nth for nth in range(len(rows))},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="panel_dw_rare",
    )(*operands, *rows)


def _rare_kernel(order_ref, totals_ref, n_hot_ref, rows_ref, slots_ref, *refs, count, panel, config):
    z_refs, (x_ref, dy_ref), outputs = refs[:count], refs[count : count + 2], refs[-count:]
    (d_ff, limit), d_model, entries = rows_ref.shape, x_ref.shape[1], config.entries
    nth_busiest = pl.program_id(0) % d_ff
    neuron = order_ref[nth_busiest]
    column = (pl.program_id(0) // d_ff * config.slice_d + lax.iota(jnp.int32, config.slice_d))[None, :]
    inside, total = column < d_model, totals_ref[neuron]

    def fetch(step):
        """Token and coefficients of each entry of a step, 0 past the end."""
        nth = step * entries + lax.iota(jnp.int32, entries)
        used, place = nth < total, jnp.minimum(nth, limit - 1)
        row, slot = (plt.load(ref.at[neuron, place], mask=used, other=0) for ref in (rows_ref, slots_ref))
        return row, *[plt.load(ref.at[slot, row % panel], mask=used, other=0) for ref in z_refs]

    def body(step, carry):
        accs, row, zs = carry[:count], carry[count], carry[count + 1 :]
        used = step * entries + lax.iota(jnp.int32, entries) < total
        mask, following = used[:, None] & inside, fetch(step + 1)
        x, dy = (
            plt.load(ref.at[row[:, None], column], mask=mask, other=0).astype(jnp.float32)
            for ref in (x_ref, dy_ref)
        )
        values = [x] * (count - 1) + [dy]
        accs = [
            acc + jnp.sum(z.astype(jnp.float32)[:, None] * value, axis=0)
            for acc, z, value in zip(accs, zs, values, strict=True)
        ]
        return *accs, *following

    @pl.when(nth_busiest >= n_hot_ref[0])
    def _():
        zero = jnp.zeros((config.slice_d,), jnp.float32)
        steps = (total + entries - 1) // entries
        carry = (zero,) * count + fetch(jnp.int32(0))
        for acc, ref in zip(lax.fori_loop(jnp.int32(0), steps, body, carry), outputs, strict=False):
            plt.store(ref.at[neuron, column[0]], acc.astype(ref.dtype), mask=inside[0])
