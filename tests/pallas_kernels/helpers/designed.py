"""Layers whose every gate has a chosen sign, exactly, in every type and on every path.

The first columns of x are one-hot: a token has a class, and the gate row of a neuron holds, at that class,
the gate itself; all other gate weights are zero. So no order of summation can change which neurons are
active, while the up and down projections remain dense random products.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

CLASSES = 8

Pattern = Callable[[np.random.Generator, np.ndarray, int, int], None]


def _all_zero(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    pass


def _fully_dense(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    active[:] = True


def _exactly_full(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    """Every whole tile of every row holds all that it has slots for."""
    for row in active:
        for start in range(0, active.shape[1] - tile + 1, tile):
            row[start + rng.choice(tile, slots - 1, replace=False)] = True


def _one_over(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    """As `_exactly_full`, with one more in one tile of every second row."""
    _exactly_full(rng, active, tile, slots)
    for row in active[::2]:
        row[rng.choice(np.flatnonzero(~row[:tile]))] = True


def _one_row_hot(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    """One tile of one row is all active; the other rows hold a few neurons each."""
    _few(rng, active, tile, slots)
    active[0, tile : 2 * tile] = True


def _every_row_overflows(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    """One more than fits, in one tile of each row: the first, the second, and so on in turn."""
    whole = active.shape[1] // tile
    for index, row in enumerate(active):
        row[index % whole * tile + rng.choice(tile, slots, replace=False)] = True


def _few(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    """Under two in a hundred, the first and the last neuron of all among them."""
    active |= rng.random(active.shape) < 0.01
    active[1 % len(active), [0, -1]] = True


def _uneven(rng: np.random.Generator, active: np.ndarray, tile: int, slots: int) -> None:
    """Rows from empty to full: some fit, some overflow."""
    active |= rng.random(active.shape) < np.linspace(0, 1, len(active))[:, None] ** 3


PATTERNS: dict[str, Pattern] = {
    "all-zero": _all_zero,
    "fully-dense": _fully_dense,
    "exactly-full": _exactly_full,
    "one-over": _one_over,
    "one-row-hot": _one_row_hot,
    "every-row-overflows": _every_row_overflows,
    "few": _few,
    "uneven": _uneven,
}


def layer(
    pattern: str,
    *,
    tokens: int,
    d_model: int,
    d_ff: int,
    tile: int,
    slots: int,
    dtype: Any,
    gated: bool = True,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arguments of one call, x (M, D) and weights (F, D), and which gates are active, (M, F) bool."""
    rng = np.random.default_rng([seed, tokens, d_ff])
    classes = min(CLASSES, max(tokens, 1))
    assert d_model > classes, "the one-hot columns of x must leave room for random ones"
    active = np.zeros((classes, d_ff), bool)
    PATTERNS[pattern](rng, active, tile, slots)
    of_token = np.arange(tokens) % classes

    magnitude = rng.uniform(0.25, 2.0, active.shape)
    inactive = rng.choice([-1.0, -0.0, 0.0], active.shape, p=[0.8, 0.1, 0.1]) * magnitude
    gate = np.zeros((d_ff, d_model))
    gate[:, :classes] = np.where(active, magnitude, inactive).T
    x = rng.standard_normal((tokens, d_model))
    x[:, :classes] = 0
    x[np.arange(tokens), of_token] = rng.choice([0.5, 1.0, 2.0], tokens)
    other, down = rng.standard_normal((2, d_ff, d_model)) / np.sqrt(d_model)
    inputs = {"x": x, "w_up": gate, "w_down": down}
    if gated:
        inputs |= {"w_gate": gate, "w_up": other}
    return {name: value.astype(dtype) for name, value in inputs.items()}, active[of_token]
