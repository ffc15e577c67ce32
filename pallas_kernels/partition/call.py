"""Which of the ways to run a call on several devices is the one, if any."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.common import varying_axes
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.partition import known, unknown
from pallas_kernels.partition.layer import Layer
from pallas_kernels.partition.split import Split


def ffn(x: jax.Array, *weights: jax.Array, options: FFNOptions) -> tuple[jax.Array, FFNStats] | None:
    """y (..., D) and the statistics of x (..., D) and the weights (F, D) on all devices of their mesh.

    None where there is nothing to share out: on one device, and where arrays are local already.
    """
    mesh = _mesh(x, *weights)
    if mesh is None:
        return None
    # In a shard_map of the caller's over other axes, a weight's gradient is summed by transposing its cast.
    x, *weights = varying_axes.vary_alike(x, *weights)
    if AxisType.Explicit not in mesh.axis_types:
        return _UNKNOWN(Layer(options), x, *weights)
    placed = [(array, jax.typeof(array).sharding.spec) for array in (x, *weights)]
    return ffn_on_mesh(mesh, *placed, options=options)


def is_shared(*arrays: jax.Array) -> bool:
    """Whether `ffn` shares out a call of these arrays."""
    return _mesh(*arrays) is not None


def ffn_on_mesh(
    mesh: AbstractMesh,
    x: tuple[jax.Array, PartitionSpec],
    *weights: tuple[jax.Array, PartitionSpec],
    options: FFNOptions,
) -> tuple[jax.Array, FFNStats]:
    """The same from arrays and how they are to be split over a mesh."""
    arrays, specs = zip(x, *weights, strict=True)
    placed = [(array.shape, spec) for array, spec in zip(arrays, specs, strict=True)]
    return _KNOWN(mesh, Split.of(dict(mesh.shape), placed[0], placed[1:]), Layer(options), *arrays)


# Compiled as one where nothing else is: a call outside of ``jit``.
_KNOWN = jax.jit(known.ffn, static_argnums=(0, 1, 2))
_UNKNOWN = jax.jit(unknown.ffn, static_argnums=0)


def _mesh(*arrays: jax.Array) -> AbstractMesh | None:
    """The mesh that arrays are on, if they are not local to one of its devices already.

    A single device shares nothing; but arrays that are split over Explicit axes, of whatever size, have that
    in their types, and outside of a ``shard_map`` products of such types are refused. Auto axes that a
    ``shard_map`` of the caller's leaves to the compiler are left to it here, too.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or AxisType.Explicit in mesh.axis_types:
        return mesh
    return None if mesh.manual_axes or math.prod(mesh.axis_sizes) == 1 else mesh
