"""The feed-forward layer of a few tokens in Pallas Triton.

Why they exist. A token of decode multiplies every weight once, so its time is that of reading them: in
bf16, 2 F D bytes for each of two or three matrices. Which neurons are active is known after the gate alone,
and of an inactive neuron the rows of Wu and Wd need not be read: what is left is the gate, 2 F D bytes, and
4 D bytes for each neuron that is active for some token of the block.

**`decode_hidden`**: each program owns a tile of neurons. It multiplies their gate rows with all tokens of a
block, reads the up rows of those that are active, and, with a few tokens, their down rows too, for a share of
y (M, D) in f32; with more tokens it writes h, and **`decode_down`** computes shares of y, a range of neurons
each. **`sum_shares`** adds the shares up, those of tiles without an active neuron left out: in an order that
the sizes fix, so that the same inputs give the same bits.

**Numerics.** f32 accumulation; g, act(g), u, h and y are rounded to the input type, where the reference
rounds them. f32 inputs multiply as IEEE f32.

**Limits.** An NVIDIA GPU of compute capability 8.0 or newer. More tokens than a block of 64 read the weights
once a block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.activations import Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.config import ROWS_TOKENS, DecodeConfig
from pallas_kernels.decode.pallas_triton_rows import rows_hidden

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_CONTRACT_FIRST = (((0,), (0,)), ((), ()))
_MOST_SHARES = 256
_SUM_COLUMNS = 32


class Hidden(NamedTuple):
    """What the gate and the up projection of a call gave; the tokens are in blocks of R.

    Attributes:
      hits: (n_blocks, F) int32, for how many tokens of a block a neuron is active.
      active: (n_blocks, n_tiles) int32, a bit for each neuron of a tile that some token activates.
      nnz: (n_tiles, M) int32, each token's active neurons in a tile.
      l1: (n_tiles, M) f32, each token's sum of |h| in a tile.
      h: (n_blocks, F, R) in x's type, meaningful where ``hits`` is positive; or, where shares of y were
        computed at once, those: (n_tiles, M, D) f32, meaningful where ``active`` is not zero.
    """

    hits: jax.Array
    active: jax.Array
    nnz: jax.Array
    l1: jax.Array
    h: jax.Array


def decode_ffn(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    rule: Rule,
    config: DecodeConfig,
    interpret: bool = False,
) -> tuple[jax.Array, Hidden]:
    """The layer's y (M, D), and what its statistics are made of, for x (M, D) and weights (F, D)."""
    if x.shape[0] <= ROWS_TOKENS:
        rows_config = configs.choose_rows(x)
        hidden = Hidden(
            *rows_hidden(x, w_gate, w_up, w_down, rule=rule, config=rows_config, interpret=interpret)
        )
        return sum_shares(hidden.h, hidden.active, x, rows=config.rows, interpret=interpret), hidden
    hidden = decode_hidden(x, w_gate, w_up, w_down, rule=rule, config=config, interpret=interpret)
    total = partial(sum_shares, x=x, rows=config.rows, interpret=interpret)
    if not config.splits:
        return total(hidden.h, hidden.active), hidden
    shares = decode_down(hidden, w_down, tokens=x.shape[0], config=config, interpret=interpret)
    return total(shares, None), hidden


# -- gate and up ---------------------------------------------------------------------------------------------


def decode_hidden(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    rule: Rule,
    config: DecodeConfig,
    interpret: bool = False,
) -> Hidden:
    """The hidden activations of x (M, D), or, without ``config.splits``, each tile's share of y."""
    (tokens, d_model), d_ff = x.shape, w_up.shape[0]
    n_blocks, n_tiles = pl.cdiv(tokens, config.rows), pl.cdiv(d_ff, config.tile)
    operands = [w_up] if w_gate is None else [w_gate, w_up]
    if config.splits:
        result = varying_axes.output(x, (n_blocks, d_ff, config.rows), x.dtype)
    else:
        result = varying_axes.output(x, (n_tiles, tokens, d_model), jnp.float32)
        operands.append(w_down)
    return Hidden(
        *pl.pallas_call(
            partial(_hidden_kernel, gated=w_gate is not None, rule=rule, config=config),
            out_shape=(
                varying_axes.output(x, (n_blocks, d_ff), jnp.int32),
                varying_axes.output(x, (n_blocks, n_tiles), jnp.int32),
                varying_axes.output(x, (n_tiles, tokens), jnp.int32),
                varying_axes.output(x, (n_tiles, tokens), jnp.float32),
                result,
            ),
            grid=(n_tiles, n_blocks),
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
            name="decode_hidden",
        )(x, *operands)
    )


