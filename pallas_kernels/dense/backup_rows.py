"""The dense backup of rows that do not fit a compact format: in rounds on the device, as many as it takes.

A round computes a bounded number of rows, so that its memory is bounded; a loop runs until no row is left, so
that no result depends on the bound. Most calls have no such row, or a handful: after the full rounds come
small ones, so that a handful costs what a handful costs.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import reference
from pallas_kernels.activations import Rule
from pallas_kernels.common.products import multiply

Carry = TypeVar("Carry")

_SMALL_ROUND = 128


def bound(tokens: int) -> int:
    """Rows of a round where nobody asks for another number: enough to fill a GPU, in less memory than TwELL's
    packed words take at C = 8."""
    return max(128, min(tokens // 16, 8192))


def rounds(
    overflows: jax.Array, bound: int, one_round: Callable[[jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """Runs ``carry = one_round(ids, carry)`` until every overflowing row has been in a round.

    Args:
      overflows: (M,) bool.
      bound: rows of a full round.
      one_round: gets (bound,) or fewer int32 row numbers, ascending, M where there is no row left.
    """
    tokens = overflows.shape[0]
    rank = jnp.cumsum(overflows, dtype=jnp.int32)

    def loop(size, least, state):
        """Rounds of ``size`` rows while at least ``least`` are left."""

        def body(state):
            done, carry = state
            chosen = overflows & (rank > done) & (rank <= done + size)
            ids = jnp.nonzero(chosen, size=size, fill_value=tokens)[0]
            return done + size, one_round(ids, carry)

        return lax.while_loop(lambda state: rank[-1] - state[0] >= least, body, state)

    state = (jnp.int32(0), carry)
    if bound > 2 * _SMALL_ROUND:
        state = loop(bound, bound // 4, state)
        bound = _SMALL_ROUND
    return loop(bound, 1, state)[1]


def rows_of(array: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of an array, zero where the id is out of range."""
    return array.at[ids].get(mode="fill", fill_value=0)


def mend(
    y: jax.Array,
    l1: jax.Array,
    overflows: jax.Array,
    bound: int,
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """y (M, D) and each token's sum of |h| (M,) with the overflowing rows computed densely, ``bound`` of them
    a round."""

    def one_round(ids, carry):
        y, l1 = carry
        h, _ = reference.hidden(*reference.projections(rows_of(x, ids), w_gate, w_up), rule)
        row_l1 = jnp.sum(jnp.abs(h), axis=1, dtype=jnp.float32)
        return y.at[ids].set(multiply(h, w_down), mode="drop"), l1.at[ids].set(row_l1, mode="drop")

    return rounds(overflows, bound, one_round, (y, l1))
