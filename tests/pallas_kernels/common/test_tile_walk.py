"""The order of tiles in persistent GEMMs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import tile_walk
from pallas_kernels.common.tile_walk import TileWalk

SHAPES = [(1, 1), (3, 5), (8, 4), (19, 7), (24, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_programs_take_each_tile_once(monkeypatch, shape):
    most, cores = 3, 4
    monkeypatch.setattr(tile_walk, "_TILES_EACH", most)

    @jax.jit
    @jax.vmap
    def tiles(program):
        walk = TileWalk.of(program, cores, shape)
        return walk.count, jnp.stack(jax.vmap(walk.place_of)(jnp.arange(most, dtype=jnp.int32)), axis=1)

    counts, places = map(np.asarray, tiles(jnp.arange(tile_walk.programs(shape, cores), dtype=jnp.int32)))
    assert counts.min() >= 1
    found = [tuple(place) for count, each in zip(counts, places, strict=True) for place in each[:count]]
    assert sorted(found) == sorted(np.ndindex(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_warp_finds_the_same_places(shape):
    walk = TileWalk(jnp.int32(0), shape[0] * shape[1], 1, shape)
    numbers = jnp.arange(walk.count, dtype=jnp.int32)
    places, in_warp = (jax.vmap(of)(numbers) for of in (walk.place_of, walk.place_in_warp))
    np.testing.assert_array_equal(in_warp, places)
