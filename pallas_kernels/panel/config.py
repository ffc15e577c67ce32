"""Tile sizes of the PanelELL kernels: their laws, what to choose where nothing was tuned, and what to try.

Every stage is a GEMM whose tile has P tokens, or P tokens in a slice of its sum, on one side. Shared memory
holds ``num_stages`` slices of both operands, registers the f32 accumulators.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax

from pallas_kernels import device as device_lib
from pallas_kernels import tuning
from pallas_kernels.common import powers_of_2
from pallas_kernels.device import Device

SEGMENT = 16
"""Tokens of a segment, where a gate stage has segments: in 16 bits, their gates are one memory sector."""
_WARP = 32
_SHARED_MEMORY_ROOM = 8 * 1024
_WIDEST_SLICE = 128

GATHERED_TILE = 192
"""Neurons of a tile, at most, of the gathered products on Mosaic GPU."""
GATHERED_SLICE = 32
"""Slots of a slice of the down projection on Mosaic GPU."""
StageBackend = Literal["triton", "mosaic_gpu"]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """How one stage cuts its GEMM.

    Attributes:
      tile: neurons of a tile for the gate, list entries for the up projection and its gradient, columns of D
        for the down projection and the gradient of x.
      tile_k: slice of the sum in one pipeline stage.
      num_warps: warps of a program.
      num_stages: slices in flight.
      per_core: programs of a core that share the work list between them; 0 for one program an entry.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    tile: int
    tile_k: int
    num_warps: int
    num_stages: int
    per_core: int = 0

    def __post_init__(self) -> None:
        powers_of_2.check(self, tile=(16, 256), tile_k=(16, _WIDEST_SLICE), num_warps=(1, 16))
        if self.num_stages < 1 or self.per_core < 0:
            raise ValueError(
                "StageConfig.num_stages must be at least 1 and per_core at least 0; "
                f"got {self.num_stages} and {self.per_core}"
            )

    def shared_memory(self, panel: int, itemsize: int) -> int:
        """Bytes of the pipeline's slices."""
        return (self.tile + panel) * self.tile_k * itemsize * self.num_stages

    def misfit(self, panel: int, itemsize: int, device: Device) -> str | None:
        """Why it cannot run panels of ``panel`` tokens on a device; None if it can."""
        needed = self.shared_memory(panel, itemsize)
        room = device.shared_memory - _SHARED_MEMORY_ROOM
        if needed > room:
            return (
                f"(tile + panel) * tile_k * {itemsize} bytes * num_stages must fit {room} bytes "
                f"of shared memory on {device.kind}; got {needed} with panel={panel} and {self}"
            )
        return None


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """How `pack_panel` cuts the gates: a program packs ``tile`` neurons of one panel.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    tile: int
    num_warps: int

    def __post_init__(self) -> None:
        powers_of_2.check(self, tile=(16, 256), num_warps=(1, 16))


@dataclasses.dataclass(frozen=True)
class HotConfig:
    """How the weight gradients of hot neurons are cut: ``tile`` neurons by ``tile_d`` columns, ``tile_k``
    tokens a slice. A core has registers and shared memory for ``per_core`` programs; 0 where that is unknown.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    tile: int
    tile_d: int
    tile_k: int
    num_warps: int
    num_stages: int
    per_core: int = 0

    def __post_init__(self) -> None:
        powers_of_2.check(self, tile=(16, 256), tile_d=(16, 256), tile_k=(16, 128), num_warps=(1, 16))
        if self.num_stages < 1 or self.per_core < 0:
            raise ValueError(
                "HotConfig.num_stages must be at least 1 and per_core at least 0; "
                f"got {self.num_stages} and {self.per_core}"
            )


