"""The decode kernels of one or two tokens in Pallas Triton: rows of weights times vectors, no tensor cores.

Why they exist. A tile for tensor cores reaches its operands through shared memory, slice by slice with a
barrier each, for sixteen tokens of which most are padding. Here a program has its rows of a weight in flight
at once, whole, in registers, and multiplies them with each token as they come. Of an active neuron the up and
the down row are asked for together, so that the way from the gate to the share of y is one wait for memory.

**`rows_hidden`**: a tile of neurons a program: gate, and for each active neuron in turn the up projection and
the share of y (M, D) in f32. **`sum_shares`** adds the shares up, those of tiles without an active neuron
left out: in an order that the sizes fix, so that the same inputs give the same bits.
**`rows_project`**: a tile of outputs a program.

**Numerics.** Products and sums are f32, rounded where those of the kernels for more tokens are.

**Limits.** An NVIDIA GPU of compute capability 8.0 or newer.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.activations import Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.decode.config import RowsConfig
from pallas_kernels.decode.pallas_triton_tiles import as_rows, first_row

_MOST_SHARES = 256
_SUM_COLUMNS = 32


class Shares(NamedTuple):
    """What the tiles of neurons of a call gave.

    Attributes:
      hits: (1, F) int32, for how many tokens a neuron is active.
      active: (n_tiles,) int32, a bit for each neuron of a tile that some token activates.
      nnz: (n_tiles, M) int32, each token's active neurons in a tile.
      l1: (n_tiles, M) f32, each token's sum of |h| in a tile.
      y: (n_tiles, M, D) f32, a tile's share of y, meaningful where ``active`` is not zero.
    """

    hits: jax.Array
    active: jax.Array
    nnz: jax.Array
    l1: jax.Array
    y: jax.Array


def rows_hidden(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    layer: jax.Array | None = None,
    *,
    rule: Rule,
    config: RowsConfig,
    interpret: bool = False,
) -> Shares:
    """The shares of y for x (M, D), M a handful, and weights (F, D), or those of one ``layer`` (1,)
    int32 of a stack (L, F, D), which are read where they stand."""
    (tokens, d_model), d_ff = x.shape, w_up.shape[-2]
    n_tiles = pl.cdiv(d_ff, config.tile)
    operands = [as_rows(weight) for weight in (w_gate, w_up, w_down) if weight is not None]
    operands += [] if layer is None else [layer]
    return Shares(
        *pl.pallas_call(
            partial(_hidden_kernel, gated=w_gate is not None, rule=rule, config=config),
            out_shape=(
                varying_axes.output(x, (1, d_ff), jnp.int32),
                varying_axes.output(x, (n_tiles,), jnp.int32),
                varying_axes.output(x, (n_tiles, tokens), jnp.int32),
                varying_axes.output(x, (n_tiles, tokens), jnp.float32),
                varying_axes.output(x, (n_tiles, tokens, d_model), jnp.float32),
            ),
            grid=(n_tiles,),
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
            name="decode_rows_hidden",
        )(x, *operands)
    )


def _hidden_kernel(x_ref, *refs, gated, rule, config):
    *inputs, hits_ref, active_ref, nnz_ref, l1_ref, shares_ref = refs
    (gate_ref, *up_refs, down_ref), layer_refs = inputs[: 2 + gated], inputs[2 + gated :]
    (tokens, d_model), d_ff, dtype = x_ref.shape, hits_ref.shape[1], x_ref.dtype
    tile_id, within = pl.program_id(0), lax.iota(jnp.int32, config.tile)
    neurons = tile_id * config.tile + within
    neuron_here = neurons < d_ff
    first = first_row(layer_refs, gate_ref, d_ff)

    gates = [
        gate.astype(dtype)
        for gate in _products(gate_ref, first + neurons, neuron_here, x_ref, config.slice_d)
    ]
    masks = [rule.active(gate.astype(jnp.float32), dtype) & neuron_here for gate in gates]
    hits = jnp.zeros((config.tile,), jnp.int32)
    for mask in masks:
        hits += mask.astype(jnp.int32)
    needed = (hits > 0).astype(jnp.int32)
    plt.store(hits_ref.at[0, neurons], hits, mask=neuron_here)
    for token, mask in enumerate(masks):
        nnz_ref[tile_id, token] = jnp.sum(mask.astype(jnp.int32))
    active_ref[tile_id] = jnp.sum(needed << within)
    count, rank = jnp.sum(needed), jnp.cumsum(needed) - needed

    @pl.when(count == 0)
    def nothing():
        for token in range(tokens):
            l1_ref[tile_id, token] = jnp.float32(0)

    @pl.when(count > 0)
    def share():
        starts = range(0, d_model, config.slice_d)

        def one(nth, state):
            sums, shares = state[:tokens], state[tokens:]
            which = jnp.sum(jnp.where((rank == nth) & (needed > 0), within, 0))
            neuron_row = first + tile_id * config.tile + which
            rows = [_row(down_ref, neuron_row, start, config.slice_d) for start in starts]
            ups = [_row(ref, neuron_row, start, config.slice_d) for ref in up_refs for start in starts]
            following, following_sums = [], []
            for token, (gate, mask) in enumerate(zip(gates, masks, strict=True)):
                chosen = within == which
                g = jnp.sum(jnp.where(chosen, gate.astype(jnp.float32), 0))
                active = jnp.sum((chosen & mask).astype(jnp.int32)) > 0
                h = rule.value(g).astype(dtype).astype(jnp.float32)
                if gated:
                    products = [
                        jnp.sum(row * _row(x_ref, token, start, config.slice_d))
                        for row, start in zip(ups, starts, strict=True)
                    ]
                    up = jnp.asarray(sum(products)).astype(dtype).astype(jnp.float32)
                    h = (h * rule.up(up)).astype(dtype)
                h = jnp.where(active, h.astype(jnp.float32), 0)
                following_sums.append(sums[token] + jnp.abs(h))
                following += [
                    old + h * row
                    for old, row in zip(shares[token * len(rows) :][: len(rows)], rows, strict=True)
                ]
            return *following_sums, *following

        zeros = [jnp.zeros((config.slice_d,), jnp.float32)] * (tokens * len(starts))
        state = lax.fori_loop(jnp.int32(0), count, one, (*[jnp.float32(0)] * tokens, *zeros))
        sums, shares = state[:tokens], state[tokens:]
        for token, l1 in enumerate(sums):
            l1_ref[tile_id, token] = l1
        for nth, total in enumerate(shares):
            token, start = nth // len(starts), starts[nth % len(starts)]
            columns = start + lax.iota(jnp.int32, config.slice_d)
            plt.store(shares_ref.at[tile_id, token, columns], total, mask=columns < d_model)


def _row(ref, row, start, size):
    """A slice of a matrix's row, in f32; zero beyond its end."""
    columns = start + lax.iota(jnp.int32, size)
    return plt.load(ref.at[row, columns], mask=columns < ref.shape[1], other=0).astype(jnp.float32)


