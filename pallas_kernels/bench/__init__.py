"""The benchmark program of the kernels: ``python -m pallas_kernels.bench layers | stages | twell``."""
