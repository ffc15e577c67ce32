"""What the contract has to know of HybridELL: which rows do not fit."""

import dataclasses

import numpy as np
from op_checks import Path


@dataclasses.dataclass(frozen=True)
class HybridPath(Path):
    """A `Path` whose rows hold W non-zeros, wherever they are."""

    def overflow_rows(self, active: np.ndarray) -> int:
        return int((active.sum(axis=1) > self.options.layout.width).sum())