@dataclasses.dataclass(frozen=True)
class RareConfig:
    """How the weight gradients of rare neurons are summed.

    Attributes:
      share: a neuron is rare that is active for at most one in ``share`` tokens of the batch. As a row of a
        dense product M tokens cost 6 D FLOPs each, one by one 4 D bytes from L2: the same time at one in some
        60 on Hopper, where the product is Triton's.
      mosaic_gpu_share: the same where the product is Mosaic GPU's, whose tensor cores wait less. On one
        NVIDIA H200, 65,536 tokens, D 2048 and F 5632 in bf16, panels of 596 active neurons: all weight
        gradients take 1.20 ms at 64, 1.12 at 96 and 1.18 at 128; of 1,613 active neurons 2.53, 2.36 and 2.58.
      slice_d: columns of D of a program, which is one neuron.
      entries: tokens of a neuron that are in flight together.
      num_warps: warps of a program.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    share: int = 64
    mosaic_gpu_share: int = 96
    slice_d: int = 1024
    entries: int = 4
    num_warps: int = 4

    def __post_init__(self) -> None:
        for name in ("share", "mosaic_gpu_share"):
            if getattr(self, name) < 1:
                raise ValueError(f"RareConfig.{name} must be at least 1; got {getattr(self, name)}")
        powers_of_2.check(self, slice_d=(16, 4096), entries=(1, 32), num_warps=(1, 32))


@dataclasses.dataclass(frozen=True)
class PanelConfig:
    """Configs of all stages of a call; ``panel`` is P.

    The slots of a panel are a multiple of the ``chunk``. ``up_keep`` is ``up`` where the gate and the up
    projection are kept for a backward. A *tile* is what a program works on at a time: that of ``up``,
    ``up_keep`` and ``dh`` is one chunk, or two where a panel has two left. The tile_k of ``down`` and ``dx``
    divides the chunk.

    ``gathered_backend`` runs what ``up``, ``up_keep``, ``down``, ``dh`` and ``dx`` cut for Triton, where it
    can (`gathered`), and ``dw_backend`` what ``dw`` cuts, the weight gradients of hot neurons (`weights`).

    Raises:
      ValueError: a tile or a slice that the chunk does not allow, a slice that does not divide a panel, or a
        backend that a stage does not have.
    """

    panel: int
    chunk: int
    gate: StageConfig
    pack: PackConfig
    up: StageConfig
    up_keep: StageConfig
    down: StageConfig
    dh: StageConfig
    dx: StageConfig
    dw: HotConfig
    rare: RareConfig = RareConfig()
    gathered_backend: StageBackend = "triton"
    dw_backend: StageBackend = "triton"

    def __post_init__(self) -> None:
        powers_of_2.check(self, chunk=(16, 256))
        for name in ("gathered_backend", "dw_backend"):
            if getattr(self, name) not in get_args(StageBackend):
                raise ValueError(
                    f"PanelConfig.{name} must be 'triton' or 'mosaic_gpu'; got {getattr(self, name)!r}"
                )
        for name in ("up", "up_keep", "dh"):
            if getattr(self, name).tile not in (self.chunk, 2 * self.chunk):
                raise ValueError(
                    f"PanelConfig.{name}.tile must be chunk={self.chunk} or twice that; "
                    f"got {getattr(self, name).tile}"
                )
        for name in ("down", "dx"):
            if self.chunk % getattr(self, name).tile_k:
                raise ValueError(
                    f"PanelConfig.{name}.tile_k must divide chunk={self.chunk}; "
                    f"got {getattr(self, name).tile_k}"
                )
        if self.panel % self.dw.tile_k:
            raise ValueError(f"PanelConfig.dw.tile_k must divide panel={self.panel}; got {self.dw.tile_k}")

    @property
    def pad(self) -> int:
        """Slots that a stage behind `up`, `up_keep` or `dh` reads at once: a multiple of so many of a panel
        are to be written."""
        return max(self.down.tile_k, self.dx.tile_k)


FEW_PANELS = 64
"""Panels of a forward call up to which `FewConfig` cuts it."""

LEAST_PROBED_TOKENS = 2048
"""Tokens of a call from which on a probe of one panel in sixteen costs little beside it."""

LEAST_UNASKED_TOKENS = 1024
"""Tokens of a forward call on Hopper from which on ``"auto"`` may be PanelELL unasked."""


def are_few(tokens: int, panel: int) -> bool:
    """Whether tokens make few panels of ``panel`` each."""
    return 0 < tokens <= FEW_PANELS * panel


@dataclasses.dataclass(frozen=True)
class FewConfig:
    """How a forward call of few panels is cut behind its gate stage.

    Attributes:
      up: its tile is what a panel's slots are a multiple of.
      down: its tile_k divides the tile of ``up``.
      list_warps: warps of a program that lists a panel's neurons.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    up: StageConfig
    down: StageConfig
    list_warps: int = 8

    def __post_init__(self) -> None:
        powers_of_2.check(self, list_warps=(1, 32))
        if self.up.tile % self.down.tile_k:
            raise ValueError(
                f"FewConfig.down.tile_k must divide up.tile={self.up.tile}; got {self.down.tile_k}"
            )


