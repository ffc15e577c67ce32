"""TwELL: the paper's inference path. The gate GEMM packs its own output; one kernel does the rest."""

from pallas_kernels.twell.layer import backward, forward, infer

__all__ = ["backward", "forward", "infer"]
