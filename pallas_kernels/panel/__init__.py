"""PanelELL: neighbouring tokens share neurons, so a panel of tokens runs its projections on tensor cores."""

from pallas_kernels.panel.layer import ffn

__all__ = ["ffn"]
