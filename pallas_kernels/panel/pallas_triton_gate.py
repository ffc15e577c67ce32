"""The gate stage of PanelELL in Pallas Triton: a product that packs its own output, and a kernel that packs
the output of XLA's product.

**`gate_panel`** multiplies and packs in one kernel. 2 M F D FLOPs; reads x and Wg, writes 2 M union bytes,
M F / P of hit counts and 4 M F / tile of counts of each token's gates.

**`pack_panel`** packs gates (M, F) that are there. Why it exists: on Hopper `gate_panel` takes 1.65
times as long as XLA's product alone (3.05 and 1.85 ms at M 65,536, D 2048, F 5632 on an H200). Bytes: 2 M F
read, which XLA's product wrote before; M F / 16 of hit counts, 4 M F / tile of counts of tokens, and of
values the 32-byte sectors that have an active gate. There that is 0.74 GB and what is active, in 0.25 ms.

How `pack_panel` stays bound by bytes. A program's tile is a tensor (16 tokens of a segment, segments,
columns). Triton deals the columns out to the lanes first, 16 bytes each, and then the segments; with
`PackConfig.num_warps` as `config` chooses it, that uses up all threads, and a thread holds all 16 tokens of
its columns. So it counts a segment's hits in its own registers. One trip through shared memory turns the
tile, so that a neuron's 16 tokens leave as one sector, if one of them is active.

**Numerics.** f32 accumulation; the gate is rounded to the input type before it is compared. f32 inputs
multiply as IEEE f32.

**Limits.** Tiles are powers of two; an NVIDIA GPU of compute capability 8.0 or newer; P of 16 to 128, since a
byte counts a panel's hits and a byte has a bit for each of its segments.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.common.triton_tiles import grouped_order, product
from pallas_kernels.panel.config import SEGMENT, PackConfig, StageConfig
from pallas_kernels.panel.pallas_triton_counts import GatePanel


def gate_panel(
    x: jax.Array,
    w_gate: jax.Array,
    *,
    panel: int,
    config: StageConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> GatePanel:
    """The active gates of ``x Wg^T`` by panels of ``panel`` tokens: x (M, D), w_gate (F, D) of one type."""
    tokens, d_ff = x.shape[0], w_gate.shape[0]
    n_panels, n_tiles = pl.cdiv(tokens, panel), pl.cdiv(d_ff, config.tile)
    width = n_tiles * config.tile
    values, hits, nnz = pl.pallas_call(
        partial(_gate_kernel, panel=panel, config=config, rule=rule),
        out_shape=(
            varying_axes.output(x, (n_panels, width, panel), x.dtype),
            varying_axes.output(x, (n_panels, width), jnp.uint8),
            varying_axes.output(x, (n_tiles, n_panels * panel), jnp.int32),
        ),
        grid=(n_panels * n_tiles,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="panel_gate",
    )(x, w_gate)
    return GatePanel(values, hits, nnz)


def _gate_kernel(x_ref, w_ref, values_ref, hits_ref, nnz_ref, *, panel, config, rule):
    tokens, d_ff = x_ref.shape[0], w_ref.shape[0]
    n_panels, n_tiles = pl.cdiv(tokens, panel), pl.cdiv(d_ff, config.tile)
    which, tile_id = grouped_order(pl.program_id(0), n_panels, n_tiles)
    rows = which * panel + lax.iota(jnp.int32, panel)
    columns = tile_id * config.tile + lax.iota(jnp.int32, config.tile)
    gate = product(w_ref, jnp.minimum(columns, d_ff - 1), x_ref, jnp.minimum(rows, tokens - 1), config.tile_k)
    mask = rule.active(gate.astype(jnp.float32), gate.dtype)
    if tokens % panel:
        mask &= (rows < tokens)[None, :]
    if d_ff % config.tile:
        mask &= (columns < d_ff)[:, None]
    counted = mask.astype(jnp.int32)
    hits = jnp.sum(counted, axis=1)
    plt.store(hits_ref.at[which, columns], hits.astype(jnp.uint8))
    plt.store(nnz_ref.at[tile_id, rows], jnp.sum(counted, axis=0))
    place = values_ref.at[which, columns[:, None], lax.iota(jnp.int32, panel)[None, :]]
    kept = jnp.broadcast_to((hits > 0)[:, None], mask.shape)
    plt.store(place, jnp.where(mask, gate, jnp.zeros_like(gate)), mask=kept)


def pack_panel(
    gate: jax.Array,
    *,
    d_ff: int,
    panel: int,
    config: PackConfig,
    rule: Rule = RELU,
    interpret: bool = False,
) -> GatePanel:
    """The active ones of rounded gates (M, F' >= F) by panels of ``panel`` tokens; columns past F = ``d_ff``
    are ignored."""
    n_panels, n_tiles, segments = pl.cdiv(gate.shape[0], panel), pl.cdiv(d_ff, config.tile), panel // SEGMENT
    width = n_tiles * config.tile
    values, hits, nnz = pl.pallas_call(
        partial(_pack_kernel, d_ff=d_ff, segments=segments, tile=config.tile, rule=rule),
        out_shape=(
            varying_axes.output(gate, (n_panels, width, panel), gate.dtype),
            varying_axes.output(gate, (n_panels * segments, width), jnp.uint8),
            varying_axes.output(gate, (n_tiles, n_panels * panel), jnp.int32),
        ),
        grid=(n_panels * n_tiles,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="panel_pack",
    )(gate)
    return GatePanel(values, hits, nnz)


def _pack_kernel(gate_ref, values_ref, hits_ref, nnz_ref, *, d_ff, segments, tile, rule):
    (tokens, width), panel, n_tiles = gate_ref.shape, segments * SEGMENT, nnz_ref.shape[0]
    which, tile_id = pl.program_id(0) // n_tiles, pl.program_id(0) % n_tiles
    columns = tile_id * tile + lax.iota(jnp.int32, tile)
    segment, token = lax.iota(jnp.int32, segments), lax.iota(jnp.int32, SEGMENT)
    rows = which * panel + segment[None, :] * SEGMENT + token[:, None]
    place = gate_ref.at[rows[:, :, None], columns[None, None, :]]
    if tokens % panel or width % tile:
        inside = (rows < tokens)[:, :, None] & (columns < width)[None, None, :]
        gate = plt.load(place, mask=inside, other=0)
    else:
        gate = plt.load(place)
    mask = rule.active(gate.astype(jnp.float32), gate.dtype)
    if d_ff < width:
        mask &= (columns < d_ff)[None, None, :]
    counted = mask.astype(jnp.int32)
    hits = jnp.sum(counted, axis=0)
    plt.store(hits_ref.at[which * segments + segment[:, None], columns[None, :]], hits.astype(jnp.uint8))
    plt.store(nnz_ref.at[tile_id, rows], jnp.sum(counted, axis=2))
    turned = jnp.where(mask, gate, jnp.zeros_like(gate)).transpose(2, 1, 0)
    tokens_of = (segment * SEGMENT)[None, :, None] + token[None, None, :]
    kept = jnp.broadcast_to((hits.T > 0)[:, :, None], turned.shape)
    plt.store(values_ref.at[which, columns[:, None, None], tokens_of], turned, mask=kept)
