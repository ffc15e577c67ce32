"""The layer of every format with its gradient: one rule, which asks the format for a forward and a backward.

A format's module has three functions, over local arrays of one type: ``infer`` for a call that is not
differentiated, ``forward`` that also gives what is kept, and ``backward`` from that. Here stands what they
share: weights of a wider type than x's are rounded, and their gradients are not; a part of the gradient that
nobody asks for is not computed; kernels are traced with 32-bit indices whatever the caller's
``jax_enable_x64`` says; and a second derivative is refused in words.

What a format does is a ``jit`` of its own, which XLA inlines: the layers of a model that are alike share one
trace and one lowering of their kernels, which take seconds a layer.
"""

import dataclasses
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import auto, decode, dense, hybrid, panel, twell
from pallas_kernels.common import varying_axes
from pallas_kernels.common.groups import Groups, token_scale
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.reference import Weights

_FORMATS: dict[str, ModuleType] = {
    "auto": auto,
    "decode": decode,
    "dense": dense,
    "hybrid": hybrid,
    "panel": panel,
    "twell": twell,
}


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """What is fixed of a call while it is traced.

    Attributes:
      options: of the public call.
      format, backend: the path that `dispatch` chose.
      groups: None, or of how many calls that run as one the statistics are wanted.
    """

    options: FFNOptions
    format: str
    backend: str
    groups: Groups = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fact:
    """A truth that a forward finds while it is traced and its backward asks for.

    It is carried by the shape of an empty array, (0, 1) or (0, 0), and not by a static field. JAX traces a
    forward once for each choice of arguments that are differentiated, but keeps the tree of what is saved,
    with its static fields, of the last such trace alone: a backward may be handed the tree of another one.
    """

    empty: jax.Array

    @classmethod
    def of(cls, value: bool) -> "Fact":
        return cls(jnp.zeros((0, int(value)), jnp.uint8))

    def __bool__(self) -> bool:
        return bool(self.empty.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a backward needs: the arguments as they came, what the format kept, and whether any weight is
    differentiated."""

    arguments: Weights
    kept: Any
    weights: Fact


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def layer(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array, call: LayerCall
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer: as `reference.ffn`, for x (M, D) and weights (F, D) of x's type or f32."""
    return infer((x, w_gate, w_up, w_down), call)


def _forward(x, w_gate, w_up, w_down, call):
    arguments, weights = primals((x, w_gate, w_up, w_down))
    once = arguments if call.format == "dense" else _differentiated_once(arguments)
    outputs, kept = forward(once, call)
    return outputs, _Saved(arguments, kept, Fact.of(weights))


def _backward(call, saved: _Saved, cotangents):
    """Cotangents of x and the weights, each in its own type, from those of y and l1."""
    dy, dl1 = cotangents[0], cotangents[1].l1
    dy = as_array(dy, saved.arguments[0])
    operands = saved.arguments, dy, None if isinstance(dl1, SymbolicZero) else dl1
    arguments, dy, dl1 = operands if call.format == "dense" else _differentiated_once(operands)
    wanted = bool(saved.weights)
    dx, *weights = backward(arguments, saved.kept, dy, dl1, call, weights=wanted)
    return (dx, *(weights if wanted else (None, None, None)))


layer.defvjp(_forward, _backward, symbolic_zeros=True)


def infer(arguments: Weights, call: LayerCall) -> tuple[jax.Array, FFNStats]:
    """The layer as it is where nothing is differentiated."""
    with jax.enable_x64(False):
        return varying_axes.vary_with(arguments[0], sparse_ffn_infer(arguments, call))


def forward(arguments: Weights, call: LayerCall) -> tuple[tuple[jax.Array, FFNStats], Any]:
    """The layer, and what its format keeps for `backward`, under the names by which a policy may save it."""
    with jax.enable_x64(False):
        outputs, kept = sparse_ffn_forward(arguments, call)
    # Constants too: `infer` gives what varies over the same axes.
    outputs = varying_axes.vary_with(arguments[0], outputs)
    return outputs, None if kept is None else kept.named()


def backward(
    arguments: Weights, kept: Any, dy: jax.Array, dl1: jax.Array | None, call: LayerCall, *, weights: bool
) -> Weights:
    """Cotangents of the arguments, each in its own type; the weights' are None unless they are wanted."""
    with jax.enable_x64(False):
        return sparse_ffn_backward(arguments, kept, dy, dl1, call, weights)


# Profilers show these names.
@partial(jax.jit, static_argnums=1)
def sparse_ffn_infer(arguments, call):
    rounded = dense.rounded(*arguments)
    return _FORMATS[call.format].infer(*rounded, call.options, call.backend, call.groups)


@partial(jax.jit, static_argnums=1)
def sparse_ffn_forward(arguments, call):
    rounded = dense.rounded(*arguments)
    return _FORMATS[call.format].forward(*rounded, call.options, call.backend, call.groups)


@partial(jax.jit, static_argnums=(4, 5))
def sparse_ffn_backward(arguments, kept, dy, dl1, call, weights):
    x, dtype = arguments[0], arguments[2].dtype
    scale = None if dl1 is None else token_scale(dl1, x.shape[0], call.groups)
    rounded = dense.rounded(*arguments)
    return _FORMATS[call.format].backward(
        *rounded, kept, dy, scale, call.options, call.backend, dtype=dtype, weights=weights
    )


def primals(arguments: Any) -> tuple[Any, bool]:
    """The values among what ``symbolic_zeros`` hands to a forward, and whether any but the first is
    differentiated."""
    values = jax.tree.map(lambda argument: argument.value, arguments, is_leaf=_is_primal)
    return values, any(weight.perturbed for weight in arguments[1:] if weight is not None)


def _is_primal(value):
    return hasattr(value, "perturbed")


def as_array(cotangent: jax.Array | SymbolicZero, like: jax.Array) -> jax.Array:
    """A cotangent, also one that is known to be zero, as an array like the one it belongs to."""
    return jnp.zeros_like(like) if isinstance(cotangent, SymbolicZero) else cotangent


@jax.custom_jvp
def _differentiated_once(arrays):
    """The arrays themselves; to differentiate what is made of them is an error."""
    return arrays


@_differentiated_once.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "sparse_ffn and sparse_mlp are differentiated once, in reverse mode: the kernels have no derivative "
        "of their gradient; where a second derivative is needed, use FFNOptions(format='dense')"
    )
