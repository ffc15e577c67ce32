"""Tile sizes of the HybridELL kernels: their laws, and what to choose where nothing was tuned.

The kernels gather: what bounds a tile is how many weight rows a program can have in flight in its registers.
The gate stage is TwELL's, with TwELL's configs.
"""

import dataclasses
from functools import partial

import jax

from pallas_kernels import device as device_lib
from pallas_kernels import tuning
from pallas_kernels.common import powers_of_2
from pallas_kernels.common.row_config import RowsConfig
from pallas_kernels.dense import backup_rows
from pallas_kernels.device import Device
from pallas_kernels.options import Hybrid, Twell
from pallas_kernels.twell import config as twell
from pallas_kernels.twell.config import GatePackConfig, WordPackConfig

_WARP = 32
_SECTOR_WORDS = 8
_LARGEST_TILE = 256
"""The gate counts a tile's non-zeros in bytes."""
_L2_FOR_SLICES = 32 << 20
"""Bytes of x and dy that the weight gradients may walk at a time and find again in L2 (50 MiB on Hopper)."""


@dataclasses.dataclass(frozen=True)
class NeuronSumConfig:
    """How the weight gradients are summed.

    Attributes:
      slice_d: columns of D of a program, which is one neuron.
      entries: tokens of a neuron that are in flight together.
      num_warps: warps of a program.
      hot: K, the most active neurons, whose gradients are a dense product on tensor cores; 0 for none. The
        longest list that remains holds at most W / (K + 1) of all tokens.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    slice_d: int = 512
    entries: int = 4
    num_warps: int = 2
    hot: int = 0

    def __post_init__(self) -> None:
        powers_of_2.check(self, slice_d=(16, 4096), entries=(1, 32), num_warps=(1, 32))
        if self.hot < 0:
            raise ValueError(f"NeuronSumConfig.hot must be at least 0; got {self.hot}")


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Configs of all stages of a call.

    Attributes:
      tile, slots: T and S of the packed gates, which live between two kernels.
      backup_rows: B, overflowing rows of a round of the dense backup.
      gate_pack, word_pack: of the gate stage's kernels, of which one runs.
      up_down, dx: of the kernels that walk a token's non-zeros, forward and backward.
      weights: of the kernel that walks a neuron's tokens.
    """

    tile: int
    slots: int
    backup_rows: int
    gate_pack: GatePackConfig
    word_pack: WordPackConfig
    up_down: RowsConfig
    dx: RowsConfig
    weights: NeuronSumConfig


def choose(x: jax.Array, w: jax.Array, layout: Hybrid, device: Device | None = None) -> HybridConfig:
    """Configs for x (M, D) and weights like w (F, D): what was tuned on the device, else a heuristic.

    Raises:
      ValueError: no tile of ``Hybrid.tile`` columns fits the device.
    """
    device = device_lib.current() if device is None else device
    tile = min(layout.tile, _LARGEST_TILE)
    gate = twell.choose(x, w, Twell(tile=tile, compression=1), device)
    rows = partial(RowsConfig.for_columns, x.shape[1], x.dtype.itemsize)
    config = HybridConfig(
        tile=tile,
        slots=slots(tile, layout.width),
        backup_rows=min(layout.backup_rows or backup_rows.bound(x.shape[0]), x.shape[0]),
        gate_pack=gate.gate_pack,
        word_pack=gate.word_pack,
        up_down=rows(columns_of_thread=32),
        # The backward gathers from three weights where the forward gathers from two.
        dx=rows(columns_of_thread=16),
        weights=_weights(x, w),
    )
    entry = tuning.lookup(device.table_name, "hybrid", bucket(x, w, layout))
    return _with_entry(config, entry) if entry else config


def slots(tile: int, width: int) -> int:
    """S, words of a packed tile: one count and all non-zeros of a row that fits W, in whole sectors.

    So a tile overflows only in a row that has more than W non-zeros, which goes to the backup anyway.
    """
    return -(-(min(tile, width) + 1) // _SECTOR_WORDS) * _SECTOR_WORDS


def bucket(x: jax.Array, w: jax.Array, layout: Hybrid) -> str:
    """The call's bucket in the tuning table ``hybrid``."""
    return tuning.bucket(
        tokens=x.shape[0],
        d_model=x.shape[1],
        d_ff=w.shape[0],
        itemsize=x.dtype.itemsize,
        width=layout.width,
    )


def _with_entry(config: HybridConfig, entry: dict) -> HybridConfig:
    """A config with a tuned entry's fields, which are those of some stages: {stage: {field: value}}."""
    stages = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in entry.items()}
    return dataclasses.replace(config, **stages)


def _weights(x: jax.Array, w: jax.Array) -> NeuronSumConfig:
    """Slices of x and dy that stay in L2 while all neurons walk them; the hottest neurons on tensor cores."""
    (tokens, d_model), itemsize = x.shape, x.dtype.itemsize
    room = _L2_FOR_SLICES // (2 * tokens * itemsize)
    slice_d = min(max(powers_of_2.at_least(room + 1) // 2, 128), 512, max(powers_of_2.at_least(d_model), 16))
    num_warps = max(slice_d * itemsize // (16 * _WARP), 1)  # 16 bytes a thread
    # Dense columns pay where there are many tokens, and where they are few of all neurons.
    hot = 256 if tokens >= 4096 and w.shape[0] >= 2048 else 0
    return NeuronSumConfig(slice_d=slice_d, entries=4, num_warps=num_warps, hot=hot)
