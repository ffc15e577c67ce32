"""Which format each layer of a model runs in."""

import dataclasses
import itertools
from collections.abc import Sequence

from pallas_kernels.options import Dense, FFNOptions, Layout, parse_layout


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The format of every feed-forward layer of a model, which changes no result.

    Attributes:
      layouts: one for each layer, the first layer's first.
    """

    layouts: tuple[Layout, ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "LayerPlan":
        """The plan of which ``texts`` are the ``texts``; raises ValueError for a format that there is not."""
        return cls(tuple(map(parse_layout, texts)))

    @property
    def texts(self) -> list[str]:
        """Each layer's format, as `parse` takes it."""
        return list(map(str, self.layouts))

    def __str__(self) -> str:
        """Formats with how many layers in a row have them: ``"dense, 5 × panel(capacity=0.125), dense"``."""
        runs = [(layout, len(list(group))) for layout, group in itertools.groupby(self.layouts)]
        return ", ".join(f"{count} × {layout}" if count > 1 else str(layout) for layout, count in runs)

    def segments(self, *, first_alone: bool) -> list["Segment"]:
        """The fewest runs of consecutive layers of one format; the first layer in one of its own if asked."""
        cuts = [
            layer
            for layer in range(1, len(self.layouts))
            if self.layouts[layer] != self.layouts[layer - 1] or (first_alone and layer == 1)
        ]
        bounds = [0, *cuts, len(self.layouts)]
        return [Segment(first, stop, self.layouts[first]) for first, stop in itertools.pairwise(bounds)]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive layers of one format: ``first`` up to before ``stop``; no format means the model's own."""

    first: int
    stop: int
    layout: Layout | None = None

    def options(self, model: FFNOptions) -> FFNOptions:
        """How its layers run in a model whose options are ``model``; dense ones by XLA, as everywhere."""
        if self.layout is None:
            return model
        backend = "auto" if isinstance(self.layout, Dense) else model.backend
        return dataclasses.replace(model, format=self.layout, backend=backend)
