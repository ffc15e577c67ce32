"""PanelELL's stages behind the gate for a forward call of few panels, in Pallas Triton.

Why they exist. At 512 tokens the gate takes some 25 µs, and every launch after it 1 to 3 µs however little it
does. `pallas_triton_lists` counts first and then makes lists that all panels share, for a panel's place in
them depends on all others' counts, and its work list takes turns of programs over thousands of chunks; XLA
adds up the statistics in six small kernels more. Here each panel has room for all F neurons in a place of its
own. So one kernel counts and makes the lists, programs of the up projection find their tiles by looking at
the few counts, and one more program of the down projection adds up the statistics: three launches.

**`list_neurons`**: reads the counts of hits, M F / 16 or M F / P bytes, twice, and of each token's gates;
writes 5 bytes an active (panel, neuron) pair.
**`few_up`** and **`few_down`**: as `panel_up` and `panel_down`, 2 M union D FLOPs each.

**Numerics.** As `pallas_triton`. Sums of whole numbers are exact; that of |h| has one order.

**Limits.** Those of `pallas_triton`. A program looks at all panels' counts at one time.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import device
from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.common.triton_tiles import grouped_order
from pallas_kernels.options import FFNStats
from pallas_kernels.panel.config import FewConfig
from pallas_kernels.panel.pallas_triton import down_tile, up_kernel
from pallas_kernels.panel.pallas_triton_counts import GatePanel, gates_of_tokens
from pallas_kernels.panel.pallas_triton_lists import HIT_COLUMNS, hits_of, put

_LIST_BLOCK = 8192
_HIT_ROWS = 256
_PARTS = 4096


class FewLists(NamedTuple):
    """The neurons of few panels, and what a gate stage has counted of them.

    Panel p owns ``stride`` slots from ``p * stride`` on, F rounded up to whole tiles of the up projection.
    The first ``counts[p]`` of them hold neurons in ascending order, the rest of a tile neuron 0.

    Attributes:
      neurons: (n_panels * stride,) int32.
      segments: (n_panels * stride,) uint8, a bit for each segment of the panel in which the neuron is active.
      counts: (n_panels,) int32, neurons that are active for at least one token.
      gates: (n_panels,) int32, active gates of all tokens.
      most: (n_panels,) int32, active gates of the token that has most.
      hits: (F,) int32, for how many tokens a neuron is active.
    """

    neurons: jax.Array
    segments: jax.Array
    counts: jax.Array
    gates: jax.Array
    most: jax.Array
    hits: jax.Array

    @property
    def stride(self) -> int:
        """Slots of a panel."""
        return self.neurons.shape[0] // self.counts.shape[0]


# -- lists ---------------------------------------------------------------------------------------------------


def list_neurons(gate: GatePanel, *, d_ff: int, config: FewConfig, interpret: bool = False) -> FewLists:
    """Each panel's active neurons, and how many gates are active."""
    n_panels, tile = gate.values.shape[0], config.up.tile
    slots = n_panels * pl.cdiv(d_ff, tile) * tile
    output = partial(varying_axes.output, gate.hits)
    each = output((n_panels,), jnp.int32)
    return FewLists(
        *pl.pallas_call(
            partial(
                _lists_kernel,
                d_ff=d_ff,
                segments=gate.segments,
                panel=gate.values.shape[2],
                tile=tile,
                n_panels=n_panels,
            ),
            out_shape=(
                output((slots,), jnp.int32),
                output((slots,), jnp.uint8),
                each,
                each,
                each,
                output((d_ff,), jnp.int32),
            ),
            grid=(n_panels + pl.cdiv(d_ff, HIT_COLUMNS),),
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=config.list_warps, num_stages=1),
            name="panel_lists",
        )(gate.hits, gate.nnz)
    )


def _lists_kernel(by_segment_ref, nnz_ref, *outputs, d_ff, segments, panel, tile, n_panels):
    """The first programs list a panel each, the others add up the hits of some neurons."""
    *list_refs, hits_ref = outputs
    program = pl.program_id(0)

    @pl.when(program < n_panels)
    def _():
        _list_panel(by_segment_ref, nnz_ref, list_refs, program, d_ff, segments, panel, tile)

    @pl.when(program >= n_panels)
    def _():
        columns, hits = hits_of(by_segment_ref, program - n_panels, _HIT_ROWS)
        plt.store(hits_ref.at[columns], hits, mask=columns < d_ff)


