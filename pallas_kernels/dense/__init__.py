"""The dense layer by XLA: whole, block by block, and for the rows that do not fit a compact format."""

from pallas_kernels.dense.layer import Weights, backward, ffn, forward, recompute_backward, rounded

__all__ = ["Weights", "backward", "ffn", "forward", "recompute_backward", "rounded"]
