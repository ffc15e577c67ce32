"""Decode: a few tokens at a time, where reading the weights is all the time there is.

`infer`, `forward` and `backward` are the feed-forward layer's path, and `layer_of_stack` is that layer for
stacked weights; the others are the kernels that a model's step needs around it.
"""

from pallas_kernels.decode.config import MOST_TOKENS
from pallas_kernels.decode.layer import backward, forward, infer, layer_of_stack
from pallas_kernels.decode.pallas_triton_attention import HEAD_DIMS
from pallas_kernels.decode.pallas_triton_attention import decode_attention as attention
from pallas_kernels.decode.pallas_triton_project import add_norm
from pallas_kernels.decode.pallas_triton_project import decode_project as project

__all__ = [
    "HEAD_DIMS", "MOST_TOKENS", "add_norm", "attention", "backward", "forward", "infer", "layer_of_stack",
    "project",
]  # fmt: skip