def _list_panel(by_segment_ref, nnz_ref, list_refs, which, d_ff, segments, panel, tile):
    neurons_ref, segments_ref, counts_ref, gates_ref, most_ref = list_refs
    start = which * pl.cdiv(d_ff, tile) * tile

    def list_block(neuron, inside, found):
        bits = jnp.zeros(neuron.shape, jnp.int32)
        for segment in range(segments):
            hits = plt.load(by_segment_ref.at[which * segments + segment, neuron], mask=inside, other=0)
            bits |= (hits > 0).astype(jnp.int32) << segment
        listed = (bits > 0).astype(jnp.int32)
        slot = start + found + jnp.cumsum(listed) - listed
        put(neurons_ref, slot, neuron, listed > 0)
        put(segments_ref, slot, bits.astype(jnp.uint8), listed > 0)
        return found + jnp.sum(listed)

    count = _over_neurons(d_ff, list_block)
    counts_ref[which] = count
    tail = count + lax.iota(jnp.int32, tile)
    for ref in (neurons_ref, segments_ref):
        put(ref, start + tail, jnp.zeros((tile,), ref.dtype), tail < pl.cdiv(count, tile) * tile)

    nnz = gates_of_tokens(nnz_ref, which, panel)
    gates_ref[which], most_ref[which] = jnp.sum(nnz), jnp.max(nnz)


def _over_neurons(d_ff, body):
    """Sums ``body(neurons, which of them are below F, sum so far)`` up over blocks of all neurons."""
    width = min(_LIST_BLOCK, pl.next_power_of_2(d_ff))

    def block(nth, total):
        neuron = nth * width + lax.iota(jnp.int32, width)
        return body(neuron, neuron < d_ff, total)

    return lax.fori_loop(jnp.int32(0), jnp.int32(pl.cdiv(d_ff, width)), block, jnp.int32(0))


def _each_panel(ref):
    """The values of all panels, and zeros up to the next power of two."""
    panels = lax.iota(jnp.int32, max(16, pl.next_power_of_2(ref.shape[0])))
    return plt.load(ref.at[panels], mask=panels < ref.shape[0], other=0)


# -- up ------------------------------------------------------------------------------------------------------


