"""How the decode kernels cut a layer.

All of them stream rows of weights past a few tokens: what counts is how many bytes are in flight, which is
the tile times the slice times the stages on every core.
"""

import dataclasses

import jax

from pallas_kernels import device as device_lib
from pallas_kernels.common import powers_of_2
from pallas_kernels.decode.residual import Normed
from pallas_kernels.device import Device

MOST_TOKENS = 64
"""Tokens of a block, up to which the layer is bound by reading weights and not by the tensor cores."""

ROWS_TOKENS = 2
"""Tokens up to which rows of weights meet vectors, without tensor cores."""


_HOPPER = 90
_LEAST_ROWS = 16
_MOST_NEURONS = 64
_LEAST_NEURONS = 16
_MOST_SPLITS = 16
_CORES = 132
_SHARED_MEMORY_ROOM = 8 * 1024


def auto_tokens(device: Device) -> int:
    """Tokens up to which ``format="auto"`` takes these kernels.

    For one or two the layer reads a third of a dense layer's bytes, whatever the device. More were measured
    on Hopper alone, where the layer is faster than a dense one at every number of tokens.
    """
    return MOST_TOKENS if device.capability == _HOPPER else ROWS_TOKENS


@dataclasses.dataclass(frozen=True)
class HiddenConfig:
    """How the gate and the up projection are cut.

    Attributes:
      rows: tokens of a block, padded to what a tensor core takes.
      tile: neurons of a program at the most.
      programs: how many programs share the neurons.
      tile_k: columns of D in one slice of a product over D.
      chains: sums of the up projection that do not wait for each other, each with its part of a slice: with
        the few neurons of a program the tensor cores' latency is what a sum takes.
      num_warps: warps of a program.
      num_stages: slices in flight.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    rows: int
    tile: int
    programs: int
    tile_k: int
    chains: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        powers_of_2.check(
            self, rows=(_LEAST_ROWS, MOST_TOKENS), tile=(_LEAST_NEURONS, 128), tile_k=(16, 512),
            chains=(1, 8), num_warps=(1, 16),
        )  # fmt: skip
        _at_least_one(self, "programs", "num_stages")


@dataclasses.dataclass(frozen=True)
class DownConfig:
    """How the down projection is cut.

    Attributes:
      tile: neurons of one slice of a product over F.
      tile_d: columns of y of a program.
      splits: programs that share the neurons of one tile of y.
      num_warps: warps of a program.
      num_stages: slices in flight.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    tile: int
    tile_d: int
    splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        powers_of_2.check(self, tile=(16, 512), tile_d=(16, 256), num_warps=(1, 16))
        _at_least_one(self, "splits", "num_stages")

    def n_tiles(self, d_model: int) -> int:
        """Tiles of y's columns."""
        return -(-d_model // self.tile_d)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Configs of a call's two kernels."""

    hidden: HiddenConfig
    down: DownConfig

    def check(self, d_ff: int) -> None:
        """Checks that the programs have all of F neurons.

        Raises:
          ValueError: some neurons would have no program.
        """
        if self.hidden.tile * self.hidden.programs < d_ff:
            raise ValueError(
                f"HiddenConfig.tile * programs must be at least F={d_ff}, one program for every neuron; "
                f"got {self.hidden.tile} * {self.hidden.programs}"
            )


@dataclasses.dataclass(frozen=True)
class ProjectConfig:
    """Sizes of a projection's kernel: ``tile`` outputs of a program, the others as in `HiddenConfig`.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    rows: int
    tile: int
    tile_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        powers_of_2.check(
            self, rows=(_LEAST_ROWS, MOST_TOKENS), tile=(1, 128), tile_k=(16, 512), num_warps=(1, 16)
        )
        _at_least_one(self, "num_stages")


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
        powers_of_2.check(self, tile=(1, 32), slice_d=(16, 4096), num_warps=(1, 16))


def _at_least_one(config: HiddenConfig | DownConfig | ProjectConfig, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be at least 1; got {value}")


def choose(x: jax.Array | Normed, d_ff: int, device: Device | None = None) -> DecodeConfig:
    """The config for x (M, D) and F neurons."""
    device = device_lib.current() if device is None else device
    (tokens, d_model), itemsize = x.shape, x.dtype.itemsize
    rows, cores = _rows(tokens), device.cores or _CORES
    room = device.shared_memory - _SHARED_MEMORY_ROOM

    # As many waves as the largest tile needs, and neurons in equal numbers.
    most = _MOST_NEURONS if itemsize == 2 else _LEAST_NEURONS
    waves = max(1, -(-d_ff // (most * cores)))
    owned = min(most, max(_LEAST_NEURONS, -(-d_ff // (cores * waves))))
    tile, programs = powers_of_2.at_least(owned), -(-d_ff // owned)

    # One program of y for each core, or less.
    tile_d, tile_n = 64, 128 if itemsize == 2 else 32
    splits = max(1, min(cores // -(-d_model // tile_d), -(-d_ff // tile_n), _MOST_SPLITS))
    if itemsize == 4:  # operands of a product without tensor cores stand in registers
        return DecodeConfig(
            HiddenConfig(rows, tile, programs, 32, 1, 4, 2), DownConfig(tile_n, tile_d, splits, 4, 2)
        )

    def stages(slice_bytes: int) -> int:
        return max(2, room // slice_bytes)

    # Wide slices: each costs a barrier, and with few tokens there is little to do between two of them.
    tile_k = 256 if rows <= 32 else 128
    while tile_k > 64 and stages((tile + rows) * tile_k * itemsize) < 3:
        tile_k //= 2
    num_stages = min(1024 // tile_k, stages((tile + rows) * tile_k * itemsize))
    return DecodeConfig(
        HiddenConfig(rows, tile, programs, tile_k, tile_k // 64, 4, num_stages),
        DownConfig(tile_n, tile_d, splits, 4, min(8, stages((tile_d + rows) * tile_n * itemsize))),
    )


def choose_rows(x: jax.Array | Normed) -> RowsConfig:
    """The config for x (M, D) of at most `ROWS_TOKENS` tokens."""
    num_warps = 4 if x.shape[0] * x.shape[1] <= 2048 else 8
    # A thread holds values of a norm's scale beside those of x and the weight: with eight of them as many
    # programs fit a core at a time as without a norm, with sixteen fewer.
    longest = 8 * 32 * num_warps if isinstance(x, Normed) else 2048
    return RowsConfig(8, min(longest, max(16, powers_of_2.at_least(x.shape[1]))), num_warps)


def choose_project(x: jax.Array | Normed, outputs: int) -> ProjectConfig:
    """The config for x (M, D) and a weight (outputs, D)."""
    rows = _rows(x.shape[0])
    if x.dtype.itemsize == 4:
        return ProjectConfig(rows, 16, 32, 4, 2)
    # Narrow outputs in narrow tiles: a program for every core at the least.
    tile = 16 if outputs < 8192 and rows == _LEAST_ROWS else 32
    return ProjectConfig(rows, tile, 256 if rows == _LEAST_ROWS else 128, 4, 4)


def _rows(tokens: int) -> int:
    return min(MOST_TOKENS, max(_LEAST_ROWS, powers_of_2.at_least(tokens)))
