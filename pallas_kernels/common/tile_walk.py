"""What the persistent GEMMs on Mosaic GPU share: which tiles a program computes and in which order, and where
the rows stand that an epilogue is given."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE_M = 128
HALVES = 2
HALF_ROWS = TILE_M // HALVES
"""Rows that an epilogue is given at a time: 16 from each of a warpgroup's four warps."""
_WARP_ROWS = 16
_WARPS = 4
_GROUP_M = 8
_TILES_EACH = 64
"""Tiles of a program at most. Programs that run side by side share operands while they are in L2, but drift
apart; the next ones start in step again."""


class HalfRows(NamedTuple):
    """Which rows of a tile make its halves.

    Attributes:
      step: rows from the first of a half to the first of the other.
      warp_step: rows from the first of a warp to the first of the next warp.
    """

    step: int
    warp_step: int

    @property
    def span(self) -> int:
        """Rows of the tile from a half's first to its last."""
        return (_WARPS - 1) * self.warp_step + _WARP_ROWS


class Place(NamedTuple):
    """Where an epilogue's rows stand: their block of 128, which half of it, first row and tile of columns,
    and how a half's rows are spread over the block."""

    row_block: jax.Array
    half: jax.Array
    row: jax.Array
    tile_id: jax.Array
    rows: HalfRows


class TileWalk(NamedTuple):
    """The tiles of one program, by their number.

    Attributes:
      first: place of its first tile in the order of all tiles.
      count: its tiles, 1 at the least.
      cores: programs of a round. They take turns at the round's tiles.
      shape: blocks of rows and tiles of columns.
    """

    first: Any
    count: Any
    cores: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, program: Any, cores: int, shape: tuple[int, int]) -> "TileWalk":
        """The tiles of a program, one of as many as `programs` says."""
        first = lax.div(program, cores) * (cores * _TILES_EACH) + lax.rem(program, cores)
        count = jnp.minimum(lax.div(shape[0] * shape[1] - 1 - first, cores) + 1, _TILES_EACH)
        return cls(first, count, cores, shape)

    def place_of(self, nth: Any) -> tuple[Any, Any]:
        """Block of rows and tile of columns of the nth tile."""
        return plgpu.planar_snake(self.first + nth * self.cores, self.shape, 0, _GROUP_M)

    def place_in_warp(self, nth: Any) -> tuple[Any, Any]:
        """`place_of` for a single warp, for which JAX 0.10 lowers no floor division."""
        number = self.first + nth * self.cores
        n_blocks, n_tiles = self.shape
        rest = n_blocks % _GROUP_M
        in_groups = (n_blocks - rest) * n_tiles
        whole = number < in_groups
        group = lax.div(number, jnp.int32(_GROUP_M * n_tiles))
        within = jnp.where(whole, number, number - in_groups)
        rows = jnp.where(whole, _GROUP_M, max(rest, 1))
        column = lax.rem(lax.div(within, rows), jnp.int32(n_tiles))
        backwards = lax.rem(group, jnp.int32(2)) == 1
        column = jnp.where(backwards, n_tiles - 1 - column, column)
        return group * _GROUP_M + lax.rem(within, rows), column


def tiles_of(tokens: int, d_ff: int, tile: int) -> tuple[int, int]:
    """Blocks of rows and tiles of columns of a product (tokens, d_ff)."""
    return pl.cdiv(tokens, TILE_M), pl.cdiv(d_ff, tile)


def programs(shape: tuple[int, int], cores: int) -> int:
    """Programs for all tiles: those of a round run one a core."""
    rounds, rest = divmod(shape[0] * shape[1], cores * _TILES_EACH)
    return rounds * cores + min(rest, cores)