def _hidden_kernel(x_ref, *refs, gated, rule, config):
    weight_refs, (hits_ref, active_ref, nnz_ref, l1_ref, h_ref) = refs[:-5], refs[-5:]
    gate_ref, up_ref = weight_refs[0], weight_refs[1] if gated else None
    tokens, d_ff = x_ref.shape[0], gate_ref.shape[0]
    tile_id, block = pl.program_id(0), pl.program_id(1)
    rows = block * config.rows + lax.iota(jnp.int32, config.rows)
    neurons = tile_id * config.tile + lax.iota(jnp.int32, config.tile)
    token_here, neuron_here = rows < tokens, neurons < d_ff

    gate = product(gate_ref, neurons, neuron_here, x_ref, rows, token_here, config.tile_k)
    gate = gate.astype(x_ref.dtype)
    mask = rule.active(gate.astype(jnp.float32), gate.dtype) & token_here[None, :] & neuron_here[:, None]
    counted = mask.astype(jnp.int32)
    hits, total = jnp.sum(counted, axis=1), jnp.sum(counted)
    plt.store(hits_ref.at[block, neurons], hits, mask=neuron_here)
    plt.store(nnz_ref.at[tile_id, rows], jnp.sum(counted, axis=0), mask=token_here)
    active_ref[block, tile_id] = jnp.sum((hits > 0).astype(jnp.int32) << lax.iota(jnp.int32, config.tile))

    @pl.when(total == 0)
    def _():
        plt.store(l1_ref.at[tile_id, rows], jnp.zeros(rows.shape, jnp.float32), mask=token_here)

    @pl.when(total > 0)
    def _():
        needed = hits > 0
        dtype = gate.dtype
        h = rule.value(gate.astype(jnp.float32)).astype(dtype)
        if gated:
            up = product(up_ref, neurons, needed, x_ref, rows, token_here, config.tile_k)
            up = up.astype(dtype).astype(jnp.float32)
            h = (h.astype(jnp.float32) * rule.up(up)).astype(dtype)
        h = jnp.where(mask, h, jnp.zeros_like(h))
        l1 = jnp.sum(jnp.abs(h.astype(jnp.float32)), axis=0)
        plt.store(l1_ref.at[tile_id, rows], l1, mask=token_here)
        if config.splits:
            place = (block, neurons[:, None], lax.iota(jnp.int32, config.rows)[None, :])
            plt.store(h_ref.at[place], h, mask=jnp.broadcast_to(needed[:, None], h.shape))
        else:
            _store_share(h, weight_refs[-1], neurons, needed, h_ref, tile_id, rows, token_here, config)


def _store_share(h, w_ref, neurons, needed, shares_ref, tile_id, rows, token_here, config):
    """One tile's share of y, ``h^T W`` for its h (tile, R), to its place in (n_tiles, M, D)."""
    d_model = w_ref.shape[1]

    def step(nth, _):
        columns = nth * config.tile_d + lax.iota(jnp.int32, config.tile_d)
        column_here = columns < d_model
        weight = _load(w_ref, neurons, needed, columns, column_here)
        share = dot(h, weight, _CONTRACT_FIRST)
        mask = token_here[:, None] & column_here[None, :]
        plt.store(shares_ref.at[tile_id, rows[:, None], columns[None, :]], share, mask=mask)
        return 0

    lax.fori_loop(0, pl.cdiv(d_model, config.tile_d), step, 0)


