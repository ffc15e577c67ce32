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
_MOST_OWNED = 64
_LEAST_OWNED = 16
_MOST_SPLITS = 16
_CORES = 132
_SHARED_MEMORY_ROOM = 8 * 1024
_ATTENTION_ROOM = 24 * 1024  # for queries, weights and the compiler's own


def auto_tokens(device: Device) -> int:
    """Tokens up to which ``format="auto"`` takes these kernels.

    For one or two the layer reads a third of a dense layer's bytes, whatever the device. More were measured
    on Hopper alone, where the layer is faster than a dense one at every number of tokens.
    """
    return MOST_TOKENS if device.capability == _HOPPER else ROWS_TOKENS


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """How rows of a weight are shared out and streamed past a block of tokens: those of the gate and the up
    projection, or of a projection beside the layer.

    Attributes:
      rows: tokens of a block, padded to what a tensor core takes.
      tile: rows of the weight of a program at the most.
      programs: how many programs share the weight's rows.
      tile_k: columns of D in one slice of a product over D.
      chains: sums of a product that do not wait for each other, each with its part of a slice: with the few
        rows of a program the tensor cores' latency is what a sum takes.
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
            self, rows=(_LEAST_ROWS, MOST_TOKENS), tile=(_LEAST_OWNED, 128), tile_k=(16, 512),
            chains=(1, 8), num_warps=(1, 16),
        )  # fmt: skip
        _at_least_one(self, "programs", "num_stages")

    def owned(self, n_rows: int) -> int:
        """Rows of a weight of ``n_rows`` that a program has.

        Raises:
          ValueError: more than its tile.
        """
        owned = -(-n_rows // self.programs)
        if owned > self.tile:
            raise ValueError(
                f"TilesConfig.tile * programs must be at least the weight's {n_rows} rows, a program for "
                f"each; got {self.tile} * {self.programs}"
            )
        return owned


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

    hidden: TilesConfig
    down: DownConfig


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How the attention of one token a row is cut.

    Attributes:
      block: positions of the cache that a program reads at a time.
      splits: programs that share the positions of a row's key/value head.
      num_warps: warps of a program.
      num_stages: blocks in flight, and the one that is computed with.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    block: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        powers_of_2.check(self, block=(_LEAST_ROWS, 128), splits=(1, _MOST_SPLITS), num_warps=(1, 16))
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


def _at_least_one(config: TilesConfig | DownConfig | AttentionConfig, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be at least 1; got {value}")


def choose(x: jax.Array, d_ff: int, device: Device | None = None) -> DecodeConfig:
    """The config for x (M, D) and F neurons."""
    device = device_lib.current() if device is None else device
    d_model, itemsize, cores = x.shape[1], x.dtype.itemsize, device.cores or _CORES
    hidden = _choose_tiles(x, d_ff, 64, device)
    # One program of y for each core, or less.
    tile_d, tile_n = 64, 128 if itemsize == 2 else 32
    splits = max(1, min(cores // -(-d_model // tile_d), -(-d_ff // tile_n), _MOST_SPLITS))
    stages = 2 if itemsize == 4 else min(8, _stages((tile_d + hidden.rows) * tile_n * itemsize, device))
    return DecodeConfig(hidden, DownConfig(tile_n, tile_d, splits, 4, stages))


def choose_project(x: jax.Array, outputs: int, device: Device | None = None) -> TilesConfig:
    """The config for x (M, D) and a weight (outputs, D)."""
    return _choose_tiles(x, outputs, 128, device_lib.current() if device is None else device)


def _choose_tiles(x: jax.Array, n_rows: int, chain: int, device: Device) -> TilesConfig:
    """How ``n_rows`` rows of a weight are shared out for x (M, D). A sum that waits for no other takes
    ``chain`` columns of a slice: fewer in the layer, whose up projection has fewer rows a program."""
    rows, itemsize, cores = max(_LEAST_ROWS, _block_of(x.shape[0])), x.dtype.itemsize, device.cores or _CORES

    # As many waves as the largest tile needs, and rows in equal numbers.
    most = _MOST_OWNED if itemsize == 2 else _LEAST_OWNED
    waves = max(1, -(-n_rows // (most * cores)))
    owned = min(most, max(_LEAST_OWNED, -(-n_rows // (cores * waves))))
    tile, programs = powers_of_2.at_least(owned), -(-n_rows // owned)
    if itemsize == 4:  # operands of a product without tensor cores stand in registers
        return TilesConfig(rows, tile, programs, 32, 1, 4, 2)

    def stages(tile_k: int) -> int:
        return _stages((tile + rows) * tile_k * itemsize, device)

    # Wide slices: each costs a barrier, and with few tokens there is little to do between two of them.
    tile_k = 256 if rows <= 32 else 128
    while tile_k > 64 and stages(tile_k) < 3:
        tile_k //= 2
    chains = max(1, tile_k // chain)
    return TilesConfig(rows, tile, programs, tile_k, chains, 4, min(1024 // tile_k, stages(tile_k)))


def _stages(slice_bytes: int, device: Device) -> int:
    return max(2, (device.shared_memory - _SHARED_MEMORY_ROOM) // slice_bytes)


def choose_rows(x: jax.Array | Normed) -> RowsConfig:
    """The config for x (M, D) of at most `ROWS_TOKENS` tokens."""
    num_warps = 4 if x.shape[0] * x.shape[1] <= 2048 else 8
    # A thread holds values of a norm's scale beside those of x and the weight: with eight of them as many
    # programs fit a core at a time as without a norm, with sixteen fewer.
    longest = 8 * 32 * num_warps if isinstance(x, Normed) else 2048
    return RowsConfig(8, min(longest, max(16, powers_of_2.at_least(x.shape[1]))), num_warps)


def choose_attention(cache: jax.Array, device: Device | None = None) -> AttentionConfig:
    """The config for keys or values (B, C, K, H) of B rows.

    A row's sums are cut at places that depend on B's block alone, neither on the other rows nor on the
    capacity C, which grows with the longest row.
    """
    device = device_lib.current() if device is None else device
    batch, _, kv_heads, head_dim = cache.shape
    itemsize = cache.dtype.itemsize
    block = 64 if head_dim <= 64 and itemsize == 2 else 32
    config = AttentionConfig(block, 1)
    # Keys and values of all stages but the one that is computed with.
    in_flight = 2 * (config.num_stages - 1) * head_dim * itemsize
    while block > _LEAST_ROWS and block * in_flight > device.shared_memory - _ATTENTION_ROOM:
        block //= 2
    # As many programs as there are cores, as far as rows and heads are fewer.
    most = (device.cores or _CORES) // (kv_heads * _block_of(batch))
    splits = powers_of_2.at_least(min(_MOST_SPLITS, max(1, most)) + 1) // 2
    return dataclasses.replace(config, block=block, splits=splits)


def _block_of(tokens: int) -> int:
    """Tokens of a block, padded: a row's result is the same among all numbers of tokens of the same block."""
    if tokens <= ROWS_TOKENS:
        return tokens
    return min(MOST_TOKENS, max(_LEAST_ROWS, powers_of_2.at_least(tokens)))
