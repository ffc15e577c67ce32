"""Which mesh axes split the tokens, which split the neurons, and which only store weights.

The shardings that the arguments come with decide, in this order:

1. An axis that splits a leading dimension of x splits the *tokens*.
2. Any other axis that splits the F of a weight splits the *neurons*: tensor parallelism.
3. What remains of a weight's sharding, on F or on D, is *storage*: FSDP. The weight is gathered for the call.

An axis whose size does not divide what it would split is not used: the call is computed alike on all of its
devices. So it is for an axis over which no argument is split.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from pallas_kernels.options import FFNStats

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WeightSplit:
    """Mesh axes over which one weight (F, D) is stored in pieces, beside those that split the neurons."""

    rows: Axes
    columns: Axes

    @property
    def storage(self) -> Axes:
        return self.rows + self.columns


@dataclasses.dataclass(frozen=True)
class Split:
    """How one call is shared out. Every field names mesh axes; no axis has two roles in one array.

    Attributes:
      tokens: for each leading dimension of x, the axes that split it.
      neurons: the axes that split F.
      weights: storage of w_gate (if there is one), w_up and w_down.
      shards: of how many parts the tokens are.
    """

    tokens: tuple[Axes, ...]
    neurons: Axes
    weights: tuple[WeightSplit, ...]
    shards: int

    @classmethod
    def of(
        cls,
        mesh: Mapping[str, int],
        x: tuple[Sequence[int], PartitionSpec],
        weights: Sequence[tuple[Sequence[int], PartitionSpec]],
    ) -> "Split":
        """The split of a call from the (shape, sharding) of x (..., D) and of each weight (F, D).

        Args:
          mesh: the size of each axis.
        """
        shape, spec = x
        tokens = tuple(
            _dividing(mesh, axes, size)
            for axes, size in zip(axes_of(spec, len(shape)), shape[:-1], strict=False)
        )
        taken = {axis for axes in tokens for axis in axes}
        specs = [axes_of(spec, 2) for _, spec in weights]
        d_ff, d_model = weights[0][0]
        on_rows = [axis for rows, _ in specs for axis in rows if axis not in taken]
        neurons = _dividing(mesh, tuple(dict.fromkeys(on_rows)), d_ff)
        rows_each = d_ff // math.prod(mesh[axis] for axis in neurons)

        def stored(rows: Axes, columns: Axes) -> WeightSplit:
            rows = tuple(axis for axis in rows if axis not in neurons)
            columns = tuple(axis for axis in columns if axis not in neurons)
            return WeightSplit(_dividing(mesh, rows, rows_each), _dividing(mesh, columns, d_model))

        return cls(
            tokens=tokens,
            neurons=neurons,
            weights=tuple(stored(*axes) for axes in specs),
            shards=math.prod(mesh[axis] for axis in taken),
        )

    @property
    def token_axes(self) -> Axes:
        return tuple(axis for axes in self.tokens for axis in axes)

    @property
    def axes(self) -> Axes:
        """All axes over which devices compute or hold different things."""
        storage = (axis for weight in self.weights for axis in weight.storage)
        return tuple(dict.fromkeys((*self.token_axes, *self.neurons, *storage)))

    @property
    def x(self) -> PartitionSpec:
        """Of x, y and their cotangents: D is whole."""
        return PartitionSpec(*map(_entry, self.tokens), None)

    @property
    def statistics(self) -> FFNStats:
        """Of each statistic, in an `FFNStats`: whole, but for what is counted by neuron."""
        specs: dict[str, Any] = {field.name: PartitionSpec() for field in dataclasses.fields(FFNStats)}
        return FFNStats(**specs | {"neuron_hits": PartitionSpec(_entry(self.neurons))})

    @property
    def outputs(self) -> tuple[PartitionSpec, FFNStats]:
        """Of y and the statistics."""
        return self.x, self.statistics

    @property
    def arguments(self) -> tuple[PartitionSpec, ...]:
        """Of x and the weights, and of their gradients."""
        return self.x, *(self.weight(index) for index in range(len(self.weights)))

    @property
    def hidden(self) -> PartitionSpec:
        """Of an array (..., F) over tokens and neurons."""
        return PartitionSpec(*map(_entry, self.tokens), _entry(self.neurons))

    def weight(self, index: int) -> PartitionSpec:
        """Of the weight ``weights[index]`` and its gradient, as they are stored."""
        stored = self.weights[index]
        return PartitionSpec(_entry(self.neurons + stored.rows), _entry(stored.columns))

    def without_idle_storage(self) -> "Split":
        """The same call where no weight is stored in pieces over an axis that does not split the tokens."""
        kept = [
            WeightSplit(*(tuple(a for a in axes if a in self.token_axes) for axes in (w.rows, w.columns)))
            for w in self.weights
        ]
        return dataclasses.replace(self, weights=tuple(kept))


def axes_of(spec: PartitionSpec, ndim: int) -> list[Axes]:
    """The mesh axes of each of ``ndim`` dimensions, major to minor."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    return [e if isinstance(e, tuple) else (e,) if isinstance(e, str) else () for e in entries]


def _dividing(mesh: Mapping[str, int], axes: Axes, size: int) -> Axes:
    """The longest start of ``axes`` whose devices share ``size`` evenly."""
    while axes and size % math.prod(mesh[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def _entry(axes: Axes) -> Axes | str | None:
    return axes[0] if len(axes) == 1 else axes or None
