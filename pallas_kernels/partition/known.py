"""The layer where the split is known while it is traced: a ``jax.shard_map`` forward and one backward.

Both are written out, so that the collectives are those of `local`. What a device keeps between forward and
backward stays on it: every array gets a leading axis over the devices.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels.differentiation import Fact, primals
from pallas_kernels.options import FFNStats
from pallas_kernels.partition import local
from pallas_kernels.partition.layer import Arrays, Layer
from pallas_kernels.partition.saved import Saved, once
from pallas_kernels.partition.split import Split


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ffn(
    mesh: AbstractMesh, split: Split, layer: Layer, x: jax.Array, *weights: jax.Array
) -> tuple[jax.Array, FFNStats]:
    """y and statistics of x (..., D) and the weights (F, D) under a mesh."""
    placed, split = _placed(mesh, split, (x, *weights))
    run = _mapped(mesh, layer, partial(local.infer, split, layer), (split.arguments,), split.outputs)
    return run(placed)


def _forward(mesh, split, layer, *arguments):
    arguments, weights = primals(arguments)
    arguments = once(arguments)
    placed, inner = _placed(mesh, split, arguments)

    def run(arguments):
        outputs, kept = local.forward(inner, layer, arguments)
        return outputs, jax.tree.map(lambda leaf: leaf[None], kept)

    specs = inner.outputs, _per_device(inner)
    outputs, kept = _mapped(mesh, layer, run, (inner.arguments,), specs)(placed)
    return outputs, Saved(arguments, kept, Fact.of(weights))


def _backward(mesh, split, layer, saved: Saved, cotangents):
    dy, dl1 = once(saved.cotangents(cotangents))
    placed, inner = _placed(mesh, split, saved.arguments)

    def run(arguments, kept, dy, dl1):
        kept = jax.tree.map(lambda leaf: leaf[0], kept)
        return local.backward(inner, layer, arguments, kept, dy, dl1, weights=bool(saved.weights))

    specs = inner.arguments, _per_device(inner), inner.x, PartitionSpec()
    differentiate = _mapped(mesh, layer, run, specs, saved.wanted(inner.arguments))
    gradients = differentiate(placed, saved.kept, _place(mesh, dy, inner.x), dl1)
    return saved.gradients([_like(a, g) for a, g in zip(saved.arguments, gradients, strict=False)])


ffn.defvjp(_forward, _backward, symbolic_zeros=True)


def _mapped(mesh: AbstractMesh, layer: Layer, function: Any, in_specs: Any, out_specs: Any) -> Any:
    # Pallas' interpreter mixes arrays of its own, which vary over no axis, with the kernel's.
    checked = layer.options.backend != "interpret"
    # Inside a shard_map of the caller's over some axes, those are local already.
    axes = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes} if mesh.manual_axes else set()
    return jax.shard_map(
        function, mesh=mesh, axis_names=axes, in_specs=in_specs, out_specs=out_specs, check_vma=checked
    )


def _per_device(split: Split) -> PartitionSpec:
    return PartitionSpec(split.axes or None)


def _placed(mesh: AbstractMesh, split: Split, arguments: Arrays) -> tuple[Arrays, Split]:
    """The arguments where ``shard_map`` takes them from, and the split that is left to do inside.

    Weights are rounded before anything moves them, here or on the way into ``shard_map``. Over an axis that
    does not split the tokens, devices compute alike: a weight that is stored in pieces over it is gathered
    out here, since nothing inside could tell ``shard_map`` that all of them then hold the same.
    """
    x, *weights = arguments
    inner = split.without_idle_storage()
    arrays = (x, *(weight.astype(x.dtype) for weight in weights))
    placed = [_place(mesh, array, spec) for array, spec in zip(arrays, inner.arguments, strict=True)]
    return tuple(placed), inner


def _place(mesh: AbstractMesh, array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Moves an array on Explicit axes, where ``shard_map`` takes it as it is; on Auto ones that moves it."""
    if AxisType.Explicit not in mesh.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def _like(argument: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient in the type of what it is the gradient of, in which Explicit axes are."""
    gradient, sharding = gradient.astype(argument.dtype), jax.typeof(argument).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(gradient, sharding) if explicit else gradient
