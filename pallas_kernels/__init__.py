"""Exact sparse feed-forward layers for JAX: GPU kernels, their gradients and the formats between them."""

from pallas_kernels.activations import Threshold
from pallas_kernels.ffn import sparse_ffn, sparse_mlp
from pallas_kernels.formats import HybridELL, PanelELL, TwELL
from pallas_kernels.options import Auto, Decode, Dense, FFNOptions, FFNStats, Hybrid, Panel, Twell

__all__ = [
    "Auto",
    "Decode",
    "Dense",
    "FFNOptions",
    "FFNStats",
    "Hybrid",
    "HybridELL",
    "Panel",
    "PanelELL",
    "Threshold",
    "TwELL",
    "Twell",
    "sparse_ffn",
    "sparse_mlp",
]
