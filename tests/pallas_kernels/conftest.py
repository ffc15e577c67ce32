"""Strict shapes for the kernels: arrays of different ranks meet only where the code says how."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def rank_promotion_raises() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield
