"""Tile sizes of the TwELL kernels: their laws, what to choose where nothing was tuned, and what to try.

Shared memory and registers bound a tile. The gate GEMM keeps ``num_stages`` slices of both operands in shared
memory and its whole f32 accumulator in registers; up/down keeps a token's x and y and ``entries`` weight rows
in registers.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import TypeVar

import jax

from pallas_kernels import device as device_lib
from pallas_kernels import tuning
from pallas_kernels.common import powers_of_2
from pallas_kernels.common.row_config import RowsConfig
from pallas_kernels.device import Device
from pallas_kernels.options import Twell

_WARP = 32
_ROWS_OF_WARP = 8
_REGISTERS = 65536
_REGISTERS_OF_THREAD = 255
_REGISTERS_BESIDE_TILE = 55
_SHARED_MEMORY_ROOM = 8 * 1024
_UNKNOWN_CORES = 108


@dataclasses.dataclass(frozen=True)
class GatePackConfig:
    """How `gate_pack` cuts its GEMM; the columns of a tile are ``Twell.tile``.

    Attributes:
      tile_m: tokens of a program.
      tile_k: slice of D of one pipeline stage.
      num_warps: warps of a program.
      num_stages: slices that are in flight.
      group_m: row blocks that walk the columns together, to share operands in L2.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    tile_m: int = 128
    tile_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8

    def __post_init__(self) -> None:
        why = {"tile_m": "hit counts of a tile are bytes"}
        powers_of_2.check(self, why=why, tile_m=(16, 128), tile_k=(16, 256), num_warps=(1, 16))
        for name in ("num_stages", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"GatePackConfig.{name} must be at least 1; got {getattr(self, name)}")

    def shared_memory(self, tile: int, itemsize: int) -> int:
        """Bytes of the pipeline's slices."""
        return (self.tile_m + tile) * self.tile_k * itemsize * self.num_stages

    def accumulators(self, tile: int) -> int:
        """f32 accumulators of a thread."""
        return self.tile_m * tile // (self.num_warps * _WARP)

    def misfit(self, tile: int, itemsize: int, device: Device) -> str | None:
        """Why tiles of ``tile`` columns of ``itemsize``-byte values cannot run on a device;
        None if they can."""
        needed, room = self.shared_memory(tile, itemsize), device.shared_memory - _SHARED_MEMORY_ROOM
        if needed > room:
            return (
                f"(tile_m + tile) * tile_k * {itemsize} bytes * num_stages must fit {room} bytes of shared "
                f"memory on {device.kind}; got {needed} with tile={tile} and {self}"
            )
        registers = min(_REGISTERS // (self.num_warps * _WARP), _REGISTERS_OF_THREAD) - _REGISTERS_BESIDE_TILE
        if self.accumulators(tile) > registers:
            return (
                f"tile_m * tile / (32 * num_warps) accumulators must fit {registers} registers of a thread; "
                f"got {self.accumulators(tile)} with tile={tile} and {self}"
            )
        return None


@dataclasses.dataclass(frozen=True)
class WordPackConfig:
    """How `pack_words` cuts the gates: a program of ``num_warps`` warps packs 8 rows a warp of one tile.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    num_warps: int = 4

    def __post_init__(self) -> None:
        powers_of_2.check(self, num_warps=(1, 16))

    @property
    def tile_m(self) -> int:
        """Rows of a program."""
        return _ROWS_OF_WARP * self.num_warps


@dataclasses.dataclass(frozen=True)
class TwELLConfig:
    """Configs of the kernels of a call: of the gate stage's, of which one runs, and of what comes after."""

    gate_pack: GatePackConfig
    up_down: RowsConfig
    word_pack: WordPackConfig = WordPackConfig()


Config = TypeVar("Config", GatePackConfig, RowsConfig)


def choose(x: jax.Array, w: jax.Array, layout: Twell, device: Device | None = None) -> TwELLConfig:
    """Configs for x (M, D) and weights like w (F, D): what was tuned on the device for such sizes,
    else a heuristic.

    Raises:
      ValueError: no tile of ``Twell.tile`` columns fits the device.
    """
    device = device_lib.current() if device is None else device
    ops = buckets(x, w, layout).items()
    gate_pack, up_down = (tuning.lookup(device.table_name, op, key) for op, key in ops)
    return TwELLConfig(
        GatePackConfig(**gate_pack) if gate_pack else _gate_pack_heuristic(x, w, layout.tile, device),
        RowsConfig(**up_down) if up_down else _up_down_heuristic(x),
    )


def buckets(x: jax.Array, w: jax.Array, layout: Twell) -> dict[str, str]:
    """Each op's name in the tuning tables and its bucket there, gate_pack first."""
    sizes = {"tokens": x.shape[0], "d_model": x.shape[1], "d_ff": w.shape[0], "itemsize": x.dtype.itemsize}
    return {
        "twell_gate_pack": tuning.bucket(**sizes, tile=layout.tile),
        "twell_up_down": tuning.bucket(**sizes),
    }


def _gate_pack_heuristic(x: jax.Array, w: jax.Array, tile: int, device: Device) -> GatePackConfig:
    """The largest tile that the device holds, made shorter where the call has too few tiles for its cores."""
    tokens, d_model = x.shape
    itemsize = x.dtype.itemsize
    wide = itemsize == 4  # multiplied without tensor cores: a thread also keeps its operands in registers
    cores = device.cores or _UNKNOWN_CORES
    tile_m = min(32 if wide else 128, max(16, powers_of_2.at_least(tokens)))
    while tile_m > 16 and -(-tokens // tile_m) * -(-w.shape[0] // tile) < cores:
        tile_m //= 2
    tile_k = min(16 if wide else 64, max(16, powers_of_2.at_least(d_model)))
    depths = ((k, stages) for k in (64, 32, 16) if k <= tile_k for stages in (3, 2))
    heights = [height for height in (128, 64, 32, 16) if height <= tile_m]
    candidates = (
        GatePackConfig(height, k, 8 if wide else max(4, height // 16), stages, 8 if tile >= 256 else 16)
        for height, (k, stages) in itertools.product(heights, depths)
    )
    reason: str | None = None
    for config in candidates:
        reason = config.misfit(tile, itemsize, device)
        if reason is None:
            return config
    raise ValueError(f"Twell.tile={tile} is too wide for {device.kind}, choose a smaller one: {reason}")


def _up_down_heuristic(x: jax.Array) -> RowsConfig:
    return RowsConfig.for_columns(x.shape[1], x.dtype.itemsize, columns_of_thread=32)


def search_space(
    x: jax.Array, w: jax.Array, layout: Twell, device: Device
) -> tuple[list[GatePackConfig], list[RowsConfig]]:
    """What the tuner tries for x (M, D) and weights like w (F, D): configs that the device can hold."""
    itemsize, tile = x.dtype.itemsize, layout.tile
    gate_packs = _product(
        GatePackConfig,
        tile_m=(16, 32, 64, 128),
        tile_k=(16, 32) if itemsize == 4 else (32, 64),
        num_warps=(4, 8),
        num_stages=(2, 3, 4),
        group_m=(8, 16),
    )
    up_downs = _product(RowsConfig, entries=(1, 2, 4, 8, 16), num_warps=(1, 2, 4, 8, 16, 32))
    usual = _up_down_heuristic(x)
    highest = max(16, powers_of_2.at_least(x.shape[0]))
    return (
        [
            config
            for config in gate_packs
            if config.misfit(tile, itemsize, device) is None
            and config.tile_m <= highest
            and (config.accumulators(tile) >= 32 or config.tile_m == highest)
        ],
        [
            config
            for config in up_downs
            if 16 <= config.registers(x.shape[1], itemsize) <= 200 or config == usual
        ],
    )


def _product(kind: type[Config], **choices: Iterable[int]) -> list[Config]:
    return [
        kind(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())
    ]
