"""The stages of PanelELL behind the gate in Pallas Triton: up projection and down projection.

Why they exist. At n active gates a token, a kernel that works token by token gathers 4 n D bytes of weights
for 4 n D FLOPs and is bound by L2. P = 128 neighbouring tokens share most of their neurons: of F = 5632, 30
to 45 active gates a token make a union of about 590. Over that union the up and down projections are dense
GEMMs with gathered weight rows, on tensor cores, at an intensity of P / 2 FLOPs a byte.

A panel's values stand *transposed*, (neuron, P): a neuron's P values are contiguous. So the gate stage writes
only neurons that some token of the panel activates, the up projection reads them with full-width loads, and
the down projection and the weight gradients take them as operands without a gather of single values.

**`panel_up`**: 2 M union D FLOPs over a list of chunks of ``tile`` pairs, which all programs share evenly
however uneven the panels are.
**`panel_down`**: 2 M union D FLOPs; writes y.

**Numerics.** f32 accumulation; g, u, h and y are rounded to the input type, where the reference rounds them.
f32 inputs multiply as IEEE f32.

**Limits.** Tiles are powers of two; an NVIDIA GPU of compute capability 8.0 or newer; P of at most 128. A
tile of 256 neurons and 128 tokens fills the registers of a core, so a wider panel would lengthen the lists
and save no traffic; and a byte counts a panel's hits.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import device
from pallas_kernels.activations import RELU, Rule, stored_active
from pallas_kernels.common import varying_axes
from pallas_kernels.common.products import CONTRACT_FIRST, dot
from pallas_kernels.common.triton_tiles import grouped_order, product, scatter_index
from pallas_kernels.panel.config import StageConfig
from pallas_kernels.panel.pallas_triton_counts import GatePanel
from pallas_kernels.panel.pallas_triton_lists import NeuronLists

_WGMMA_ROWS = 64
_VALUES = 6  # which operand of `panel_up` the gates are


# -- up ------------------------------------------------------------------------------------------------------


class Hidden(NamedTuple):
    """The hidden activations over the lists' slots.

    Attributes:
      h: (n_slots, P); or (n_panels, F', P), where h stands in place of the gates.
      l1: () f32, sum of |h|, or (n_panels * P,), that of each token.
      gate, up: (n_slots, P), where they are kept for a backward; without a gate projection up is None, and
        gate is h where the activation is the identity.
    """

    h: jax.Array
    l1: jax.Array
    gate: jax.Array | None
    up: jax.Array | None


def panel_up(
    gate: GatePanel,
    lists: NeuronLists,
    x: jax.Array,
    w_up: jax.Array | None,
    *,
    config: StageConfig,
    rule: Rule = RELU,
    start: jax.Array | None = None,
    keep: bool = False,
    in_place: bool = False,
    l1_by_token: bool = False,
    interpret: bool = False,
) -> Hidden:
    """``h = a(g) b(x Wu^T)`` over the lists, or ``h = a(g)`` without w_up: x (M, D), w_up (F, D).

    Args:
      start: (1,) int32, the token of x that the first panel begins with; None for 0.
      keep: whether the gates and the up projection are wanted too.
      in_place: whether h overwrites ``gate.values``, which takes half the memory. Only the rows of listed
        neurons are written, and the gates are lost: not together with ``keep``.
      l1_by_token: whether l1 is wanted for each token.
    """
    panel, chunks = gate.values.shape[2], lists.owner.shape[0]
    shape = (lists.neurons.shape[0], panel)
    gated = w_up is not None
    kept = keep * (2 if gated else int(rule.squared))
    starts = [] if start is None else [start]
    operands = [*starts, x, w_up] if gated else []
    h, l1, *gate_and_up = pl.pallas_call(
        partial(
            up_kernel,
            panel=panel,
            segments=gate.segments,
            config=config,
            rule=rule,
            gated=gated,
            shifted=start is not None,
            in_place=in_place,
        ),
        out_shape=(
            varying_axes.output(x, gate.values.shape if in_place else shape, x.dtype),
            varying_axes.output(x, (chunks, panel) if l1_by_token else (chunks,), jnp.float32),
            *[varying_axes.output(x, shape, x.dtype)] * kept,
        ),
        grid=(programs(lists, config),),
        input_output_aliases={_VALUES: 0} if in_place else {},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="panel_up",
    )(*work_list(lists), lists.segments, gate.values, *operands)
    if l1_by_token:
        l1 = _token_l1(l1, lists, interpret=interpret)
    else:
        used = jnp.arange(chunks) < lists.offsets[-1] // lists.chunk
        l1 = jnp.sum(jnp.where(used, l1, 0))
    if gated:
        return Hidden(h, l1, *(gate_and_up or (None, None)))
    return Hidden(h, l1, gate_and_up[0] if gate_and_up else h, None)


def _token_l1(l1: jax.Array, lists: NeuronLists, *, interpret: bool) -> jax.Array:
    """(n_panels * P,) f32, the sum over a panel's chunks of each token's part (n_chunks, P)."""
    n_panels, panel = lists.counts.shape[0], l1.shape[1]
    return pl.pallas_call(
        partial(_token_l1_kernel, chunk=lists.chunk),
        out_shape=varying_axes.output(l1, (n_panels * panel,), jnp.float32),
        grid=(n_panels,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="panel_token_l1",
    )(l1, lists.offsets)


def _token_l1_kernel(l1_ref, offsets_ref, sums_ref, *, chunk):
    which, within = pl.program_id(0), lax.iota(jnp.int32, l1_ref.shape[1])
    first, last = offsets_ref[which] // chunk, offsets_ref[which + 1] // chunk

    def add(nth, total):
        return total + plt.load(l1_ref.at[nth, within])

    total = lax.fori_loop(first, last, add, jnp.zeros(within.shape, jnp.float32))
    plt.store(sums_ref.at[which * within.shape[0] + within], total)


def programs(lists: NeuronLists, config: StageConfig) -> int:
    """Programs that share the list of chunks.

    One for every chunk that there is room for would be simplest, but those past the list's end cost a launch
    each: with room for all of F, most of the grid.
    """
    chunks, cores = lists.owner.shape[0], device.current().cores
    return min(chunks, cores * config.per_core) if cores and config.per_core else chunks


def work_list(lists: NeuronLists) -> tuple[jax.Array, ...]:
    """The operands that `over_chunks` reads."""
    return lists.neurons, lists.owner, lists.pairs, lists.n_pairs, lists.offsets


def over_chunks(work_refs, panel, tile, body):
    """Runs ``body(chunk, its panel, that panel's rows, slots, neurons)`` for a program's share.

    A tile of two chunks takes a panel's chunks in pairs, and its last one alone if they are odd: twice the
    work for each row of x that is read. What a tile is comes from loads that wait for each other, so they are
    made a tile ahead.
    """
    neurons_ref, owner_ref, pairs_ref, n_pairs_ref, offsets_ref = work_refs
    size = neurons_ref.shape[0] // owner_ref.shape[0]
    in_pairs = tile > size
    first, step = pl.program_id(0), pl.num_programs(0)
    total = n_pairs_ref[0] if in_pairs else offsets_ref[offsets_ref.shape[0] - 1] // size

    def look_up(nth):
        place = first + nth * step
        entry = jnp.minimum(place, owner_ref.shape[0] - 1)
        if in_pairs:  # past the list's end nothing was written
            entry = jnp.where(place < total, pairs_ref[entry], 0)
        chunk = entry >> 1 if in_pairs else entry
        slots = jnp.minimum(chunk * size + lax.iota(jnp.int32, tile), neurons_ref.shape[0] - 1)
        return entry, owner_ref[chunk], plt.load(neurons_ref.at[slots])

    def one(nth, found):
        entry, which, neurons = found
        following = look_up(nth + 1)
        chunk = entry >> 1 if in_pairs else entry
        rows = which * panel + lax.iota(jnp.int32, panel)

        def take(neurons):
            slots = chunk * size + lax.iota(jnp.int32, neurons.shape[0])
            body(chunk, which, rows, slots, neurons)

        if in_pairs:
            alone = entry & 1 == 0
            pl.when(~alone)(lambda: take(neurons))
            pl.when(alone)(lambda: take(plt.load(neurons_ref.at[chunk * size + lax.iota(jnp.int32, size)])))
        else:
            take(neurons)
        return following

    lax.fori_loop(jnp.int32(0), jnp.maximum(total - first + step - 1, 0) // step, one, look_up(jnp.int32(0)))


def gathered_product(w_ref, neurons, x_ref, rows, tile_k, dtype=None):
    """`product` of gathered rows of weights and a panel's rows of x: (len(neurons), len(rows)).

    The longer side makes the columns of the tensor cores' tile: wgmma reads them again for every 64 rows, up
    to 256 at once. Under 64 neurons are always its columns, for wgmma has no fewer rows.
    """
    if neurons.shape[0] > rows.shape[0] >= _WGMMA_ROWS or neurons.shape[0] < _WGMMA_ROWS <= rows.shape[0]:
        return product(x_ref, rows, w_ref, neurons, tile_k, dtype).T
    return product(w_ref, neurons, x_ref, rows, tile_k, dtype)


def up_kernel(
    *refs,
    panel,
    segments,
    config,
    rule,
    gated,
    shifted=False,
    in_place=False,
    walk=over_chunks,
    work=5,
):
    """The body of `panel_up`, over what ``walk`` finds in its first ``work`` operands."""
    work_refs, (segments_ref, values_ref), refs = refs[:work], refs[work : work + 2], refs[work + 2 :]
    operands = refs[: (2 + shifted) * gated]
    h_ref, l1_ref, *kept_refs = refs[len(operands) :]
    within = lax.iota(jnp.int32, panel)[None, :]

    def body(chunk, which, rows, slots, neurons):
        up = None
        bits = plt.load(segments_ref.at[slots]).astype(jnp.int32)[:, None]
        if gated:
            *start_ref, x_ref, w_ref = operands
            rows = rows + start_ref[0][0] if shifted else rows
            rows = jnp.minimum(rows, x_ref.shape[0] - 1)
            up = gathered_product(w_ref, neurons, x_ref, rows, config.tile_k)
        # Not //, whose care for signs hides from Triton that neighbours share a bit: it would load them
        # one by one.
        written = bits >> lax.div(within, jnp.int32(panel // segments)) & 1 > 0
        gate = plt.load(values_ref.at[which, neurons[:, None], within], mask=written, other=0)
        h = hidden(gate, up, rule)
        if in_place:
            # Slots past a panel's count name neuron 0, whose row another slot may own.
            own = scatter_index(neurons[:, None], bits > 0)
            plt.store(h_ref.at[which, own, within], h, mask=jnp.broadcast_to(bits > 0, h.shape))
        else:
            place = (slots[:, None], within)
            plt.store(h_ref.at[place], h)
            for ref, value in zip(kept_refs, (gate, up), strict=False):
                plt.store(ref.at[place], value)
        pair = slots.shape[0] > segments_ref.shape[0] // l1_ref.shape[0]
        magnitude = jnp.abs(h.astype(jnp.float32))
        if len(l1_ref.shape) == 2:
            tokens = lax.iota(jnp.int32, panel)
            plt.store(l1_ref.at[chunk, tokens], jnp.sum(magnitude, axis=0))
            if pair:
                plt.store(l1_ref.at[chunk + 1, tokens], jnp.zeros((panel,), jnp.float32))
        else:
            l1_ref[chunk] = jnp.sum(magnitude)
            if pair:
                l1_ref[chunk + 1] = jnp.float32(0)

    walk(work_refs, panel, config.tile, body)


def hidden(gate: jax.Array, up: jax.Array | None, rule: Rule) -> jax.Array:
    """``[active] round(round(a(g)) b(u))`` of stored gates, or ``[active] round(a(g))`` without an up
    projection."""
    if up is None and not rule.squared:
        return gate
    wide = gate.astype(jnp.float32)
    value = rule.value(wide).astype(gate.dtype)
    h = (
        value
        if up is None
        else (value.astype(jnp.float32) * rule.up(up.astype(jnp.float32))).astype(gate.dtype)
    )
    return jnp.where(stored_active(wide), h, jnp.zeros_like(h))


# -- down ----------------------------------------------------------------------------------------------------


def panel_down(
    terms: list[tuple[jax.Array, jax.Array]],
    lists: NeuronLists,
    *,
    tokens: int,
    config: StageConfig,
    start: jax.Array | None = None,
    into: jax.Array | None = None,
    interpret: bool = False,
    name: str = "panel_down",
) -> jax.Array:
    """``sum of h W`` over terms of h, as `Hidden` has it, and W (F, D), each panel over its own neurons:
    (M, D) in h's type.

    Args:
      tokens: M.
      start: (1,) int32, the row that the first panel begins with; None for 0. Rows before it, and those past
        the last panel, are not written.
      into: (M, D) to write the rows to; None for an array of its own.
    """
    h, weight = terms[0]
    d_model = weight.shape[1]
    shift = [] if start is None else [start]
    target = [] if into is None else [into]
    operands = [lists.neurons, lists.offsets, lists.counts, *shift, *target]
    n_panels, n_tiles = lists.counts.shape[0], pl.cdiv(d_model, config.tile)
    return pl.pallas_call(
        partial(_down_kernel, config=config, shifted=len(shift), target=len(target)),
        out_shape=varying_axes.output(h, (tokens, d_model), h.dtype),
        grid=(n_panels * n_tiles,),
        input_output_aliases={len(operands) - 1: 0} if target else {},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name=name,
    )(*operands, *[array for term in terms for array in term])


def _down_kernel(neurons_ref, offsets_ref, counts_ref, *refs, config, shifted, target):
    start_ref, terms, y_ref = refs[:shifted], refs[shifted + target : -1], refs[-1]
    d_model = y_ref.shape[1]
    n_panels, n_tiles = counts_ref.shape[0], pl.cdiv(d_model, config.tile)
    # Neighbouring panels share most of their neurons, at much the same place of their lists: programs that
    # run side by side on the same columns ask L2 for the same rows at the same time.
    which, tile_id = grouped_order(pl.program_id(0), n_panels, n_tiles)
    first = start_ref[0][0] if shifted else 0
    start, count = offsets_ref[which], counts_ref[which]
    down_tile(neurons_ref, terms, y_ref, which, tile_id, start, count, config, first)


def down_tile(neurons_ref, terms, y_ref, which, tile_id, start, count, config, first=0):
    """One tile of y: a panel's ``count`` slots from ``start`` on times ``config.tile`` columns of each; panel
    0 begins with row ``first``."""
    (tokens, d_model), panel = y_ref.shape, terms[0].shape[-1]
    within = lax.iota(jnp.int32, panel)
    columns = (tile_id * config.tile + lax.iota(jnp.int32, config.tile))[None, :]

    def add(h_ref, w_ref, nth, acc):
        slots = start + nth * config.tile_k + lax.iota(jnp.int32, config.tile_k)
        neurons = plt.load(neurons_ref.at[slots])
        if len(h_ref.shape) == 3:  # slots past the count name a neuron that is not theirs
            listed = jnp.broadcast_to((slots < start + count)[:, None], (config.tile_k, panel))
            h = plt.load(h_ref.at[which, neurons[:, None], within[None, :]], mask=listed, other=0)
        else:
            h = plt.load(h_ref.at[slots[:, None], within[None, :]])
        place = w_ref.at[neurons[:, None], columns]
        if d_model % config.tile:
            inside = jnp.broadcast_to(columns < d_model, (config.tile_k, config.tile))
            weight = plt.load(place, mask=inside, other=0)
        else:
            weight = plt.load(place)
        return acc + dot(h, weight, CONTRACT_FIRST)

    steps = (count + config.tile_k - 1) // config.tile_k
    acc = jnp.zeros((panel, config.tile), jnp.float32)
    # A loop a term: with both in one, shared memory holds half as many slices of each.
    for h_ref, w_ref in zip(terms[::2], terms[1::2], strict=True):
        acc = lax.fori_loop(jnp.int32(0), steps, partial(add, h_ref, w_ref), acc)
    rows = (first + which * panel + within)[:, None]
    mask = jnp.broadcast_to((rows < tokens) & (columns < d_model), acc.shape)
    plt.store(y_ref.at[rows, columns], acc.astype(y_ref.dtype), mask=mask)
