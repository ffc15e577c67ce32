"""The paper's 1B model: 18 layers, 20,000 steps."""

from configs._paper import paper

config = paper("1b", num_layers=18, steps=20_000)
