"""Bamboo (arXiv 2406.05955): a Mistral with both sides of the gate rectified, dReLU."""

from sparse_lm.convert.family import Family, sliding_window

BAMBOO = Family("bamboo", "BambooForCausalLM", window=sliding_window)
