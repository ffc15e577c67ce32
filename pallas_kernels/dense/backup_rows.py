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

Carry = TypeVar("Carry")

_SMALL_ROUND = 128


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
