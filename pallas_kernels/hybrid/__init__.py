"""HybridELL: the paper's training path. A token's few active neurons are all that outlives the forward."""

from pallas_kernels.hybrid.layer import backward, forward, infer

__all__ = ["backward", "forward", "infer"]