def _products(w_ref, rows, row_here, x_ref, slice_d):
    """For each of x's tokens (M, D), (len(rows),) f32: its products with rows of a weight (., D)."""
    tokens, d_model = x_ref.shape
    totals = [jnp.zeros(rows.shape, jnp.float32) for _ in range(tokens)]
    for start in range(0, d_model, slice_d):
        columns = start + lax.iota(jnp.int32, slice_d)
        mask = row_here[:, None] & (columns < d_model)[None, :]
        weight = plt.load(w_ref.at[rows[:, None], columns[None, :]], mask=mask, other=0).astype(jnp.float32)
        for token in range(tokens):
            x = _row(x_ref, token, start, slice_d)
            totals[token] += jnp.sum(weight * x[None, :], axis=1)
    return totals


def sum_shares(shares: Shares, x: jax.Array, *, interpret: bool = False) -> jax.Array:
    """y (M, D) in x's type: the sum of the shares that count."""
    _, tokens, d_model = shares.y.shape
    width = min(_SUM_COLUMNS, pl.next_power_of_2(d_model))
    return pl.pallas_call(
        partial(_sum_kernel, width=width),
        out_shape=varying_axes.output(x, (tokens, d_model), x.dtype),
        grid=(pl.cdiv(d_model, width), tokens),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="decode_sum",
    )(shares.y, shares.active)


def _sum_kernel(shares_ref, active_ref, y_ref, *, width):
    n_shares, _, d_model = shares_ref.shape
    row = pl.program_id(1)
    columns = pl.program_id(0) * width + lax.iota(jnp.int32, width)
    column_here = columns < d_model
    size = min(_MOST_SHARES, pl.next_power_of_2(n_shares))

    def step(nth, acc):
        which = nth * size + lax.iota(jnp.int32, size)
        here = plt.load(active_ref.at[which], mask=which < n_shares, other=0) != 0
        mask = here[:, None] & column_here[None, :]
        share = plt.load(shares_ref.at[which[:, None], row, columns[None, :]], mask=mask, other=0)
        return acc + jnp.sum(share, axis=0)

    acc = lax.fori_loop(0, pl.cdiv(n_shares, size), step, jnp.zeros((width,), jnp.float32))
    plt.store(y_ref.at[row, columns], acc.astype(y_ref.dtype), mask=column_here)


def rows_project(
    x: jax.Array, weight: jax.Array, *, dtype: DTypeLike, config: RowsConfig, interpret: bool = False
) -> jax.Array:
    """``x W^T`` for x (M, D), M a handful, and W (O, D): (M, O) in ``dtype``."""
    outputs = weight.shape[0]
    return pl.pallas_call(
        partial(_project_kernel, config=config),
        out_shape=varying_axes.output(x, (x.shape[0], outputs), dtype),
        grid=(pl.cdiv(outputs, config.tile),),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="decode_rows_project",
    )(x, weight)


def _project_kernel(x_ref, w_ref, y_ref, *, config):
    outputs = pl.program_id(0) * config.tile + lax.iota(jnp.int32, config.tile)
    here = outputs < w_ref.shape[0]
    for token, y in enumerate(_products(w_ref, outputs, here, x_ref, config.slice_d)):
        plt.store(y_ref.at[token, outputs], y.astype(y_ref.dtype), mask=here)
