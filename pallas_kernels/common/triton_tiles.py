"""What Triton kernels of several formats do with tiles: products, the order of programs, masked scatters."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.common.products import CONTRACT_LAST, dot

_OUT_OF_RANGE = 1 << 30


def product(
    a_ref, a_rows: jax.Array, b_ref, b_rows: jax.Array, tile_k: int, dtype: DTypeLike | None = None
) -> jax.Array:
    """Rows of a (., D) times rows of b (., D), summed over D in f32 and rounded to ``dtype``, by default
    their own: (len(a_rows), len(b_rows)).

    Row numbers must exist; D needs not be a multiple of ``tile_k``.
    """
    depth = a_ref.shape[1]
    # At least two slices. Triton removes a one-iteration loop and then pipelines the enclosing loop instead,
    # which needs more shared memory than the device has.
    tile_k = min(tile_k, max(16, pl.next_power_of_2(depth // 2 + 1) // 2))

    def step(k, acc, masked):
        columns = (k + lax.iota(jnp.int32, tile_k))[None, :]

        def load(ref, rows):
            place = ref.at[rows[:, None], columns]
            if not masked:
                return plt.load(place)
            inside = jnp.broadcast_to(columns < depth, (rows.shape[0], tile_k))
            return plt.load(place, mask=inside, other=0)

        return acc + dot(load(a_ref, a_rows), load(b_ref, b_rows), CONTRACT_LAST)

    acc = jnp.zeros((a_rows.shape[0], b_rows.shape[0]), jnp.float32)
    whole = depth // tile_k
    acc = lax.fori_loop(0, whole, lambda i, acc: step(i * tile_k, acc, False), acc)
    if depth % tile_k:
        acc = step(whole * tile_k, acc, True)
    return acc.astype(a_ref.dtype if dtype is None else dtype)


def grouped_order(
    program: jax.Array, n_rows: int, n_columns: int, group: int = 8
) -> tuple[jax.Array, jax.Array]:
    """Row block and column block of a program, in bands of ``group`` row blocks.

    Within a band programs walk down the rows first, so that those that run at one time share their operands
    in L2.
    """
    band = program // (group * n_columns)
    height = jnp.minimum(n_rows - band * group, group)
    within = program % (group * n_columns)
    return band * group + within % height, within // height


def scatter_index(index: jax.Array, mask: jax.Array) -> jax.Array:
    """Indices for a masked scatter, with those of masked lanes out of range.

    The interpreter writes old values back through masked lanes. A masked lane must not name an element that
    another lane writes.
    """
    return jnp.where(mask, index, _OUT_OF_RANGE)
