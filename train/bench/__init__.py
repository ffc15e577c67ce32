"""Benchmarks of whole models, what the kernels' benchmark takes from a trained one, and its curves."""
