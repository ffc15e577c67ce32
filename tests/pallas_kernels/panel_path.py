"""What the contract has to know of PanelELL: when a call that is differentiated finds no room."""

import dataclasses

import jax
import numpy as np
from op_contract import Path

from pallas_kernels.panel import config as configs
from pallas_kernels.panel.pallas_triton import n_chunks


@dataclasses.dataclass(frozen=True)
class PanelPath(Path):
    """A `Path` whose capacity holds everything, unless a variant in the path's own type asks for less."""

    def overflow_rows(self, active: np.ndarray) -> int:
        tokens, d_ff = active.shape
        if self.options.capacity == 1 or tokens == 0:
            return 0
        x, w = (jax.ShapeDtypeStruct((n, self.d_model), self.dtype) for n in (tokens, d_ff))
        config = configs.choose(x, w, self.options)
        chunk, panels = config.chunk, -(-tokens // config.panel)
        padded = np.pad(active, ((0, panels * config.panel - tokens), (0, 0)))
        unions = padded.reshape(panels, config.panel, d_ff).any(axis=1).sum(axis=1)
        room = max(1, round(n_chunks(panels, d_ff, chunk) * self.options.capacity))
        return tokens if int((-(-unions // chunk)).sum()) > room else 0
