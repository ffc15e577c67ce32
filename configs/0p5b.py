"""The paper's 0.5B model: 8 layers, 10,000 steps."""

from configs._paper import paper

config = paper("0p5b", num_layers=8, steps=10_000)
