"""The decode kernels of one or two tokens in Pallas Triton: rows of weights times vectors, no tensor cores.

Why they exist. A tile for tensor cores reaches its operands through shared memory, slice by slice with a
barrier each, for sixteen tokens of which most are padding. Here a program has its rows of a weight in flight
at once, whole, in registers, and multiplies them with each token as they come. Of an active neuron the up and
the down row are asked for together, so that the way from the gate to the share of y is one wait for memory.

**`rows_hidden`**: a tile of neurons a program: gate, and for each active neuron in turn the up projection and
the share of y (M, D) in f32. **`sum_shares`** adds the shares up, those of tiles without an active neuron
left out: in an order that the sizes fix, so that the same inputs give the same bits.
**`rows_project`**: a tile of outputs a program. It and `sum_shares` may add to a residual stream, and it and
`rows_hidden` may read the norm of one (`residual`).

**Numerics.** Products and sums are f32, rounded where those of the kernels for more tokens are.

**Limits.** An NVIDIA GPU of compute capability 8.0 or newer.
"""

from functools import partial
from typing import Any, NamedTuple

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
from pallas_kernels.decode.residual import Normed, Residual, unnormed, writer

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
    x: jax.Array | Normed,
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
    output = partial(varying_axes.output, unnormed(x))
    return Shares(
        *pl.pallas_call(
            partial(_hidden_kernel, rule=rule, config=config),
            out_shape=(
                output((1, d_ff), jnp.int32),
                output((n_tiles,), jnp.int32),
                output((n_tiles, tokens), jnp.int32),
                output((n_tiles, tokens), jnp.float32),
                output((n_tiles, tokens, d_model), jnp.float32),
            ),
            grid=(n_tiles,),
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
            name="decode_rows_hidden",
        )(x, as_rows(w_gate), as_rows(w_up), as_rows(w_down), layer)
    )


