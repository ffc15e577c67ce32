"""What the devices of a run send each other in a step: weights before a layer, gradients behind its backward.

The gradient of a step is computed in one ``shard_map`` (or ``pmap``), where each device has its own sequences
and everything but the following is local. P are the parameters; bytes are of the result on each device.

    data parallel   gradients, summed in the reduce type                                 4 P (in bf16 2 P)
    zero1           the same, each device its own piece                                  4 P / devices
                    new weights, gathered in f32 behind the optimizer                    4 P
    fsdp            weights, rounded to the compute type and gathered, in each layer     2 P a forward
                    the same again in the backward, where ``remat`` has it computed again
                    gradients, as zero1

Matrices cross layer by layer: their gradient is on its way while the backward goes on; of layers in a line it
has the backward of the layer before for that (`sparse_lm.layer_loop.paced`). With accumulation, data parallel
and zero1 send once a step, behind the last micro-batch. Norms and biases are whole everywhere, and their
gradients are summed once a step; a matrix that the devices divide nowhere is whole too, and its gradient is
summed when those of other matrices are.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sparse_lm.layer_loop import LayerWeights
from train.state import Params, is_matrix

WHOLE = -1
"""In place of a dimension: of a parameter that is not cut."""


class _Crossing(NamedTuple):
    """How one weight comes to its use and its gradient goes back."""

    axis: str
    shard: Literal["none", "zero1", "fsdp"]
    dimension: int
    dtype: DTypeLike
    reduce_dtype: DTypeLike

    @property
    def cut(self) -> bool:
        """Whether a device's gradient, and what it keeps for the optimizer, is a piece of the weight."""
        return self.shard != "none" and self.dimension != WHOLE

    def reduced(self, gradient: jax.Array) -> jax.Array:
        """The sum over devices, or this device's piece of it."""
        sent = gradient.astype(self.reduce_dtype)
        if self.cut:
            total = lax.psum_scatter(sent, self.axis, scatter_dimension=self.dimension, tiled=True)
        else:
            total = lax.psum(sent, self.axis)
        return total.astype(gradient.dtype)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the parameters of a model and their gradients cross the devices of one axis.

    Attributes:
      axis: name of the mapped axis.
      shard: `ParallelConfig.shard`.
      dimensions: for each parameter the dimension along which pieces are cut, or `WHOLE`.
      dtype: the compute type, in which fsdp gathers weights.
      reduce_dtype: in which gradients of matrices are summed.
      every_micro_batch: whether gradients are summed with each micro-batch, or once for all by `finish`.
    """

    axis: str
    shard: Literal["none", "zero1", "fsdp"]
    dimensions: Params
    dtype: DTypeLike
    reduce_dtype: DTypeLike
    every_micro_batch: bool

    def parts(self, params: Params) -> Params:
        """What the gradient is taken in: where zero1 cuts a gradient, something of the shape of a piece."""
        if not (self.every_micro_batch and self.shard == "zero1"):
            return params

        def part(path: tuple[Any, ...], leaf: jax.Array, dimension: int) -> jax.Array:
            if not self._crossing(path, dimension).cut:
                return leaf
            shape = list(leaf.shape)
            shape[dimension] //= lax.axis_size(self.axis)
            return jnp.zeros(shape, leaf.dtype)

        return jax.tree_util.tree_map_with_path(part, params, self.dimensions)

    def weights(self, parts: Params, params: Params) -> tuple[Params, LayerWeights | None]:
        """The model's weights, and what makes those of each layer, as functions of ``parts``."""
        if not self.every_micro_batch:
            return parts, None
        weights = self._used(*map(_outside_layers, (parts, params, self.dimensions)))
        in_layer = jax.tree.map(lambda d: d if d == WHOLE else d - 1, self.dimensions["blocks"])

        def make(layer: Params, stored: Params) -> Params:
            return self._used(layer if stored is None else stored, layer, in_layer)

        # Under zero1 the layers' weights are whole, and their gradient is that of other arrays.
        if self.shard == "zero1":
            return weights | {"blocks": params["blocks"]}, LayerWeights(make, parts["blocks"])
        return weights | {"blocks": parts["blocks"]}, LayerWeights(make, None)

    def finish(self, gradients: Params) -> Params:
        """Sums over devices what is not summed yet."""

        def finished(path: tuple[Any, ...], gradient: jax.Array, dimension: int) -> jax.Array:
            crossed = self.every_micro_batch and is_matrix(path)
            return gradient if crossed else self._crossing(path, dimension).reduced(gradient)

        return jax.tree_util.tree_map_with_path(finished, gradients, self.dimensions)

    def _used(self, parts: Params, params: Params, dimensions: Params) -> Params:
        def used(path: tuple[Any, ...], part: jax.Array, whole: jax.Array, dimension: int) -> jax.Array:
            return _use(self._crossing(path, dimension), part, whole) if is_matrix(path) else part

        return jax.tree_util.tree_map_with_path(used, parts, params, dimensions)

    def _crossing(self, path: tuple[Any, ...], dimension: int) -> _Crossing:
        if not is_matrix(path):
            return _Crossing(self.axis, self.shard, WHOLE, self.dtype, jnp.float32)
        return _Crossing(self.axis, self.shard, dimension, self.dtype, self.reduce_dtype)


def _outside_layers(tree: Params) -> Params:
    return {name: value for name, value in tree.items() if name != "blocks"}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _use(crossing: _Crossing, part: jax.Array, whole: jax.Array) -> jax.Array:
    """The weight that a device computes with, whose gradient arrives summed in ``part``."""
    if not crossing.cut:
        return part
    return whole if crossing.shard == "zero1" else _gathered(crossing, part)


def _use_forward(crossing, part, whole):
    return _use(crossing, part, whole), None


def _use_backward(crossing, _, gradient):
    return crossing.reduced(gradient), None


_use.defvjp(_use_forward, _use_backward)


def _gathered(crossing: _Crossing, piece: jax.Array) -> jax.Array:
    """The whole weight, rounded to the compute type on its way, in the type of ``piece``."""
    rounded = piece.astype(crossing.dtype)
    if rounded.dtype.itemsize != 2:
        return lax.all_gather(rounded, crossing.axis, axis=crossing.dimension, tiled=True)
    # As bits: XLA gathers 16-bit floats as f32 on devices that have none, and may move the cast behind it.
    bits = lax.bitcast_convert_type(rounded, jnp.uint16)
    bits = lax.all_gather(bits, crossing.axis, axis=crossing.dimension, tiled=True)
    return lax.bitcast_convert_type(bits, rounded.dtype).astype(piece.dtype)
