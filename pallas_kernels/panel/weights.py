"""The weight gradients of PanelELL, those of hot neurons by Triton or by Mosaic GPU."""

import dataclasses
from functools import partial

import jax
from jax.experimental import pallas as pl

from pallas_kernels.common.gate_stage import Shaped
from pallas_kernels.panel.config import PanelConfig, StageBackend
from pallas_kernels.panel.pallas_triton_backward import Gradients
from pallas_kernels.panel.pallas_triton_lists import NeuronLists
from pallas_kernels.panel.pallas_triton_weights import (
    fill_rounds,
    panel_dw_hot,
    panel_dw_rare,
    rank,
    token_lists,
)

_SHORTEST_LIMIT = 16


def implementation(config: PanelConfig, backend: str, x: Shaped) -> StageBackend:
    """Whose kernel sums the gradients of hot neurons for x (M, D) on a call's backend.

    Mosaic GPU's, where the config asks for it, stands behind Mosaic GPU's gate.
    """
    if not config.dw_backend == backend == "mosaic_gpu":
        return "triton"
    from pallas_kernels.panel import pallas_mosaic_gpu_weights

    reason = pallas_mosaic_gpu_weights.unsupported_reason(x.shape[1], x.dtype, config.panel)
    return "mosaic_gpu" if reason is None else "triton"


def panel_dw(
    gradients: Gradients,
    gate: jax.Array,
    lists: NeuronLists,
    x: jax.Array,
    dy: jax.Array,
    *,
    config: PanelConfig,
    backend: str,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Gradients (F, D) of Wg, Wu and Wd in ``dtype``; without a gate, of None, Wu and Wd.

    Args:
      gate: (n_slots, P) as kept by the forward, above zero where a token activates a slot's neuron; past a
        panel's count it means nothing.
      x, dy: (M, D), of one type.
    """
    zs = [z for z in (gradients.gate, gradients.up, gradients.h) if z is not None]
    xs = [x] * (len(zs) - 1) + [dy]
    interpret = backend == "interpret"
    on_mosaic = implementation(config, backend, x) == "mosaic_gpu"
    share, hot_config = config.rare.share, config.dw
    if on_mosaic:
        from pallas_kernels.panel import pallas_mosaic_gpu_weights as mosaic

        share = config.rare.mosaic_gpu_share
        hot_config = dataclasses.replace(config.dw, tile=mosaic.TILE_M, tile_d=mosaic.TILE_D, per_core=1)
    limit = max(x.shape[0] // share, _SHORTEST_LIMIT)
    tiles = len(zs) * pl.cdiv(x.shape[1], hot_config.tile_d)
    round_up = partial(fill_rounds, tiles=tiles, config=hot_config)
    assert lists.slots is not None
    ranking = rank(lists.hits, lists.totals, limit=limit, round_up=round_up, interpret=interpret)
    if on_mosaic:
        rows = mosaic.panel_dw_hot(zs, xs, ranking, lists.slots, dtype=dtype)
    else:
        rows = panel_dw_hot(zs, xs, ranking, lists.slots, config=hot_config, dtype=dtype, interpret=interpret)
    tokens = token_lists(gate, lists, ranking, limit=limit, interpret=interpret)
    *dw_gate, dw_up, dw_down = panel_dw_rare(
        zs, xs, ranking, tokens, rows, config=config.rare, interpret=interpret
    )
    return (dw_gate[0] if dw_gate else None), dw_up, dw_down
