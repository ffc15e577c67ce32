"""The down projection of a few tokens in Pallas Triton, over active neurons alone.

Why it exists. Of Wd only the rows of neurons that some token activates are needed, 2 D bytes each in 16 bits.
A program for each tile of y's columns would have too few bytes in flight, so that several share its neurons;
and adding up what they found in a kernel of its own would cost a launch, which is about what the product
takes.

**`decode_down`**: a grid of column tiles and *splits* of the neurons. Each program writes its part of y in
f32 and counts itself in; the one that finds all others counted adds the parts up, in the order of the splits
whichever comes last: so the same inputs give the same bits. Nobody waits for anybody.

**Numerics.** f32 accumulation and one rounding to the input type. Products are taken as ``Wd^T h``, with the
columns of y as rows: these fill a tensor core's operand, a few tokens do not.

**Limits.** As `decode_hidden`'s, whose result it takes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import varying_axes
from pallas_kernels.common.products import CONTRACT_FIRST, dot
from pallas_kernels.decode.config import DownConfig
from pallas_kernels.decode.pallas_triton_hidden import Hidden
from pallas_kernels.decode.pallas_triton_tiles import as_rows, barrier, first_row, load


def decode_down(
    hidden: Hidden,
    w_down: jax.Array,
    layer: jax.Array | None = None,
    *,
    tokens: int,
    config: DownConfig,
    interpret: bool = False,
) -> jax.Array:
    """y (M, D) of the hidden activations of M tokens and a weight (F, D), or that of one ``layer`` (1,) int32
    of a stack (L, F, D).

    ``hidden.arrivals`` needs a counter for each of ``config.n_tiles(D)`` tiles of y.
    """
    n_blocks, d_model = hidden.h.shape[0], w_down.shape[-1]
    n_tiles = config.n_tiles(d_model)
    output = partial(varying_axes.output, hidden.h)
    *_, y = pl.pallas_call(
        partial(_kernel, config=config, interpret=interpret),
        out_shape=(
            output(hidden.arrivals.shape, jnp.int32),
            output((config.splits, tokens, d_model), jnp.float32),
            output((tokens, d_model), hidden.h.dtype),
        ),
        grid=(n_tiles, config.splits, n_blocks),
        input_output_aliases={3: 0},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="decode_down",
    )(hidden.hits, hidden.h, as_rows(w_down), hidden.arrivals, layer)
    return y


def _kernel(hits_ref, h_ref, w_ref, _, layer_ref, arrivals_ref, parts_ref, y_ref, *, config, interpret):
    (_, n_tokens, d_model), (_, d_ff, rows) = parts_ref.shape, h_ref.shape
    tile, split, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    columns = tile * config.tile_d + lax.iota(jnp.int32, config.tile_d)
    place = lax.iota(jnp.int32, rows)
    tokens = block * rows + place
    column_here = columns < d_model
    inside = column_here if d_model % config.tile_d else None
    first = first_row(layer_ref, w_ref, d_ff)

    def step(nth, acc):
        # The splits take turns: neighbours in the order of activity are shared out evenly.
        neurons = (nth * config.splits + split) * config.tile + lax.iota(jnp.int32, config.tile)
        needed = plt.load(hits_ref.at[block, neurons], mask=neurons < d_ff, other=0) > 0
        h_mask = jnp.broadcast_to(needed[:, None], (config.tile, rows))
        h = plt.load(h_ref.at[block, neurons[:, None], place[None, :]], mask=h_mask, other=0)
        weight = load(w_ref, first + neurons, needed, columns, inside)
        return acc + dot(weight, h, CONTRACT_FIRST)

    steps = pl.cdiv(pl.cdiv(d_ff, config.tile), config.splits)
    acc = lax.fori_loop(0, steps, step, jnp.zeros((config.tile_d, rows), jnp.float32))
    token_here = tokens < n_tokens
    at, here = (tokens[None, :], columns[:, None]), token_here[None, :] & column_here[:, None]

    def store(y):
        plt.store(y_ref.at[at], y.astype(y_ref.dtype), mask=here)

    if config.splits == 1:
        store(acc)
        return
    plt.store(parts_ref.at[split, *at], acc, mask=here)
    barrier(interpret)
    before = plt.atomic_add(arrivals_ref, (block, tile), jnp.int32(1))

    @pl.when(before == config.splits - 1)
    def add_up():
        total = jnp.zeros(acc.shape, jnp.float32)
        for nth in range(config.splits):
            total += plt.load(parts_ref.at[nth, *at], mask=here, other=0)
        store(total)
