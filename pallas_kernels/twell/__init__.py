"""TwELL: the paper's inference path. The gate GEMM packs its own output; one kernel does the rest."""

from pallas_kernels.twell.layer import ffn

__all__ = ["ffn"]
