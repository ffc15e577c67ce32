"""What PanelELL's gate stage has counted, brought together: which neurons each panel of tokens activates, in
how many of its segments and for how many of its tokens.

**`count_active`**: reads the counts of hits and of each token's gates once, writes 2 M F / P bytes. A panel's
neurons are one program's, whose loads are all under way before the first is used: what a small program takes
is the time until memory answers, and it should have to wait once.

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

_BLOCK = 2048
_BLOCKS = 4
_WARPS = 4
_TILES = 32


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
      segments: (n_panels, F) uint8, a bit for each segment of the panel in which the neuron is active.
      before: (n_panels, F / block) int32, active neurons before each `block` of them.
    """

    neurons: jax.Array
    gates: jax.Array
    most: jax.Array
    hits: jax.Array
    segments: jax.Array
    before: jax.Array


def block_of(d_ff: int) -> int:
    """Neurons that one program lists: at most 8 for each thread of eight warps."""
    return min(_BLOCK, pl.next_power_of_2(d_ff))


def count_active(gate: GatePanel, *, d_ff: int, interpret: bool = False) -> Counts:
    """Sums what the gate stage has counted by segments of a panel and tiles of columns."""
    n_panels, n_blocks = gate.values.shape[0], pl.cdiv(d_ff, block_of(d_ff))
    output = partial(varying_axes.output, gate.hits)
    each, by_neuron = output((n_panels,), jnp.int32), output((n_panels, d_ff), jnp.uint8)
    blocks = min(_BLOCKS, pl.next_power_of_2(n_blocks))
    return Counts(
        *pl.pallas_call(
            partial(
                _count_kernel,
                segments=gate.segments,
                panel=gate.values.shape[2],
                d_ff=d_ff,
                blocks=blocks,
            ),
            out_shape=(each, each, each, by_neuron, by_neuron, output((n_panels, n_blocks), jnp.int32)),
            grid=(2 * n_panels,),
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=_WARPS * blocks, num_stages=1),
            name="panel_count",
        )(gate.hits, gate.nnz)
    )


def _count_kernel(by_segment_ref, nnz_ref, neurons_ref, gates_ref, most_ref, *by_neuron, panel, **sizes):
    """Two programs for each panel: one counts its neurons, the other its gates."""
    which = pl.program_id(0) // 2

    @pl.when(pl.program_id(0) % 2 == 0)
    def _():
        _count_neurons(which, by_segment_ref, neurons_ref, *by_neuron, **sizes)

    @pl.when(pl.program_id(0) % 2 == 1)
    def _():
        nnz = gates_of_tokens(nnz_ref, which, panel)
        gates_ref[which], most_ref[which] = jnp.sum(nnz), jnp.max(nnz)


def _count_neurons(
    which, by_segment_ref, neurons_ref, hits_ref, segments_ref, before_ref, *, segments, d_ff, blocks
):
    width = block_of(d_ff)

    def count_blocks(nth, found):
        block = nth * blocks + lax.iota(jnp.int32, blocks)
        neuron = block[:, None] * width + lax.broadcasted_iota(jnp.int32, (blocks, width), 1)
        inside = neuron < d_ff
        hits, bits = jnp.zeros(neuron.shape, jnp.int32), jnp.zeros(neuron.shape, jnp.int32)
        loaded = [
            plt.load(by_segment_ref.at[which * segments + segment, neuron], mask=inside, other=0)
            for segment in range(segments)
        ]
        for segment, own in enumerate(loaded):
            hits += own.astype(jnp.int32)
            bits |= (own > 0).astype(jnp.int32) << segment
        plt.store(hits_ref.at[which, neuron], hits.astype(jnp.uint8), mask=inside)  # at most P of 128
        plt.store(segments_ref.at[which, neuron], bits.astype(jnp.uint8), mask=inside)
        active = jnp.sum((bits > 0).astype(jnp.int32), axis=1)
        before = found + jnp.cumsum(active) - active
        plt.store(before_ref.at[which, block], before, mask=block < before_ref.shape[1])
        return found + jnp.sum(active)

    n_blocks = before_ref.shape[1]
    neurons_ref[which] = lax.fori_loop(
        jnp.int32(0), jnp.int32(pl.cdiv(n_blocks, blocks)), count_blocks, jnp.int32(0)
    )


def gates_of_tokens(nnz_ref, which, panel):
    """(P,) int32, the active gates of each token of a panel, of nnz as a `GatePanel` has it."""
    token, n_tiles = which * panel + lax.iota(jnp.int32, panel), nnz_ref.shape[0]
    width = min(_TILES, pl.next_power_of_2(n_tiles))

    def add_tiles(nth, total):
        tiles = nth * width + lax.iota(jnp.int32, width)
        here = jnp.broadcast_to((tiles < n_tiles)[:, None], (width, panel))
        nnz = plt.load(nnz_ref.at[tiles[:, None], token[None, :]], mask=here, other=0)
        return total + jnp.sum(nnz, axis=0)

    # Blocks of tiles at a time: loads of a loop over single ones would wait for each other.
    blocks = jnp.int32(pl.cdiv(n_tiles, width))
    return lax.fori_loop(jnp.int32(0), blocks, add_tiles, jnp.zeros((panel,), jnp.int32))
