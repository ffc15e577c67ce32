"""The dense layer by XLA: a forward that keeps its projections, and a backward from them or from nothing.

The sparse layers go here where sparsity does not pay or does not fit. Numerics are the reference's; weight
gradients are f32 sums, rounded once to the type asked for.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import reference
from pallas_kernels.activations import Rule
from pallas_kernels.common.groups import Groups, by_group
from pallas_kernels.common.products import multiply
from pallas_kernels.options import Dense, FFNOptions, FFNStats
from pallas_kernels.reference import Weights


class Projections(NamedTuple):
    """What the dense layer keeps between forward and backward.

    Attributes:
      gate, up: (M, F) in x's type; up is None without a gate projection.
    """

    gate: jax.Array
    up: jax.Array | None

    def named(self) -> "Projections":
        """As it is: a remat policy keeps nothing of the dense layer."""
        return self


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[jax.Array, FFNStats]:
    """`reference.ffn` for x (M, D) and weights (F, D) of x's type, by XLA on any device."""
    return forward(x, w_gate, w_up, w_down, options, backend, groups)[0]


def forward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[tuple[jax.Array, FFNStats], Projections]:
    """`reference.ffn`, and the projections that `backward` takes."""
    gate, up = reference.projections(x, w_gate, w_up)
    h, mask = reference.hidden(gate, up, options.rule)
    y = multiply(h, w_down)
    layout = options.layout
    stats_of = partial(FFNStats.of_dense, panel=layout.tokens if isinstance(layout, Dense) else 0)
    if groups is None:
        return (y, stats_of(h, mask)), Projections(gate, up)
    stats = jax.vmap(stats_of)(by_group(h, groups), by_group(mask, groups))
    return (y, stats), Projections(gate, up)


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    kept: Projections,
    dy: jax.Array,
    scale: jax.Array | None,
    options: FFNOptions,
    backend: str,
    *,
    dtype: DTypeLike,
    weights: bool = True,
) -> Weights:
    """`reference.backward` from the kept projections; XLA leaves out what nobody asks for."""
    return reference.backward(x, w_gate, w_up, w_down, *kept, dy, scale, rule=options.rule, dtype=dtype)


def recompute_backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    dy: jax.Array,
    scale: jax.Array | None,
    *,
    rule: Rule,
    dtype: DTypeLike,
) -> Weights:
    """`reference.backward` of a call of which nothing was kept."""
    projections = reference.projections(x, w_gate, w_up)
    return reference.backward(x, w_gate, w_up, w_down, *projections, dy, scale, rule=rule, dtype=dtype)


def rounded(x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array) -> Weights:
    """The arguments as the layer computes with them: all in x's type."""
    cast = partial(jnp.asarray, dtype=x.dtype)
    return cast(x), None if w_gate is None else cast(w_gate), cast(w_up), cast(w_down)


def token_hits(x: jax.Array, gate_weight: jax.Array, rule: Rule, groups: Groups) -> jax.Array:
    """(groups, F) int32, for how many tokens of each group a neuron is active: a gate product of its own,
    which XLA leaves out where nobody reads these hits."""
    mask = rule.active(reference.project(x, gate_weight))
    return jnp.sum(by_group(mask, groups), axis=-2, dtype=jnp.int32)
