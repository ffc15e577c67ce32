"""What ``shard_map`` asks of a kernel under its check of varying axes:
to say over which mesh axes outputs vary."""

from typing import Any

import jax
from jax import lax


def vary_alike(*trees: Any) -> Any:
    """The arrays, or trees of them, each varying over every manual mesh axis that one of them varies over.

    A kernel reads local arrays: a weight that every device holds is, to it, one more local array.
    """
    return _vary(trees, frozenset[str]().union(*map(_varying, jax.tree.leaves(trees))))


def vary_with(like: jax.Array, tree: Any) -> Any:
    """The arrays of a tree, each varying also over the axes that ``like`` varies over."""
    return _vary(tree, _varying(like))


def output(like: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """An output of a kernel that varies over the axes that its input ``like`` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _varying(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _vary(tree: Any, axes: frozenset[str]) -> Any:
    def cast(array):
        missing = axes - _varying(array)
        return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(cast, tree)
