"""The command line: one file a command, its options, and what is said of mistakes."""

from train.cli.program import main, run

__all__ = ["main", "run"]
