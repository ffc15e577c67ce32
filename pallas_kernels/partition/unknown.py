"""The layer where the split is the compiler's to know: operations with ``custom_partitioning``.

On Auto axes the partitioner decides how arrays are split, from all of the program, after it has been traced.
Of each operation here it first reads which dimensions go together (`_rule`), and then asks, with the
shardings that it found, for the program of one device (`_partitioned`). The split follows from x and the
weights alone, so that forward and backward find the same one.

Between the two, an operation can keep what has the shape of all tokens and neurons, as the projections of
the dense layer do. The shapes of what a sparse format keeps depend on the split, which is not known when the
operation's shapes are: there nothing is kept, and the backward runs the forward's kernels first.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.differentiation import Fact, primals
from pallas_kernels.options import FFNStats
from pallas_kernels.partition import local
from pallas_kernels.partition.layer import Arrays, Layer
from pallas_kernels.partition.saved import Saved, once
from pallas_kernels.partition.split import Split, WeightSplit

Program = Callable[..., Any]
"""What one device does, from the split, the layer, the arguments as a tuple and other operands."""

Specs = Callable[[Split], tuple[Any, Any]]
"""The partition specs of an operation's operands and of its results, for a split."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ffn(layer: Layer, x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, FFNStats]:
    """y and statistics of x (..., D) and the weights (F, D)."""
    return _operate(local.infer, layer, lambda split: ((split.arguments,), split.outputs), (x, *weights))


def _forward(layer, *arguments):
    arguments, weights = primals(arguments)
    arguments = once(arguments)
    _, like = jax.eval_shape(layer.forward, arguments)
    if not _is_hidden(like, arguments):
        return ffn(layer, *arguments), Saved(arguments, (), Fact.of(weights))

    def specs(split):
        return (split.arguments,), (split.outputs, _hidden_specs(split, like))

    outputs, kept = _operate(_keeping_forward, layer, specs, arguments)
    return outputs, Saved(arguments, (kept,), Fact.of(weights))


def _backward(layer, saved: Saved, cotangents):
    kept, cotangents = saved.kept, once(saved.cotangents(cotangents))

    def specs(split):
        others = split.x, PartitionSpec(), *(_hidden_specs(split, k) for k in kept)
        return (split.arguments, *others), saved.wanted(split.arguments)

    program = partial(_pull_back, weights=bool(saved.weights))
    return saved.gradients(list(_operate(program, layer, specs, saved.arguments, *cotangents, *kept)))


ffn.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_hidden(kept: Any, arguments: Arrays) -> bool:
    """Whether all that a layer keeps is (M, F), over tokens and neurons."""
    x, w_up = arguments[:2]
    return all(leaf.shape == (x.size // x.shape[-1], w_up.shape[0]) for leaf in jax.tree.leaves(kept))


def _hidden_specs(split: Split, kept: Any) -> Any:
    return jax.tree.map(lambda _: split.hidden, kept)


def _keeping_forward(split: Split, layer: Layer, arguments: Arrays):
    outputs, kept = local.forward(split, layer, arguments)
    leading = arguments[0].shape[:-1]
    return outputs, jax.tree.map(lambda leaf: leaf.reshape(*leading, -1), kept)


def _pull_back(
    split: Split, layer: Layer, arguments: Arrays, dy: jax.Array, dl1: jax.Array, *kept: Any, weights: bool
) -> Arrays:
    """The cotangents from what was kept, or from nothing."""
    if kept:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), kept[0])
        gradients = local.backward(split, layer, arguments, flat, dy, dl1, weights=weights)
    else:
        gradients = local.recompute_backward(split, layer, arguments, dy, dl1, weights=weights)
    return tuple(g.astype(argument.dtype) for g, argument in zip(gradients, arguments, strict=False))


def _operate(program: Program, layer: Layer, specs: Specs, arguments: Arrays, *others: Any) -> Any:
    """The results of one operation over all devices, each of which runs ``program`` on its own operands."""
    x, *weights = arguments
    alone = Split(((),) * (x.ndim - 1), (), (WeightSplit((), ()),) * len(weights), 1)

    def whole(*operands):
        return program(alone, layer, *operands)

    operation = custom_partitioning(whole)
    operation.def_partition(
        partial(_partitioned, program, layer, specs), sharding_rule=_rule(x.ndim - 1, len(weights), specs)
    )
    mapped = custom_vmap(operation)

    @mapped.def_vmap
    def _batch(axis_size, batched, *operands):
        # custom_partitioning has no batching rule: the partitioner sees the layer's own operations here.
        results = jax.vmap(whole, jax.tree.map(lambda one: 0 if one else None, batched))(*operands)
        return results, jax.tree.map(lambda _: True, results)

    return mapped(arguments, *others)


def _partitioned(program: Program, layer: Layer, specs: Specs, mesh: Mesh, operands: Any, results: Any):
    """What ``custom_partitioning`` asks for: mesh, one device's program, how results and operands split."""
    placed = [(array.shape, array.sharding.spec) for array in operands[0]]
    split = Split.of(dict(mesh.shape), placed[0], placed[1:])
    in_specs, out_specs = specs(split)
    in_shardings, out_shardings = jax.tree.map(partial(NamedSharding, mesh), (in_specs, out_specs))
    return mesh, partial(program, split, layer), out_shardings, in_shardings


def _rule(leading: int, n_weights: int, specs: Specs) -> str:
    """Which dimensions of operands and results are split together, for the partitioner: one name each."""
    tokens = tuple((f"tokens{index}",) for index in range(leading))
    columns = tuple(WeightSplit((), (f"columns{index}",)) for index in range(n_weights))
    others = (f"other{index}" for index in itertools.count())

    def names(tree: Any) -> str:
        flat = jax.tree.leaves(tree)
        return ", ".join(" ".join(name or next(others) for name in spec) for spec in flat)

    operands, results = specs(Split(tokens, ("neurons",), columns, 1))
    return f"{names(operands)} -> {names(results)}"
