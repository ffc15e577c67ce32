"""The layer as one primitive, so that ``vmap`` over tokens with shared weights is one call over all of them.

A layer that is written for one token and mapped over many (as Equinox users write it) runs the same kernels
as a batched one, ``format="auto"`` decides once for all, and a gradient adds up over the mapped axis inside
the kernels. Mapped weights, as of experts, are mapped kernel by kernel.

`jax.custom_batching.custom_vmap` has no reverse-mode derivative, so this is a primitive of its own: it
carries the traced layer, whose ``custom_vjp`` its derivative leaves to do the work.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from pallas_kernels import dispatch
from pallas_kernels.common.groups import Groups
from pallas_kernels.differentiation import LayerCall, layer
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.reference import Weights


class _Layer(Primitive):
    multiple_results = True

    def to_lojax(self, *arrays: Any, **params: Any) -> list[jax.Array]:
        """JAX 0.12 counts a traced ``custom_vjp`` as a high-level operation, and asks whatever holds one how
        to do without: as the layer itself does."""
        return _run(*arrays, **params)


_layer_p = _Layer("sparse_ffn")


def apply(arguments: Weights, options: FFNOptions, groups: Groups = None) -> tuple[jax.Array, FFNStats]:
    """`differentiation.layer` of x (M, D) and weights (F, D), on the path that `dispatch` chooses for so many
    tokens, under every transformation."""
    choice = dispatch.choose(options, dispatch.Call.of(arguments[0], arguments[2]))
    call = LayerCall(options, choice.layout.name, choice.backend, groups)
    gated = arguments[1] is not None
    arrays = [array for array in arguments if array is not None]
    traced = jax.make_jaxpr(partial(_flat, call=call, gated=gated))(*arrays)
    y, *leaves = _layer_p.bind(*arrays, traced=traced, call=call, gated=gated)
    return y, FFNStats(*leaves)


def _flat(*arrays: jax.Array, call: LayerCall, gated: bool) -> list[jax.Array]:
    x, *w_gate, w_up, w_down = arrays
    y, stats = layer(x, w_gate[0] if gated else None, w_up, w_down, call)
    return [y, *_leaves(stats)]


def _leaves(stats: FFNStats) -> list[jax.Array]:
    return [getattr(stats, field.name) for field in dataclasses.fields(stats)]


def _run(*arrays: jax.Array, traced: ClosedJaxpr, call: LayerCall, gated: bool) -> list[jax.Array]:
    return jaxpr_as_fun(traced)(*arrays)


def _jvp(primals, tangents, *, traced, call, gated):
    """The layer's own derivative, in the arguments that are differentiated."""
    differentiated = [type(tangent) is not ad.Zero for tangent in tangents]

    def function(*values):
        remaining = iter(values)
        chosen = [next(remaining) if d else p for d, p in zip(differentiated, primals, strict=True)]
        return jaxpr_as_fun(traced)(*chosen)

    def pick(items):
        return [item for item, d in zip(items, differentiated, strict=True) if d]

    return jax.jvp(function, pick(primals), pick(tangents))


def _batch(arrays, axes, *, traced, call, gated):
    (x, *weights), (x_axis, *weight_axes) = arrays, axes
    if x_axis is None or any(axis is not None for axis in weight_axes):
        mapped = jax.vmap(jaxpr_as_fun(traced), in_axes=tuple(axes))
        outputs = mapped(*arrays)
        return outputs, [0] * len(outputs)
    x = jnp.moveaxis(x, x_axis, 0)
    size, tokens, d_model = x.shape
    groups = size * (call.groups or 1)
    weights = [None, *weights] if not gated else weights
    y, stats = apply((x.reshape(-1, d_model), *weights), call.options, groups)
    if call.groups is not None:
        stats = jax.tree.map(lambda leaf: leaf.reshape(size, call.groups, *leaf.shape[1:]), stats)
    outputs = [y.reshape(size, tokens, d_model), *_leaves(stats)]
    return outputs, [0] * len(outputs)


_layer_p.def_impl(_run)
_layer_p.def_abstract_eval(lambda *arrays, traced, call, gated: list(traced.out_avals))
mlir.register_lowering(_layer_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[_layer_p] = _jvp
batching.primitive_batchers[_layer_p] = _batch
