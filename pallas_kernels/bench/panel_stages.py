"""PanelELL's stages as the tuner runs them: how each is called, and the configs to try for it.

Every stage takes what it is given within a call, by name, and a config of the whole call. Stages are
independent but for one number, the lists' chunk: all that `TIED` names has tiles of one or
two such chunks.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_kernels.common.gate_stage import Implementation
from pallas_kernels.device import Device
from pallas_kernels.panel.config import PanelConfig, StageConfig
from pallas_kernels.panel.pallas_triton import Hidden, panel_down, panel_up
from pallas_kernels.panel.pallas_triton_backward import Gradients, panel_dh
from pallas_kernels.panel.pallas_triton_counts import GatePanel
from pallas_kernels.panel.pallas_triton_gate import gate_panel, pack_panel
from pallas_kernels.panel.weights import panel_dw

Given = dict[str, Any]
Config = Any  # a stage's: StageConfig or another dataclass of whole numbers
Stage = Callable[[Given, PanelConfig, bool], Any]


def _gate(given: Given, config: PanelConfig, interpret: bool) -> GatePanel:
    x, weight = given["x"], given["gate_weight"]
    return gate_panel(x, weight, panel=config.panel, config=config.gate, interpret=interpret)


def _pack(given: Given, config: PanelConfig, interpret: bool) -> GatePanel:
    gate, d_ff = given["product"], given["gate_weight"].shape[0]
    return pack_panel(gate, d_ff=d_ff, panel=config.panel, config=config.pack, interpret=interpret)


def _up(given: Given, config: PanelConfig, interpret: bool) -> Hidden:
    gate, lists, x, weight = (given[name] for name in ("gate", "lists", "x", "up_weight"))
    return panel_up(gate, lists, x, weight, config=config.up, interpret=interpret)


def _up_keep(given: Given, config: PanelConfig, interpret: bool) -> Hidden:
    gate, lists, x, weight = (given[name] for name in ("gate", "kept_lists", "x", "up_weight"))
    return panel_up(gate, lists, x, weight, config=config.up_keep, keep=True, interpret=interpret)


def _down(given: Given, config: PanelConfig, interpret: bool) -> jax.Array:
    terms, tokens = [(given["up_keep"].h, given["w_down"])], given["x"].shape[0]
    return panel_down(terms, given["kept_lists"], tokens=tokens, config=config.down, interpret=interpret)


def _dh(given: Given, config: PanelConfig, interpret: bool) -> Gradients:
    lists, dy, w_down, dl1 = (given[name] for name in ("kept_lists", "dy", "w_down", "scale"))
    return panel_dh(*_kept(given), lists, dy, w_down, dl1, config=config.dh, interpret=interpret)


def _dx(given: Given, config: PanelConfig, interpret: bool) -> jax.Array:
    gradients, tokens = given["dh"], given["x"].shape[0]
    terms = [(gradients.gate, given["gate_weight"])]
    if gradients.up is not None:
        terms.append((gradients.up, given["up_weight"]))
    lists = given["kept_lists"]
    return panel_down(terms, lists, tokens=tokens, config=config.dx, interpret=interpret, name="panel_dx")


def _dw(given: Given, config: PanelConfig, interpret: bool) -> Any:
    gradients, lists, x, dy = (given[name] for name in ("dh", "kept_lists", "x", "dy"))
    backend = "interpret" if interpret else "triton"
    return panel_dw(gradients, _kept(given)[0], lists, x, dy, config=config, backend=backend, dtype=x.dtype)


def _kept(given: Given) -> tuple[Any, jax.Array | None]:
    hidden: Hidden = given["up_keep"]
    return (hidden.h, None) if given["up_weight"] is None else (hidden.gate, hidden.up)


STAGES: dict[str, Stage] = {
    "gate": _gate, "pack": _pack, "up": _up, "up_keep": _up_keep, "down": _down, "dh": _dh, "dx": _dx,
    "dw": _dw, "rare": _dw,
}  # fmt: skip
"""From a field of `PanelConfig` to the stage that it is for, in the order of a call;
``rare`` is a part of ``dw``, timed as a whole."""

GATE_STAGES: dict[Implementation, tuple[str, ...]] = {
    "mosaic_gpu": (),
    "triton": ("gate",),
    "xla": ("pack",),
}
"""What has a config to search for of each implementation of the gate stage."""

TIED = ("up", "up_keep", "dh")
DIRECTIONS = {
    "forward": ("gate", "pack", "up", "down"),
    "train": ("gate", "pack", "up_keep", "down", "dh", "dx", "dw"),
}
CHUNKS = (64, 128, 256)


# -- candidates ----------------------------------------------------------------------------------------------

_OVER_CHUNKS = (
    (64, 4, 3), (64, 4, 3, 32), (64, 8, 3), (64, 4, 4, 2), (64, 8, 4, 1), (64, 8, 4, 16), (32, 4, 6),
    (32, 8, 6), (32, 8, 6, 16), (128, 8, 2),
)  # fmt: skip
_OVER_COLUMNS = (
    (64, 64, 4, 4), (128, 32, 4, 5), (128, 32, 4, 6), (128, 64, 4, 3), (128, 64, 8, 4),
    (256, 32, 8, 4), (256, 32, 8, 8), (256, 64, 8, 3),
)  # fmt: skip
_GATES = (
    (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (256, 32, 8, 5), (256, 64, 8, 3), (256, 64, 8, 4),
)  # fmt: skip
_LISTS_NEED = 160 * 1024
_TRIED = {"gate": _GATES, "down": _OVER_COLUMNS, "dx": _OVER_COLUMNS} | dict.fromkeys(TIED, _OVER_CHUNKS)


def candidates(stage: str, base: PanelConfig, itemsize: int, gated: bool, device: Device) -> list[Config]:
    """Configs to try for a stage, that of ``base`` first: all keep the laws,
    and fit the device as far as is known.

    Most stages have a list, for 16-bit types and the shared memory of Hopper; the others try one step of each
    field of ``base``'s own.
    """
    own = getattr(base, stage)
    if stage in _TRIED and itemsize == 2 and device.shared_memory >= _LISTS_NEED:
        tiles = [(tile,) for tile in _lawful_tiles(base)] if stage in TIED else [()]
        found = [StageConfig(*tile, *fields) for tile in tiles for fields in _TRIED[stage]]
    else:
        found = list(_steps(own))
    return [
        config
        for config in dict.fromkeys([own, *found])
        if _is_lawful(base, stage, config)
        and (
            config == own
            or not isinstance(config, StageConfig)
            or config.misfit(base.panel, itemsize, device) is None
        )
    ]


def _steps(config: Config) -> Iterator[Config]:
    """Neighbours of a config: one field twice or half as large, or one pipeline stage more or fewer."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        steps = (value - 1, value + 1) if field.name == "num_stages" else (value // 2, 2 * value)
        if field.name == "tile" and isinstance(config, StageConfig):
            continue  # for a stage over lists that is their chunk, which is searched by itself
        for step in steps:
            try:
                yield dataclasses.replace(config, **{field.name: step})
            except ValueError:
                continue


def _lawful_tiles(base: PanelConfig) -> list[int]:
    """One chunk of the lists, or two."""
    return [tile for tile in (base.chunk, 2 * base.chunk) if tile <= 256]


def _is_lawful(base: PanelConfig, stage: str, config: Config) -> bool:
    try:
        dataclasses.replace(base, **{stage: config})
    except ValueError:
        return False
    return True


def with_chunk(config: PanelConfig, chunk: int) -> PanelConfig | None:
    """The config with lists of another chunk; None where the other stages do not allow it."""
    tiles = {name: min(getattr(config, name).tile // config.chunk * chunk, 256) for name in TIED}
    tied = {name: dataclasses.replace(getattr(config, name), tile=tile) for name, tile in tiles.items()}
    try:
        return dataclasses.replace(config, chunk=chunk, **tied)
    except ValueError:
        return None