def few_up(
    gate: GatePanel,
    lists: FewLists,
    x: jax.Array,
    w_up: jax.Array | None,
    *,
    config: FewConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """``h = a(g) b(x Wu^T)`` over the lists, or ``h = a(g)`` without w_up: x (M, D), w_up (F, D).

    Returns:
      h (n_panels * stride, P), and (n_panels * stride / tile,) f32, the sum of |h| of each tile in use.
    """
    stage, panel, slots = config.up, gate.values.shape[2], lists.neurons.shape[0]
    parts, cores = slots // stage.tile, device.current().cores
    operands = [] if w_up is None else [x, w_up]
    return pl.pallas_call(
        partial(
            up_kernel,
            panel=panel,
            segments=gate.segments,
            config=stage,
            rule=rule,
            gated=w_up is not None,
            walk=over_tiles,
            work=2,
        ),
        out_shape=(
            varying_axes.output(x, (slots, panel), x.dtype),
            varying_axes.output(x, (parts,), jnp.float32),
        ),
        grid=(min(parts, cores * stage.per_core) if cores and stage.per_core else parts,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=stage.num_warps, num_stages=stage.num_stages),
        name="panel_up",
    )(lists.neurons, lists.counts, lists.segments, gate.values, *operands)


def over_tiles(work_refs, panel, tile, body):
    """Runs ``body(tile, its panel, that panel's rows, slots, neurons)`` for a program's share of all tiles in
    use, which it finds from the counts."""
    neurons_ref, counts_ref = work_refs
    n_panels = counts_ref.shape[0]
    each = neurons_ref.shape[0] // (n_panels * tile)
    tiles = (_each_panel(counts_ref) + tile - 1) // tile
    ends, total = jnp.cumsum(tiles), jnp.sum(tiles)
    first, step = pl.program_id(0), pl.num_programs(0)

    def one(nth, _):
        place = first + nth * step
        before = (ends <= place).astype(jnp.int32)
        which = jnp.sum(before)
        number = which * each + place - jnp.sum(before * tiles)
        slots = number * tile + lax.iota(jnp.int32, tile)
        rows = which * panel + lax.iota(jnp.int32, panel)
        body(number, which, rows, slots, plt.load(neurons_ref.at[slots]))

    lax.fori_loop(jnp.int32(0), jnp.maximum(total - first + step - 1, 0) // step, one, None)


# -- down, and the statistics --------------------------------------------------------------------------------


def few_down(
    h: jax.Array,
    parts: jax.Array,
    lists: FewLists,
    w_down: jax.Array,
    *,
    tokens: int,
    config: FewConfig,
    interpret: bool = False,
) -> tuple[jax.Array, FFNStats]:
    """``y = h Wd`` (M, D), each panel over its own neurons, and the statistics of the call.

    Args:
      h, parts: of `few_up`.  w_down: (F, D).
    """
    n_panels, d_model, stage = lists.counts.shape[0], w_down.shape[1], config.down
    output = partial(varying_axes.output, h)
    counted, real = output((1,), jnp.int32), output((1,), jnp.float32)
    y, l1, l0, *counts = pl.pallas_call(
        partial(_down_kernel, tile=config.up.tile, config=stage),
        out_shape=(output((tokens, d_model), h.dtype), real, real, *[counted] * 4),
        grid=(n_panels * pl.cdiv(d_model, stage.tile) + 1,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=stage.num_warps, num_stages=stage.num_stages),
        name="panel_down",
    )(lists.neurons, lists.counts, lists.gates, lists.most, parts, h, w_down)
    l1, l0, max_nnz, pairs, overflow_rows, dense_tokens = (value.reshape(()) for value in (l1, l0, *counts))
    return y, FFNStats(l1, l0, lists.hits, max_nnz, overflow_rows, pairs, dense_tokens)


def _down_kernel(
    neurons_ref, counts_ref, gates_ref, most_ref, parts_ref, h_ref, w_ref, *outputs, tile, config
):
    """A program for each tile of y, and one for the statistics."""
    y_ref, *stats_refs = outputs
    n_panels, n_tiles = counts_ref.shape[0], pl.cdiv(y_ref.shape[1], config.tile)
    program, stride = pl.program_id(0), neurons_ref.shape[0] // n_panels

    @pl.when(program < n_panels * n_tiles)
    def _():
        which, tile_id = grouped_order(program, n_panels, n_tiles)
        down_tile(
            neurons_ref, (h_ref, w_ref), y_ref, which, tile_id, which * stride, counts_ref[which], config
        )

    @pl.when(program == n_panels * n_tiles)
    def _():
        _statistics((counts_ref, gates_ref, most_ref), parts_ref, stats_refs, y_ref.shape[0], tile)


def _statistics(counted_refs, parts_ref, stats_refs, tokens, tile):
    l1_ref, l0_ref, max_nnz_ref, pairs_ref, overflow_rows_ref, dense_tokens_ref = stats_refs
    counts_ref = counted_refs[0]
    n_panels, n_parts = counts_ref.shape[0], parts_ref.shape[0]
    counts, gates, most = map(_each_panel, counted_refs)
    width, each = min(_PARTS, pl.next_power_of_2(n_parts)), n_parts // n_panels

    def add_parts(block, total):
        part = block * width + lax.iota(jnp.int32, width)
        count = plt.load(counts_ref.at[part // each], mask=part < n_parts, other=0)
        used = part % each * tile < count
        return total + plt.load(parts_ref.at[part], mask=used, other=0)

    blocks = jnp.int32(pl.cdiv(n_parts, width))
    l1 = lax.fori_loop(jnp.int32(0), blocks, add_parts, jnp.zeros((width,), jnp.float32))
    l1_ref[0] = jnp.sum(l1) / tokens
    l0_ref[0] = jnp.sum(gates).astype(jnp.float32) / tokens
    max_nnz_ref[0], pairs_ref[0] = jnp.max(most), jnp.sum(counts)
    # Nothing is computed densely, which constants would say with two copies.
    overflow_rows_ref[0] = dense_tokens_ref[0] = jnp.int32(0)