class BreakEven(NamedTuple):
    """Share of the neurons that a panel activates, up to which PanelELL is taken to be faster than dense.

    Attributes:
      forward: of a forward call.
      train: of forward and backward.
    """

    forward: float
    train: float


_BREAK_EVEN: dict[tuple[int, str, bool], BreakEven] = {
    # (compute capability times ten, the gate's backend, gated)
    (90, "mosaic_gpu", True): BreakEven(0.95, 0.8),
    (90, "mosaic_gpu", False): BreakEven(0.6, 0.4),
    (90, "triton", True): BreakEven(0.8, 0.5),
    (90, "triton", False): BreakEven(0.5, 0.35),
}
"""From measurements of panels of 128 tokens, D 2048 and F 5632, gated. With every product on Mosaic GPU, on
one NVIDIA H200: forward at shares of 0.29, 0.44 and 0.98 takes 0.52, 0.64 and 0.99 of the dense layer's time;
forward and backward at 0.29, 0.44 and 0.79 takes 0.45, 0.60 and 0.97, and breaks even at about 0.82.
The other rows are of the products on Triton. On one NVIDIA H100, with the gate on Mosaic GPU, forward at
shares of 0.45 and 0.83 took 0.65 and 0.93 of the dense layer's time, forward and backward at 0.26 and 0.43
took 0.53 and 0.74. They are those figures with two products in place of three, and with a gate stage that
takes 0.35 ms more (4 to 6 % of the dense forward), and a margin."""

_UNMEASURED = BreakEven(0.25, 0.15)
"""Where nothing was measured: PanelELL saves at least twice what its gate stage may cost there."""


def break_even(device: Device, backend: str, *, gated: bool) -> BreakEven:
    """The shares for a device, the backend of the gate stage, and a layer with or without a gate."""
    if backend == "interpret":
        return _BREAK_EVEN[90, "mosaic_gpu", gated]
    return _BREAK_EVEN.get((device.capability, backend, gated), _UNMEASURED)


def choose(x: jax.Array, w: jax.Array, tokens: int, device: Device | None = None) -> PanelConfig:
    """Configs for panels of ``tokens`` tokens of x (M, D) and weights like w (F, D): what was tuned on the
    device for such sizes, else a heuristic."""
    device = device_lib.current() if device is None else device
    config = heuristic(x, tokens, device)
    entry = tuning.lookup(device.table_name, "panel", bucket(x, w, config.panel))
    return config if entry is None else _with_entry(config, entry)


def heuristic(x: jax.Array, tokens: int, device: Device) -> PanelConfig:
    """Configs for x (M, D) where nothing was tuned."""
    panel = min(tokens, max(16, powers_of_2.at_least(x.shape[0])))
    return _for_tensor_cores(panel, x.shape[1], device) if x.dtype.itemsize == 2 else _for_f32(panel)


