"""Argument errors of the public calls: what was expected, what was found, what to do."""

import jax
import jax.numpy as jnp

from pallas_kernels.options import FFNOptions

_F32 = jnp.dtype(jnp.float32)
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_ffn_arguments(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions = FFNOptions(),  # noqa: B008 - frozen
) -> None:
    """Checks x (..., D) and the neuron-major weights (F, D) of one feed-forward call.

    Raises:
      TypeError: options are no FFNOptions, an argument is no array, x is not bf16, f16 or f32, or the weights
        do not share one type, x's or f32.
      ValueError: ranks or sizes do not fit, a weight looks transposed, f32 gradients are asked of other
        weights, or an activation of two projections of a layer that has one.
    """
    if not isinstance(options, FFNOptions):
        raise TypeError(
            f"options must be FFNOptions, such as FFNOptions(format='panel'); got {type(options).__name__}: "
            "pass FFNOptions(), or leave it out for the defaults"
        )
    weights = {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    named = {"x": x} | {name: w for name, w in weights.items() if w is not None}
    for name, value in named.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise TypeError(f"{name} must be an array; got {type(value).__name__}")
        if hasattr(value, "__jax_array__") and not isinstance(value, jax.Array):
            raise TypeError(
                f"{name} must be an array; got {type(value).__name__}, which holds one: pass that, in Flax "
                f"NNX {name}[...]"
            )
    if x.ndim < 1:
        raise ValueError(f"x must have shape (..., D) with at least one axis; got {_shape(x)}")
    for name, value in named.items():
        if name != "x" and value.ndim != 2:
            raise ValueError(f"{name} must have shape (F, D), one row a neuron; got {_shape(value)}")
    d_model, d_ff = x.shape[-1], w_up.shape[0]
    for name, value in named.items():
        if name == "x" or value.shape == (d_ff, d_model):
            continue
        if value.shape[0] == d_model and value.shape[1] != d_model:
            raise ValueError(
                f"{name} must be neuron-major, (F, D) with D={d_model} as in x; got {_shape(value)}, which "
                f"looks like (D, F): pass {name}.T"
            )
        raise ValueError(
            f"{name} must have shape (F, D) = ({d_ff}, {d_model}), D from x {_shape(x)} and F from "
            f"w_up {_shape(w_up)}; got {_shape(value)}"
        )
    if d_model == 0 or d_ff == 0:
        raise ValueError(f"D and F must be at least 1; got D={d_model}, F={d_ff}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be bfloat16, float16 or float32; got {x.dtype}")
    for name, value in named.items():
        if name != "x" and value.dtype != w_up.dtype:
            raise TypeError(
                f"all weights must share one dtype; got w_up {w_up.dtype} and {name} {value.dtype}: "
                f"cast one of them"
            )
    if w_up.dtype not in (x.dtype, _F32):
        raise TypeError(
            f"weights must have x's dtype, or float32 as master weights; got x {x.dtype} and "
            f"w_up {w_up.dtype}: cast one of them"
        )
    if w_gate is None and options.rule.rectified_up:
        raise ValueError(
            f"activation={options.activation!r} rectifies the gate and the up projection, and sparse_mlp has "
            "no gate: use 'relu'"
        )
    if options.weight_gradients == "float32" and w_up.dtype != _F32:
        raise ValueError(
            f"weight_gradients='float32' needs float32 weights: JAX gives a gradient its argument's dtype; "
            f"got w_up {w_up.dtype}: pass float32 master weights (x may stay {x.dtype}), or take 'auto'"
        )


def _shape(value: jax.Array) -> str:
    return f"({', '.join(map(str, value.shape))})"
