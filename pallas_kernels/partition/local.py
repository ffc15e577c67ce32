"""What one device does of a call that several share: gather weights, run the layer, add up over devices.

These functions see the arrays of one device and name mesh axes in their collectives. They run inside
``jax.shard_map`` and as the per-device program of ``custom_partitioning`` alike.

    forward                                                   bytes of the result, on each device
    weights stored in pieces: rounded to x's type, gathered   F D / (parts of neurons) in x's type, each
    y: summed over the neurons' axes                          M D / (parts of tokens) in x's type
    statistics: as `FFNStats.all_reduce` does                 scalars, and F / (parts of neurons) int32

    backward
    weights stored in pieces: as above
    dx: summed over the neurons' axes                         M D / (parts of tokens) in x's type
    weights' gradients: summed over the tokens' axes          one piece of the weight in f32, each

The gradient of a weight that is stored in pieces is reduce-scattered: each device gets the sum for its own
piece. ``weight_gradients="input"`` rounds gradients to x's type before they are summed: half the bytes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import varying_axes
from pallas_kernels.options import FFNStats
from pallas_kernels.partition.layer import Arrays, Layer
from pallas_kernels.partition.split import Axes, Split, WeightSplit


def infer(split: Split, layer: Layer, arguments: Arrays) -> tuple[jax.Array, FFNStats]:
    """y and the statistics of the whole call."""
    return _whole(split, *layer.infer(_gathered(split, layer, arguments)))


def forward(split: Split, layer: Layer, arguments: Arrays) -> tuple[tuple[jax.Array, FFNStats], Any]:
    """The same, and what this device's ``backward`` needs."""
    gathered = _gathered(split, layer, arguments)
    outputs, kept = layer.forward(gathered)
    return _whole(split, *outputs), varying_axes.vary_with(gathered[0], kept)


def backward(
    split: Split, layer: Layer, arguments: Arrays, kept: Any, dy: jax.Array, dl1: jax.Array, *, weights: bool
) -> Arrays:
    """Cotangents of x and, if wanted, of the weights: placed as these, in the type they are added up in."""
    # l1 is the mean over the parts of the tokens of each part's own mean.
    dl1 = dl1 / split.shards
    gathered, dy, dl1 = varying_axes.vary_alike(_gathered(split, layer, arguments), dy, dl1)
    dx, *gradients = layer.backward(gathered, kept, dy, dl1, weights=weights)
    stored = split.weights if weights else ()
    scattered = [_scattered(g, how, split) for g, how in zip(gradients, stored, strict=True)]
    return _sum(dx, split.neurons), *scattered


def recompute_backward(
    split: Split, layer: Layer, arguments: Arrays, dy: jax.Array, dl1: jax.Array, *, weights: bool
) -> Arrays:
    """`backward` of a call of which nothing was kept."""
    _, kept = layer.forward(_gathered(split, layer, arguments))
    return backward(split, layer, arguments, kept, dy, dl1, weights=weights)


def _gathered(split: Split, layer: Layer, arguments: Arrays) -> Arrays:
    """x, and of each weight the rows of this device's neurons, whole in D.

    Their type is the one in which gradients are added up. Their values are of x's type: they are rounded
    before they are gathered, so that the layer's own rounding changes nothing.
    """
    x, *weights = arguments
    dtype = x.dtype if layer.options.weight_gradients == "input" else jnp.float32
    rounded = [weight.astype(x.dtype) for weight in weights]
    gathered = [_gather(w, stored).astype(dtype) for w, stored in zip(rounded, split.weights, strict=True)]
    # A kernel reads local arrays: all of them vary over the axes that one of them varies over.
    return varying_axes.vary_alike(x, *gathered)


def _gather(weight: jax.Array, stored: WeightSplit) -> jax.Array:
    dtype = weight.dtype
    if stored.storage and dtype.itemsize == 2:
        # As bits: XLA gathers 16-bit floats as f32 on devices that have none, and may move casts.
        weight = lax.bitcast_convert_type(weight, jnp.uint16)
    for dimension, axes in enumerate((stored.rows, stored.columns)):
        if axes:
            weight = lax.all_gather(weight, axes, axis=dimension, tiled=True)
    return weight if weight.dtype == dtype else lax.bitcast_convert_type(weight, dtype)


def _scattered(gradient: jax.Array, stored: WeightSplit, split: Split) -> jax.Array:
    """The sum over all tokens, of the piece of the weight that this device stores."""
    tokens = split.token_axes
    for dimension, axes in enumerate((stored.rows, stored.columns)):
        # From the major axis on: each cuts the pieces of those before it.
        for axis in axes:
            if axis in tokens:
                gradient = lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
            else:  # the devices along it hold the same gradient
                size = gradient.shape[dimension] // lax.axis_size(axis)
                gradient = lax.dynamic_slice_in_dim(gradient, lax.axis_index(axis) * size, size, dimension)
    return _sum(gradient, tuple(axis for axis in tokens if axis not in stored.storage))


def _whole(split: Split, y: jax.Array, stats: FFNStats) -> tuple[jax.Array, FFNStats]:
    return _sum(y, split.neurons), stats.all_reduce(split.token_axes, split.neurons)


def _sum(array: jax.Array, axes: Axes) -> jax.Array:
    return lax.psum(array, axes) if axes else array
