"""The paper's 1.5B model: 28 layers, 30,000 steps."""

from configs._paper import paper

config = paper("1p5b", num_layers=28, steps=30_000)
