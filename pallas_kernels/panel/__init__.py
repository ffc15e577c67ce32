"""PanelELL: neighbouring tokens share neurons, so a panel of tokens runs its projections on tensor cores."""

from pallas_kernels.panel.layer import backward, forward, infer

__all__ = ["backward", "forward", "infer"]