def choose_few(x: jax.Array, config: PanelConfig, device: Device | None = None) -> FewConfig:
    """How x (M, D) of at most `FEW_PANELS` panels is cut behind its gate stage, whose configs are ``config``.

    Tiles shrink with the number of panels, so that all cores have one: at 600 active neurons a panel, four
    panels have 76 tiles of 32 neurons. What a core reads from L2 then takes the time, x as much as weights.
    """
    device = device_lib.current() if device is None else device
    n_panels = -(-x.shape[0] // config.panel)
    if x.dtype.itemsize != 2 or config.panel < 128 or device.shared_memory < 220 * 1024:
        return FewConfig(dataclasses.replace(config.up, tile=config.chunk), config.down)
    width = powers_of_2.at_least(n_panels)
    if x.shape[1] % 128:
        up = StageConfig(max(32, min(8 * width, 128)), 64, 8 if width > 8 else 4, 4, 2)
    elif width <= 4:
        up = StageConfig(32, 128, 4, 4, 2)
    else:
        up = StageConfig(min(8 * width, 128), 64, 4 if width == 8 else 8, 6, 2)
    columns = max(32, min(16 * width, 256))
    down = StageConfig(columns, 32, 8 if columns == 256 else 4, 8)
    return FewConfig(up, down)


def bucket(x: jax.Array, w: jax.Array, panel: int) -> str:
    """The call's bucket in the tuning table ``panel``.

    What slices do not divide of D takes the shared memory of one slice more, so only a D that the same slices
    divide may share an entry.
    """
    tokens, d_model = x.shape
    return tuning.bucket(
        tokens=tokens,
        d_model=d_model,
        d_ff=w.shape[0],
        itemsize=x.dtype.itemsize,
        panel=panel,
        slice=min(d_model & -d_model, _WIDEST_SLICE),
    )


def _with_entry(config: PanelConfig, entry: dict) -> PanelConfig:
    changes = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in entry.items()
    }
    return dataclasses.replace(config, **changes)


def _for_tensor_cores(panel: int, d_model: int, device: Device) -> PanelConfig:
    """As tuned on Hopper where shared memory allows, narrower slices elsewhere."""
    if device.shared_memory >= 160 * 1024:
        warps = 8 if panel == 128 else 4
        per_core = 1 if warps == 8 else 2
        deep = panel == 128 and device.shared_memory >= 220 * 1024
        # A rest of D takes the shared memory of one slice more.
        wide = StageConfig(256, 32, 8, 6, 16) if d_model % 64 else StageConfig(256, 64, 8, 4, 16)
        kept = wide if deep else StageConfig(128, 64, warps, 4, per_core)
        over_columns = StageConfig(256, 32, 8, 8) if deep else StageConfig(128, 32, 4, 6)
        return PanelConfig(
            panel,
            chunk=128,
            gate=StageConfig(256 if panel == 128 else 128, 64, warps, 3),
            pack=_pack(panel, itemsize=2),
            up=wide if deep else StageConfig(128, 64, 4, 3, 32),
            up_keep=kept,
            down=over_columns,
            dh=kept,
            dx=over_columns,
            dw=HotConfig(128, 256, 32, 8, 8, 1) if deep else HotConfig(128, 128, min(64, panel), 8, 3, 2),
            gathered_backend="mosaic_gpu" if device.capability in (90, 100) else "triton",
            dw_backend="mosaic_gpu" if device.capability == 90 else "triton",
        )
    narrow = StageConfig(128, 32, 4, 3)
    return PanelConfig(
        panel,
        chunk=128,
        gate=narrow,
        pack=_pack(panel, itemsize=2),
        up=narrow,
        up_keep=narrow,
        down=narrow,
        dh=narrow,
        dx=narrow,
        dw=HotConfig(64, 128, 16, 4, 3),
    )


def _pack(panel: int, itemsize: int) -> PackConfig:
    """Tiles of 256 bytes a row, wider where a panel has too few segments for a warp, and as many threads as a
    tile has neurons and segments: each holds 16 bytes of each of a segment's 16 rows.

    On one NVIDIA H200, at M 65,536 and F 5632 in bf16: 0.25 ms; with half the neurons 0.35, with twice as
    many 0.43, with twice the warps 0.39.
    """
    segments = panel // SEGMENT
    tile = max(256, 16 * _WARP // segments) // itemsize
    return PackConfig(tile, num_warps=tile * itemsize // 16 * segments // _WARP)


def _for_f32(panel: int) -> PanelConfig:
    """f32 multiplies without tensor cores: a thread also keeps its operands in registers."""
    small = StageConfig(32, 16, 4, 2)
    return PanelConfig(
        panel,
        chunk=32,
        gate=small,
        pack=_pack(panel, itemsize=4),
        up=small,
        up_keep=small,
        down=small,
        dh=small,
        dx=small,
        dw=HotConfig(32, 32, 16, 4, 2),
    )
