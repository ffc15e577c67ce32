"""The first kernel of the decode layer in Pallas Triton: which neurons are active, and what they are.

Why it exists. A token of decode multiplies every weight once, so its time is that of reading them: in 16 bits
2 F D bytes for each of two or three matrices. Which neurons are active is known after the gate alone, and of
a neuron that no token activates the rows of Wu and Wd need not be read: what is left is the gate, 2 F D
bytes, and 4 D bytes for each active neuron.

**`decode_hidden`**: one wave of programs, about one for each core, each with a tile of neurons. A program's
neurons lie as far apart as there are programs, so that neighbours, which are often active together, are
shared out. It streams the gate rows past all tokens of a block, and then the up rows of the neurons that some
token activates, *compacted*: sixteen neurons are one operand of a tensor core, wherever they stand in the
tile. Most programs have fewer; one that has more streams all of its groups in one loop, so that a layer whose
neurons are all active takes no longer than a dense one. The gates wait for their up projection in h's place.

**Numerics.** f32 accumulation; g, act(g), u and h are rounded to the input type, where the reference rounds
them. f32 inputs multiply as IEEE f32. A token's result does not depend on what the others of its block
activate, bit for bit.

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
from pallas_kernels.decode.config import TilesConfig
from pallas_kernels.decode.pallas_triton_tiles import as_rows, barrier, first_row, product, products

_GROUP = 16


class Hidden(NamedTuple):
    """What the gate and the up projection of a call gave; the tokens are in blocks of R.

    Attributes:
      hits: (n_blocks, F) int32, for how many tokens of a block a neuron is active.
      nnz: (n_programs, M) int32, each token's active neurons among those of a program.
      l1: (n_programs, M) f32, each token's sum of |h| over those neurons.
      h: (n_blocks, F, R) in x's type, meaningful where ``hits`` is positive.
      arrivals: (n_blocks, n_counters) int32 zeros, for the kernel that follows to count in.
    """

    hits: jax.Array
    nnz: jax.Array
    l1: jax.Array
    h: jax.Array
    arrivals: jax.Array


def decode_hidden(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    layer: jax.Array | None = None,
    *,
    n_counters: int,
    rule: Rule,
    config: TilesConfig,
    interpret: bool = False,
) -> Hidden:
    """The hidden activations of x (M, D) for weights (F, D), or for those of one ``layer`` (1,) int32 of a
    stack (L, F, D), which are read where they stand.

    Raises:
      ValueError: a config whose programs do not have all neurons.
    """
    tokens, d_ff = x.shape[0], w_up.shape[-2]
    config.owned(d_ff)
    n_blocks = pl.cdiv(tokens, config.rows)
    output = partial(varying_axes.output, x)
    return Hidden(
        *pl.pallas_call(
            partial(_kernel, rule=rule, config=config, interpret=interpret),
            out_shape=(
                output((n_blocks, d_ff), jnp.int32),
                output((config.programs, tokens), jnp.int32),
                output((config.programs, tokens), jnp.float32),
                output((n_blocks, d_ff, config.rows), x.dtype),
                output((n_blocks, n_counters), jnp.int32),
            ),
            grid=(config.programs, n_blocks),
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
            name="decode_hidden",
        )(x, as_rows(w_gate), as_rows(w_up), layer)
    )


def _kernel(
    x_ref,
    w_gate_ref,
    w_up_ref,
    layer_ref,
    hits_ref,
    nnz_ref,
    l1_ref,
    h_ref,
    arrivals_ref,
    *,
    rule,
    config,
    interpret,
):
    gated = w_gate_ref is not None
    gate_ref = w_gate_ref if gated else w_up_ref
    dtype, n_tokens, d_ff = x_ref.dtype, x_ref.shape[0], hits_ref.shape[1]
    program, block = pl.program_id(0), pl.program_id(1)
    neurons = program + config.programs * lax.iota(jnp.int32, config.tile)
    place = lax.iota(jnp.int32, config.rows)
    tokens = block * config.rows + place
    token_here, neuron_here = tokens < n_tokens, neurons < d_ff
    first = first_row(layer_ref, gate_ref, d_ff)

    @pl.when(program == 0)
    def reset_arrivals():
        n_counters = arrivals_ref.shape[1]
        counters = lax.iota(jnp.int32, pl.next_power_of_2(n_counters))
        plt.store(arrivals_ref.at[block, counters], jnp.zeros_like(counters), mask=counters < n_counters)

    gate = product(gate_ref, first + neurons, neuron_here, x_ref, tokens, token_here, tile_k=config.tile_k)
    gate = gate.astype(dtype)
    active = rule.active(gate.astype(jnp.float32), dtype) & token_here[None, :] & neuron_here[:, None]
    counted = active.astype(jnp.int32)
    hits, nnz = jnp.sum(counted, axis=1), jnp.sum(counted, axis=0)
    needed = hits > 0
    count = jnp.sum(needed.astype(jnp.int32))
    plt.store(hits_ref.at[block, neurons], hits, mask=neuron_here)
    plt.store(nnz_ref.at[program, tokens], nnz, mask=token_here)

    def h_place(neurons):
        return h_ref.at[block, neurons[:, None], place[None, :]]

    def store_l1(h):
        plt.store(l1_ref.at[program, tokens], sum(map(_sum_of_magnitudes, h)), mask=token_here)

    @pl.when(count == 0)
    def nothing():
        plt.store(l1_ref.at[program, tokens], jnp.zeros(place.shape, jnp.float32), mask=token_here)

    if not gated:

        @pl.when(count > 0)
        def without_gate():
            h = jnp.where(active, rule.value(gate.astype(jnp.float32)), 0).astype(dtype)
            plt.store(h_place(neurons), h, mask=jnp.broadcast_to(needed[:, None], h.shape))
            store_l1([h])

        return

    def multiply(n_groups):
        """Puts h of the neurons needed, of which there are at most ``n_groups`` groups, in its place."""
        plt.store(h_place(neurons), gate, mask=jnp.broadcast_to(needed[:, None], gate.shape))
        rank = jnp.cumsum(needed.astype(jnp.int32)) - 1
        groups = []
        for nth in range(n_groups):
            slots = nth * _GROUP + lax.iota(jnp.int32, _GROUP)
            chosen = needed[None, :] & (rank[None, :] == slots[:, None])
            chosen_neurons = jnp.sum(jnp.where(chosen, neurons[None, :], 0), axis=1)
            here = slots < count
            # Interpreted, a masked store writes back what it finds: the slots left over name no neuron.
            groups.append((jnp.where(here, chosen_neurons, d_ff + slots), here))
        barrier(interpret)
        masks = [jnp.broadcast_to(here[:, None], (_GROUP, config.rows)) for _, here in groups]
        gates = [
            plt.load(h_place(chosen), mask=mask, other=0)
            for (chosen, _), mask in zip(groups, masks, strict=True)
        ]
        up_rows = [(first + chosen, here) for chosen, here in groups]
        ups = products(w_up_ref, up_rows, x_ref, tokens, nnz > 0, tile_k=config.tile_k, chains=config.chains)
        barrier(interpret)  # the gates have been read
        hs = []
        for (chosen, here), mask, g, up in zip(groups, masks, gates, ups, strict=True):
            g = g.astype(jnp.float32)
            h = rule.value(g).astype(dtype).astype(jnp.float32) * rule.up(
                up.astype(dtype).astype(jnp.float32)
            )
            active = rule.active(g, dtype) & token_here[None, :] & here[:, None]
            h = jnp.where(active, h, 0).astype(dtype)
            plt.store(h_place(chosen), h, mask=mask)
            hs.append(h)
        store_l1(hs)

    n_groups = pl.cdiv(config.tile, _GROUP)
    pl.when((count > 0) & (count <= _GROUP))(lambda: multiply(1))
    if n_groups > 1:
        pl.when(count > _GROUP)(lambda: multiply(n_groups))


def _sum_of_magnitudes(h):
    """Over the neurons of h (n, R), in f32."""
    return jnp.sum(jnp.abs(h.astype(jnp.float32)), axis=0)
