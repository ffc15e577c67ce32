"""The paper's 2B model: 38 layers, 40,000 steps."""

from configs._paper import paper

config = paper("2b", num_layers=38, steps=40_000)
