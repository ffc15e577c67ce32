"""The dense layer by XLA: whole, block by block, and for the rows that do not fit a compact format."""

from pallas_kernels.dense.layer import backward, forward, infer, recompute_backward, rounded, token_hits

__all__ = ["backward", "forward", "infer", "recompute_backward", "rounded", "token_hits"]
