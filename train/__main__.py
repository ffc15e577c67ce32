"""``python -m train`` is ``sparse-lm``."""

from train.cli import run

run()
