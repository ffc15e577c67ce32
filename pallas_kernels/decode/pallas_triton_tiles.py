"""What the decode kernels have in common: masked tiles of a matrix, and products over its rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common.products import CONTRACT_LAST, dot

_LEAST_SLICE = 16


def as_rows(weight: jax.Array | None) -> jax.Array | None:
    """A stack of weights (L, F, D) as one matrix (L F, D); a single weight as it is, and so is None."""
    return None if weight is None else weight.reshape(-1, weight.shape[-1])


def first_row(layer_ref, w_ref, d_ff: int):
    """Where the rows of a layer's F neurons begin in ``as_rows`` of a stack, 0 where there is no stack and
    ``layer_ref`` is None; a number outside of the stack is that of the nearest layer, as in
    `jax.lax.dynamic_index_in_dim`."""
    if layer_ref is None:
        return 0
    return jnp.clip(layer_ref[0], 0, w_ref.shape[0] // d_ff - 1) * d_ff


def load(ref, rows, row_here, columns, column_here=None):
    """A tile of a matrix; zero outside of what is asked for, of which nothing is read."""
    mask = jnp.broadcast_to(row_here[:, None], (rows.shape[0], columns.shape[0]))
    if column_here is not None:
        mask &= column_here[None, :]
    return plt.load(ref.at[rows[:, None], columns[None, :]], mask=mask, other=0)


def products(
    w_ref, groups: Sequence[tuple[jax.Array, jax.Array]], x_ref, tokens, token_here, *, tile_k, chains=1
) -> list[jax.Array]:
    """For each group of rows of a weight (F, D), those rows times rows of x (M, D), in f32: (rows, tokens).

    A group is the rows' numbers and which of them are needed; the others are not read, and count as zero.
    Each step of the loop takes ``tile_k`` columns, in ``chains`` sums that do not wait for each other. What a
    row gives does not depend on the other rows, nor on how many groups there are.
    """
    depth = w_ref.shape[1]
    # Triton removes a loop of one iteration, and would then pipeline what is around it instead.
    tile_k = min(tile_k, max(_LEAST_SLICE, pl.next_power_of_2(depth // 2 + 1) // 2))
    chains = min(chains, tile_k // _LEAST_SLICE)
    width = tile_k // chains

    def step(nth, sums):
        following = []
        for chain, accs in enumerate(sums):
            columns = nth * tile_k + chain * width + lax.iota(jnp.int32, width)
            inside = columns < depth if depth % tile_k else None
            x = load(x_ref, tokens, token_here, columns, inside)
            following.append(
                tuple(
                    acc + dot(load(w_ref, rows, needed, columns, inside), x, CONTRACT_LAST)
                    for (rows, needed), acc in zip(groups, accs, strict=True)
                )
            )
        return tuple(following)

    zeros = tuple(jnp.zeros((rows.shape[0], tokens.shape[0]), jnp.float32) for rows, _ in groups)
    sums = lax.fori_loop(0, pl.cdiv(depth, tile_k), step, (zeros,) * chains)
    return [sum(chain[1:], chain[0]) for chain in zip(*sums, strict=True)]


def product(w_ref, rows, needed, x_ref, tokens, token_here, *, tile_k) -> jax.Array:
    """`products` for one group."""
    return products(w_ref, [(rows, needed)], x_ref, tokens, token_here, tile_k=tile_k)[0]


def barrier(interpret: bool) -> None:
    """What threads of a program have written is there for all of them; interpreted, there is one thread."""
    if not interpret:
        plt.debug_barrier()