def _hidden_kernel(
    x,
    w_gate_ref,
    w_up_ref,
    w_down_ref,
    layer_ref,
    hits_ref,
    active_ref,
    nnz_ref,
    l1_ref,
    shares_ref,
    *,
    rule,
    config,
):
    gated = w_gate_ref is not None
    gate_ref = w_gate_ref if gated else w_up_ref
    (tokens, d_model), d_ff, dtype = x.shape, hits_ref.shape[1], x.dtype
    tile_id, within = pl.program_id(0), lax.iota(jnp.int32, config.tile)
    neurons = tile_id * config.tile + within
    neuron_here = neurons < d_ff
    first = first_row(layer_ref, gate_ref, d_ff)

    gates, x_slices = _products(gate_ref, first + neurons, neuron_here, x, config.slice_d)
    gates = [gate.astype(dtype) for gate in gates]
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
            rows = [_slice(w_down_ref, neuron_row, start, config.slice_d) for start in starts]
            ups = [_slice(w_up_ref, neuron_row, start, config.slice_d) for start in starts if gated]
            following, following_sums = [], []
            for token, (gate, mask) in enumerate(zip(gates, masks, strict=True)):
                chosen = within == which
                g = jnp.sum(jnp.where(chosen, gate.astype(jnp.float32), 0))
                active = jnp.sum((chosen & mask).astype(jnp.int32)) > 0
                h = rule.value(g).astype(dtype).astype(jnp.float32)
                if gated:
                    products = [
                        jnp.sum(row * x_slices[token](start)) for row, start in zip(ups, starts, strict=True)
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


def _slice(ref, row, start, size):
    """A slice of a matrix's row, in f32; zero beyond its end."""
    columns = start + lax.iota(jnp.int32, size)
    return plt.load(ref.at[row, columns], mask=columns < ref.shape[1], other=0).astype(jnp.float32)


def _products(w_ref, rows, row_here, x, slice_d):
    """Products of x (M, D), a ref or a `Normed` of refs, with rows of a weight (., D); and how to load x.

    Returns:
      For each token (len(rows),) f32; and for each token a function of a slice's first column, which gives
      ``slice_d`` values in f32.
    """
    tokens, d_model = x.shape

    def load(start):
        columns = start + lax.iota(jnp.int32, slice_d)
        mask = row_here[:, None] & (columns < d_model)[None, :]
        return plt.load(w_ref.at[rows[:, None], columns[None, :]], mask=mask, other=0)

    weight = load(0)  # on its way while an RMS is made of its parts
    x_slices = [_slices(x, token, slice_d) for token in range(tokens)]
    totals = [jnp.zeros(rows.shape, jnp.float32) for _ in range(tokens)]
    for start in range(0, d_model, slice_d):
        weight = (load(start) if start else weight).astype(jnp.float32)
        for token in range(tokens):
            totals[token] += jnp.sum(weight * x_slices[token](start)[None, :], axis=1)
    return totals, x_slices


def _slices(x, token, size):
    """How slices of a token's row of x, a ref or a `Normed` of refs, are loaded: as `_slice` gives them."""
    if not isinstance(x, Normed):
        return lambda start: _slice(x, token, start, size)
    inverse_rms = x.inverse_rms(token)

    def normed(start):
        columns = start + lax.iota(jnp.int32, size)
        row = _slice(x.x, token, start, size)
        return x.apply(row, inverse_rms, columns).astype(jnp.float32)

    return normed


def sum_shares(
    shares: Shares, onto: Residual | None = None, *, dtype: DTypeLike, interpret: bool = False
) -> Any:
    """y (M, D) in ``dtype``: the sum of the shares that count; added ``onto`` a residual stream if there is
    one, the `Stream` that this gives."""
    _, tokens, d_model = shares.y.shape
    width = min(_SUM_COLUMNS, pl.next_power_of_2(d_model))
    n_tiles = pl.cdiv(d_model, width)
    y = varying_axes.output(shares.y, (tokens, d_model), dtype)
    (result,) = pl.pallas_call(
        partial(_sum_kernel, width=width),
        out_shape=(y if onto is None else onto.output(n_tiles),),
        grid=(n_tiles, tokens),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="decode_sum",
    )(shares.y, shares.active, onto)
    return result


def _sum_kernel(shares_ref, active_ref, onto, out, *, width):
    n_shares, _, d_model = shares_ref.shape
    tile, row = pl.program_id(0), pl.program_id(1)
    columns = tile * width + lax.iota(jnp.int32, width)
    column_here = columns < d_model
    write = writer(out, onto, row, columns, column_here, tile)
    size = min(_MOST_SHARES, pl.next_power_of_2(n_shares))

    def step(nth, acc):
        which = nth * size + lax.iota(jnp.int32, size)
        here = plt.load(active_ref.at[which], mask=which < n_shares, other=0) != 0
        mask = here[:, None] & column_here[None, :]
        share = plt.load(shares_ref.at[which[:, None], row, columns[None, :]], mask=mask, other=0)
        return acc + jnp.sum(share, axis=0)

    write(lax.fori_loop(0, pl.cdiv(n_shares, size), step, jnp.zeros((width,), jnp.float32)))


def rows_project(
    x: jax.Array | Normed,
    weight: jax.Array,
    onto: Residual | None = None,
    *,
    dtype: DTypeLike,
    config: RowsConfig,
    interpret: bool = False,
) -> Any:
    """``x W^T`` for x (M, D), M a handful, and W (O, D): (M, O) in ``dtype``; added ``onto`` a residual
    stream if there is one, the `Stream` that this gives."""
    outputs = weight.shape[0]
    n_tiles = pl.cdiv(outputs, config.tile)
    y = varying_axes.output(unnormed(x), (x.shape[0], outputs), dtype)
    (result,) = pl.pallas_call(
        partial(_project_kernel, config=config),
        out_shape=(y if onto is None else onto.output(n_tiles),),
        grid=(n_tiles,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="decode_rows_project",
    )(x, weight, onto)
    return result


def _project_kernel(x, w_ref, onto, out, *, config):
    tile = pl.program_id(0)
    outputs = tile * config.tile + lax.iota(jnp.int32, config.tile)
    here = outputs < w_ref.shape[0]
    tokens = map(jnp.int32, range(x.shape[0]))
    writers = [writer(out, onto, token, outputs, here, tile) for token in tokens]
    ys, _ = _products(w_ref, outputs, here, x, config.slice_d)
    for write, y in zip(writers, ys, strict=True):
        write(y)
