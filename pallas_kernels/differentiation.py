"""The layer of every format with its gradient: one rule, which asks the format for a forward and a backward.

A format's module has three functions, over local arrays of one type: ``infer`` for a call that is not
differentiated, ``forward`` that also gives what is kept, and ``backward`` from that. Here stands what they
share: weights of a wider type than x's are rounded, and their gradients are not; a part of the gradient that
nobody asks for is not computed; kernels are traced with 32-bit indices whatever the caller's
``jax_enable_x64`` says; and a second derivative is refused in words.
"""

import dataclasses
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import auto, dense, hybrid, panel, twell
from pallas_kernels.common import varying_axes
from pallas_kernels.common.groups import Groups, token_scale
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.reference import Weights

_FORMATS: dict[str, ModuleType] = {
    "auto": auto,
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
class _Saved:
    """What a backward needs: the arguments as they came, what the format kept, and whether any weight is
    differentiated."""

    arguments: Weights
    kept: Any
    weights: bool = dataclasses.field(metadata={"static": True})


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def layer(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array, call: LayerCall
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer: as `reference.ffn`, for x (M, D) and weights (F, D) of x's type or f32."""
    with jax.enable_x64(False):
        arguments = dense.rounded(x, w_gate, w_up, w_down)
        outputs = _FORMATS[call.format].infer(*arguments, call.options, call.backend, call.groups)
        return varying_axes.vary_with(x, outputs)


def _forward(x, w_gate, w_up, w_down, call):
    saved = jax.tree.map(lambda argument: argument.value, (x, w_gate, w_up, w_down), is_leaf=_is_primal)
    weights = any(weight.perturbed for weight in (w_gate, w_up, w_down) if weight is not None)
    with jax.enable_x64(False):
        arguments = dense.rounded(*saved)
        if call.format != "dense":
            arguments = _differentiated_once(arguments)
        outputs, kept = _FORMATS[call.format].forward(*arguments, call.options, call.backend, call.groups)
    # Constants too: `layer` gives what varies over the same axes.
    outputs = varying_axes.vary_with(arguments[0], outputs)
    return outputs, _Saved(saved, None if kept is None else kept.named(), weights)


def _is_primal(value):
    return hasattr(value, "perturbed")


def _backward(call, saved: _Saved, cotangents):
    """Cotangents of x and the weights, each in its own type, from those of y and l1."""
    dy, dl1 = cotangents[0], cotangents[1].l1
    x, dtype = saved.arguments[0], saved.arguments[2].dtype
    with jax.enable_x64(False):
        scale = None if isinstance(dl1, SymbolicZero) else token_scale(dl1, x.shape[0], call.groups)
        if isinstance(dy, SymbolicZero):
            dy = jnp.zeros_like(x)
        arguments = dense.rounded(*saved.arguments)
        if call.format != "dense":
            arguments, dy, scale = _differentiated_once((arguments, dy, scale))
        dx, *weights = _FORMATS[call.format].backward(
            *arguments, saved.kept, dy, scale, call.options, call.backend, dtype=dtype, weights=saved.weights
        )
    return (dx, *(weights if saved.weights else (None, None, None)))


layer.defvjp(_forward, _backward, symbolic_zeros=True)


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
