"""Which format each layer of a model runs in, and how a stack of layers runs in several formats."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.options import Dense, FFNOptions, Layout, parse_layout
from sparse_lm.config import ModelConfig
from sparse_lm.layer_loop import is_unrolled, over_layers, paced


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


def run_segments(
    run_layer: Callable[[Segment, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    segments: Sequence[Segment],
    config: ModelConfig,
    *,
    exchanged: bool = False,
) -> tuple[Any, Any]:
    """Runs a stack of layers, one segment after the other, each as `over_layers` does.

    Segments of layers that are unrolled cost nothing: the compiler reads each layer where it stands in the
    stack. Several loops each take a copy of their part of the stack, and their gradients are copied into one.

    Args:
      run_layer: (segment, carry, one layer's inputs) -> (carry, outputs).
      carry: what the first layer takes.
      inputs: of all layers, every leaf with a leading layer axis.
      segments: of all layers, in order.
      config: of the model.
      exchanged: whether devices sum gradients of ``inputs``. Those of unrolled layers are then `paced`.

    Returns:
      The last carry, and all outputs with a leading layer axis on every leaf.
    """
    sizes = [segment.stop - segment.first for segment in segments]
    each_alone = exchanged and is_unrolled(config)
    if each_alone:
        segments = [segment for segment, size in zip(segments, sizes, strict=True) for _ in range(size)]
        sizes = [1] * len(segments)
    # Layers of one segment are traced once.
    run = {
        segment: jax.jit(partial(over_layers, partial(run_layer, segment), config=config), inline=True)
        for segment in segments
    }
    own, parts = _split(inputs, sizes), []
    for nth, segment in enumerate(segments):
        if each_alone and nth + 1 < len(segments):
            carry, own[nth + 1] = paced(carry, own[nth + 1])
        carry, outputs = run[segment](carry, own[nth])
        parts.append(outputs)
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _split(inputs: Any, sizes: Sequence[int]) -> list[Any]:
    """Parts of so many layers. (The gradient of a slice would be as large as the stack.)"""
    leaves, structure = jax.tree.flatten(inputs)
    of_parts = zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, own) for own in of_parts]
