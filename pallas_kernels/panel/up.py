"""The lists and the up projection of a call that keeps nothing for a backward: Triton's or Mosaic GPU's."""

import jax

from pallas_kernels.activations import Rule
from pallas_kernels.common.gate_stage import Shaped
from pallas_kernels.panel.config import GATHERED_TILE, PanelConfig, UpBackend
from pallas_kernels.panel.pallas_triton import Hidden, panel_up
from pallas_kernels.panel.pallas_triton_lists import Counts, GatePanel, NeuronLists, Totals, build_lists


def implementation(
    config: PanelConfig, backend: str, x: Shaped, w_up: Shaped | None, *, in_blocks: bool, l1_by_token: bool
) -> UpBackend:
    """The up projection for x (M, D) and w_up (F, D), None without a gate projection, on a call's backend.

    Mosaic GPU's, where the config asks for it, stands behind Mosaic GPU's gate and is for gated layers, all
    tokens of a call at once, and one l1 for all.
    """
    if not config.up_backend == backend == "mosaic_gpu" or w_up is None or in_blocks or l1_by_token:
        return "triton"
    from pallas_kernels.panel import hopper_gathered

    reason = hopper_gathered.unsupported_reason(x.shape[1], w_up.shape[0], config.down.tile_k)
    return "mosaic_gpu" if reason is None else "triton"


def list_and_project(
    gate: GatePanel,
    counts: Counts,
    x: jax.Array,
    w_up: jax.Array | None,
    *,
    config: PanelConfig,
    backend: str,
    rule: Rule,
    start: jax.Array | None = None,
    l1_by_token: bool = False,
) -> tuple[NeuronLists, Totals, Hidden]:
    """Lists with room for all neurons of a gate stage's panels, what they add up to, and h over them.

    Arguments are those of `panel_up`; with ``start`` h takes the place of the gates.
    """
    in_blocks, interpret = start is not None, backend == "interpret"
    found = implementation(config, backend, x, w_up, in_blocks=in_blocks, l1_by_token=l1_by_token)
    if found == "mosaic_gpu" and w_up is not None:
        from pallas_kernels.panel import pallas_mosaic_gpu_up

        lists, totals = build_lists(gate, counts, chunk=config.chunk, tile=GATHERED_TILE)
        hidden = pallas_mosaic_gpu_up.panel_up(gate, lists, x, w_up, pad=config.down.tile_k, rule=rule)
        return lists, totals, hidden
    lists, totals = build_lists(gate, counts, chunk=config.chunk, interpret=interpret)
    hidden = panel_up(
        gate,
        lists,
        x,
        w_up,
        config=config.up,
        rule=rule,
        start=start,
        in_place=in_blocks,
        l1_by_token=l1_by_token,
        interpret=interpret,
    )
    return lists, totals, hidden
