"""PanelELL's products over gathered rows of weights, and the lists that they walk: Triton's or Mosaic GPU's.

They are the up projection, and dh in the backward, which multiply tokens by gathered rows; and the down
projection, and dx in the backward, which sum over gathered rows. Which backend a call takes for the former is
decided where its lists are made: those for Hopper have tiles. All others walk over chunks.
"""

from typing import Literal

import jax

from pallas_kernels import device
from pallas_kernels.activations import Rule
from pallas_kernels.common.gate_stage import Shaped
from pallas_kernels.panel import pallas_triton, pallas_triton_backward
from pallas_kernels.panel.config import GATHERED_SLICE, GATHERED_TILE, PanelConfig
from pallas_kernels.panel.pallas_triton import Hidden
from pallas_kernels.panel.pallas_triton_backward import Gradients
from pallas_kernels.panel.pallas_triton_counts import Counts, GatePanel
from pallas_kernels.panel.pallas_triton_lists import NeuronLists, Totals, build_lists

Implementation = Literal["triton", "hopper", "blackwell"]
"""Triton's kernels, or those on Mosaic GPU for a generation of GPUs."""
_BLACKWELL = 100


def implementation(
    config: PanelConfig, backend: str, x: Shaped, w_up: Shaped | None, *, in_blocks: bool, by_token: bool
) -> Implementation:
    """The products of tokens and gathered rows for x (M, D) and w_up (F, D), None without a gate projection,
    on a call's backend.

    Mosaic GPU's, where the config asks for them, stand behind Mosaic GPU's gate and are for gated layers, all
    tokens of a call at once, and one l1 for all.
    """
    if not config.gathered_backend == backend == "mosaic_gpu" or w_up is None or in_blocks or by_token:
        return "triton"
    if device.current().capability == _BLACKWELL:
        return _on_blackwell(x.shape[1], config.chunk)
    from pallas_kernels.panel import hopper_gathered

    reason = hopper_gathered.unsupported_reason(x.shape[1], w_up.shape[0], config.pad)
    return "hopper" if reason is None else "triton"


def _on_blackwell(d_model: int, chunk: int) -> Implementation:
    from pallas_kernels.panel import blackwell_roles

    return "blackwell" if blackwell_roles.unsupported_reason(d_model, chunk) is None else "triton"


def make_lists(
    counts: Counts,
    x: Shaped,
    w_up: Shaped | None,
    *,
    config: PanelConfig,
    backend: str,
    tokens: int | None = None,
    room: int | None = None,
    with_slots: bool = True,
    in_blocks: bool = False,
    by_token: bool = False,
) -> tuple[NeuronLists, Totals]:
    """`build_lists` for the products of a call: x (M, D) and w_up (F, D) as `implementation` takes them.

    Args:
      tokens: that the panels are of, None for all of x.
      room: chunks, None for as many as there could be.
      with_slots: whether `panel_dw` will be given the lists.
      in_blocks: whether `panel_up` will be given a ``start``.
      by_token: whether l1 is wanted for each token.
    """
    found = implementation(config, backend, x, w_up, in_blocks=in_blocks, by_token=by_token)
    tile = GATHERED_TILE if found == "hopper" else None
    interpret = backend == "interpret"
    return build_lists(
        counts,
        tokens=x.shape[0] if tokens is None else tokens,
        chunk=config.chunk,
        room=room,
        tile=tile,
        with_slots=with_slots,
        interpret=interpret,
    )


def panel_up(
    gate: GatePanel,
    lists: NeuronLists,
    x: jax.Array,
    w_up: jax.Array | None,
    *,
    config: PanelConfig,
    backend: str,
    rule: Rule,
    start: jax.Array | None = None,
    keep: bool = False,
    by_token: bool = False,
) -> Hidden:
    """`pallas_triton.panel_up` over lists of `make_lists`; with ``start`` h takes the place of the gates."""
    if lists.tiles is not None and w_up is not None:
        from pallas_kernels.panel import pallas_mosaic_gpu_up

        return pallas_mosaic_gpu_up.panel_up(gate, lists, x, w_up, pad=config.pad, rule=rule, keep=keep)
    found = implementation(config, backend, x, w_up, in_blocks=start is not None, by_token=by_token)
    if found == "blackwell" and w_up is not None:
        from pallas_kernels.panel import blackwell_up

        return blackwell_up.panel_up(gate, lists, x, w_up, rule=rule, keep=keep)
    return pallas_triton.panel_up(
        gate,
        lists,
        x,
        w_up,
        config=config.up_keep if keep else config.up,
        rule=rule,
        start=start,
        keep=keep,
        in_place=start is not None,
        l1_by_token=by_token,
        interpret=backend == "interpret",
    )


def panel_down(
    terms: list[tuple[jax.Array, jax.Array]],
    lists: NeuronLists,
    *,
    tokens: int,
    config: PanelConfig,
    backend: str,
    start: jax.Array | None = None,
    into: jax.Array | None = None,
    gradient: bool = False,
) -> jax.Array:
    """`pallas_triton.panel_down` of what a `panel_up` gave; with ``gradient`` of what a `panel_dh` did.

    Mosaic GPU's, where the config asks for it, stands behind Mosaic GPU's gate and writes all tokens of a
    call at once. On Hopper its slice must divide the config's ``pad``, up to which h is written.
    """
    stage, name = (config.dx, "panel_dx") if gradient else (config.down, "panel_down")
    if start is None and config.gathered_backend == backend == "mosaic_gpu":
        if device.current().capability == _BLACKWELL:
            if _on_blackwell(terms[0][1].shape[1], lists.chunk) == "blackwell":
                from pallas_kernels.panel import blackwell_down

                return blackwell_down.panel_down(terms, lists, tokens=tokens, name=name)
        elif config.pad % GATHERED_SLICE == 0:
            from pallas_kernels.panel import pallas_mosaic_gpu_down

            return pallas_mosaic_gpu_down.panel_down(terms, lists, tokens=tokens, name=name)
    return pallas_triton.panel_down(
        terms,
        lists,
        tokens=tokens,
        config=stage,
        start=start,
        into=into,
        interpret=backend == "interpret",
        name=name,
    )


def panel_dh(
    gate: jax.Array,
    up: jax.Array | None,
    lists: NeuronLists,
    dy: jax.Array,
    w_down: jax.Array,
    scale: jax.Array | None,
    *,
    config: PanelConfig,
    backend: str,
    rule: Rule,
) -> Gradients:
    """`pallas_triton_backward.panel_dh` over lists of `make_lists`."""
    if lists.tiles is not None and up is not None:
        from pallas_kernels.panel import pallas_mosaic_gpu_dh

        return pallas_mosaic_gpu_dh.panel_dh(gate, up, lists, dy, w_down, scale, pad=config.pad, rule=rule)
    by_token = scale is not None and scale.shape != (1,)
    weight = None if up is None else w_down
    found = implementation(config, backend, dy, weight, in_blocks=False, by_token=by_token)
    if found == "blackwell" and up is not None:
        from pallas_kernels.panel import blackwell_dh

        return blackwell_dh.panel_dh(gate, up, lists, dy, w_down, scale, rule=rule)
    return pallas_triton_backward.panel_dh(
        gate, up, lists, dy, w_down, scale, config=config.dh, rule=rule, interpret=backend == "interpret"
    )
