"""How the decode kernels cut a layer.

All of them stream rows of weights past a few tokens: what counts is how many bytes are in flight, which is
the tile times the slice times the stages on every core.
"""

import dataclasses

import jax

MOST_TOKENS = 64
"""Tokens of a block, up to which the layer is bound by reading weights and not by the tensor cores."""

ROWS_TOKENS = 2
"""Tokens up to which rows of weights meet vectors, without tensor cores."""

_FUSED_TOKENS = 8
_LEAST_ROWS = 16


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Sizes of one call's kernels.

    Attributes:
      rows: tokens of a block, padded to what a tensor core takes.
      tile: neurons of a program, of which each has a bit in a word.
      tile_k: columns of D in one slice of a product over D.
      tile_d: columns of D of the down projection's output.
      num_warps: warps of a program.
      num_stages: slices in flight.
      splits: programs that share the neurons of one tile of y; 0 where the first kernel computes its own
        neurons' share of y.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    rows: int
    tile: int
    tile_k: int
    tile_d: int
    num_warps: int
    num_stages: int
    splits: int

    def __post_init__(self) -> None:
        _check(self)
        if self.splits < 0:
            raise ValueError(f"DecodeConfig.splits must be at least 0; got {self.splits}")


@dataclasses.dataclass(frozen=True)
class ProjectConfig:
    """Sizes of a projection's kernel: ``tile`` outputs of a program, the others as in `DecodeConfig`.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    rows: int
    tile: int
    tile_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """Sizes of the kernels of a handful of tokens: ``tile`` rows of a weight a program, of which ``slice_d``
    columns at a time are in flight.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    tile: int
    slice_d: int
    num_warps: int

    def __post_init__(self) -> None:
        _check(self)


_LIMITS = {
    "rows": (16, 64),
    "tile": (1, 32),
    "tile_k": (16, 512),
    "tile_d": (16, 1024),
    "slice_d": (16, 4096),
    "num_warps": (1, 16),
}


def _check(config: DecodeConfig | ProjectConfig | RowsConfig) -> None:
    kind = type(config).__name__
    for field in dataclasses.fields(config):
        if field.name not in _LIMITS:
            continue
        value, (low, high) = getattr(config, field.name), _LIMITS[field.name]
        if not low <= value <= high or value & (value - 1):
            raise ValueError(f"{kind}.{field.name} must be a power of two from {low} to {high}; got {value}")
    if not isinstance(config, RowsConfig) and config.num_stages < 1:
        raise ValueError(f"{kind}.num_stages must be at least 1; got {config.num_stages}")


def choose(x: jax.Array, d_ff: int) -> DecodeConfig:
    """The config for x (M, D) and F neurons.

    A share of y for each tile of neurons is F / tile * M * D f32 values to write and read again: up to 8
    tokens less than what a launch costs, beyond that more.
    """
    tokens, rows = x.shape[0], _rows(x.shape[0])
    splits = 0 if tokens <= _FUSED_TOKENS else max(1, min(16, d_ff // 256))
    if x.dtype.itemsize == 4:  # operands of a product without tensor cores stand in registers
        return DecodeConfig(rows, 16, 32, 64, 4, 2, splits)
    # Wide slices: each costs a barrier, and with few tokens there is little to do between two of them.
    if rows == _LEAST_ROWS:
        return DecodeConfig(rows, 16, 512, 128 if splits else 512, 4, 3, splits)
    return DecodeConfig(rows, 32, 256, 128, 4, 3, splits)


def choose_rows(x: jax.Array) -> RowsConfig:
    """The config for x (M, D) of at most `ROWS_TOKENS` tokens."""
    slice_d = min(2048, max(16, 1 << (x.shape[1] - 1).bit_length()))
    return RowsConfig(8, slice_d, 4 if x.shape[0] * x.shape[1] <= 2048 else 8)


def choose_project(x: jax.Array, outputs: int) -> ProjectConfig:
    """The config for x (M, D) and a weight (outputs, D)."""
    rows = _rows(x.shape[0])
    if x.dtype.itemsize == 4:
        return ProjectConfig(rows, 16, 32, 4, 2)
    # Narrow outputs in narrow tiles: a program for every core at the least.
    tile = 16 if outputs < 8192 and rows == _LEAST_ROWS else 32
    return ProjectConfig(rows, tile, 256 if rows == _LEAST_ROWS else 128, 4, 4)


def _rows(tokens: int) -> int:
    return min(MOST_TOKENS, max(_LEAST_ROWS, 1 << max(tokens - 1, 0).bit_length()))
