"""Exact sparse feed-forward layers for JAX: GPU kernels, their gradients and the formats between them."""

from pallas_kernels.ffn import sparse_ffn, sparse_mlp
from pallas_kernels.formats import HybridELL, PanelELL, TwELL
from pallas_kernels.options import FFNOptions, FFNStats

__all__ = ["FFNOptions", "FFNStats", "HybridELL", "PanelELL", "TwELL", "sparse_ffn", "sparse_mlp"]
