"""Decode: a few tokens at a time, where reading the weights is all the time there is.

`infer`, `forward` and `backward` are the feed-forward layer's path, and `layer_of_stack` is that layer for
stacked weights. `project`, `attention` and `add_norm` are the kernels that a model's step needs around it.
For one or two tokens a `Stream` takes the place of sums and norms: `Stream.normed` gives `Normed`, which
kernels take for their input, and `project_onto` and `layer_onto` add to a `Residual`, which gives the next
stream.
"""

from pallas_kernels.decode.config import MOST_TOKENS, ROWS_TOKENS
from pallas_kernels.decode.layer import backward, forward, infer, layer_of_stack, layer_onto
from pallas_kernels.decode.pallas_triton_attention import HEAD_DIMS
from pallas_kernels.decode.pallas_triton_attention import decode_attention as attention
from pallas_kernels.decode.pallas_triton_project import add_norm, project_onto
from pallas_kernels.decode.pallas_triton_project import decode_project as project
from pallas_kernels.decode.residual import Normed, Residual, Stream

__all__ = [
    "HEAD_DIMS", "MOST_TOKENS", "ROWS_TOKENS", "Normed", "Residual", "Stream", "add_norm", "attention",
    "backward", "forward", "infer", "layer_of_stack", "layer_onto", "project", "project_onto",
]  # fmt: skip