def product(w_ref, neurons, needed, x_ref, rows, token_here, tile_k):
    """Rows of a weight (F, D) times rows of x (M, D), in f32: (len(neurons), len(rows)).

    Rows that are not needed are not read, and count as zero.
    """
    depth = w_ref.shape[1]
    # Triton removes a loop of one iteration, and would then pipeline what is around it instead.
    tile_k = min(tile_k, max(16, pl.next_power_of_2(depth // 2 + 1) // 2))

    def step(nth, acc):
        columns = nth * tile_k + lax.iota(jnp.int32, tile_k)
        inside = columns < depth if depth % tile_k else None
        weight = _load(w_ref, neurons, needed, columns, inside)
        x = _load(x_ref, rows, token_here, columns, inside)
        return acc + dot(weight, x, _CONTRACT_LAST)

    acc = jnp.zeros((neurons.shape[0], rows.shape[0]), jnp.float32)
    return lax.fori_loop(0, pl.cdiv(depth, tile_k), step, acc)


def _load(ref, rows, row_here, columns, column_here):
    """A block of a matrix; zero outside of what is asked for, of which nothing is read."""
    mask = jnp.broadcast_to(row_here[:, None], (rows.shape[0], columns.shape[0]))
    if column_here is not None:
        mask &= column_here[None, :]
    return plt.load(ref.at[rows[:, None], columns[None, :]], mask=mask, other=0)


def dot(a, b, dimensions):
    """A product inside a kernel, in f32 whatever the operands' type."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


# -- down ----------------------------------------------------------------------------------------------------


def decode_down(
    hidden: Hidden, w_down: jax.Array, *, tokens: int, config: DecodeConfig, interpret: bool = False
) -> jax.Array:
    """Shares of y, (splits, M, D) f32, each of one range of neurons."""
    d_model = w_down.shape[1]
    return pl.pallas_call(
        partial(_down_kernel, config=config),
        out_shape=varying_axes.output(hidden.h, (config.splits, tokens, d_model), jnp.float32),
        grid=(pl.cdiv(d_model, config.tile_d), config.splits, hidden.h.shape[0]),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="decode_down",
    )(hidden.active, hidden.h, w_down)


def _down_kernel(active_ref, h_ref, w_ref, shares_ref, *, config):
    tokens, (d_ff, d_model) = shares_ref.shape[1], w_ref.shape
    split, block = pl.program_id(1), pl.program_id(2)
    columns = pl.program_id(0) * config.tile_d + lax.iota(jnp.int32, config.tile_d)
    column_here = columns < d_model
    within = lax.iota(jnp.int32, config.rows)
    n_tiles, of_tile = pl.cdiv(d_ff, config.tile), lax.iota(jnp.int32, config.tile)
    # The splits take turns: neighbours in the order of activity are shared out evenly. What is active is read
    # before the loop, whose loads Triton can then issue ahead: they wait for no other load.
    steps = pl.cdiv(n_tiles, config.splits)
    turns = lax.iota(jnp.int32, pl.next_power_of_2(steps))
    tiles = turns * config.splits + split
    words = plt.load(active_ref.at[block, tiles], mask=tiles < n_tiles, other=0)

    def step(nth, acc):
        word = jnp.sum(jnp.where(turns == nth, words, 0))
        needed = (word >> of_tile) & 1 > 0
        neurons = (nth * config.splits + split) * config.tile + of_tile
        h_mask = jnp.broadcast_to(needed[:, None], (config.tile, config.rows))
        h = plt.load(h_ref.at[block, neurons[:, None], within[None, :]], mask=h_mask, other=0)
        return acc + dot(h, _load(w_ref, neurons, needed, columns, column_here), _CONTRACT_FIRST)

    acc = lax.fori_loop(0, steps, step, jnp.zeros((config.rows, config.tile_d), jnp.float32))
    rows = block * config.rows + within
    mask = (rows < tokens)[:, None] & column_here[None, :]
    plt.store(shares_ref.at[split, rows[:, None], columns[None, :]], acc, mask=mask)


# -- sum -----------------------------------------------------------------------------------------------------


def sum_shares(
    shares: jax.Array, active: jax.Array | None, x: jax.Array, *, rows: int, interpret: bool = False
) -> jax.Array:
    """The sum over the first axis of (n, M, D) f32, in x's type, over those that ``active`` (n_blocks, n) of
    the token's block counts anything for; ``None`` means all."""
    _, tokens, d_model = shares.shape
    width = min(_SUM_COLUMNS, pl.next_power_of_2(d_model))
    return pl.pallas_call(
        partial(_sum_kernel, rows=rows, width=width),
        out_shape=varying_axes.output(x, (tokens, d_model), x.dtype),
        grid=(pl.cdiv(d_model, width), tokens),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="decode_sum",
    )(shares, *([] if active is None else [active]))


def _sum_kernel(shares_ref, *refs, rows, width):
    *active_refs, y_ref = refs
    n_shares, _, d_model = shares_ref.shape
    row = pl.program_id(1)
    columns = pl.program_id(0) * width + lax.iota(jnp.int32, width)
    column_here = columns < d_model
    size = min(_MOST_SHARES, pl.next_power_of_2(n_shares))

    def step(nth, acc):
        which = nth * size + lax.iota(jnp.int32, size)
        here = which < n_shares
        for active_ref in active_refs:
            here &= plt.load(active_ref.at[row // rows, which], mask=here, other=0) != 0
        mask = here[:, None] & column_here[None, :]
        share = plt.load(shares_ref.at[which[:, None], row, columns[None, :]], mask=mask, other=0)
        return acc + jnp.sum(share, axis=0)

    acc = lax.fori_loop(0, pl.cdiv(n_shares, size), step, jnp.zeros((width,), jnp.float32))
    plt.store(y_ref.at[row, columns], acc.astype(y_ref.dtype), mask=column_here)
