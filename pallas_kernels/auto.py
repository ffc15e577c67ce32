"""``format="auto"`` on a GPU: the program itself finds out, call by call, whether sparsity pays.

A probe computes the gates of one panel of tokens in sixteen, and of four at most, and counts the neurons that
each of them activates: one in a hundred of the gate stage's FLOPs at 65,536 tokens. A conditional then runs
the PanelELL layer or the dense one (under ``vmap`` it is no longer one: both run). Both are exact, so the
probe decides how long a call takes and never what it gives; it is part of the compiled program, and the host
is not asked.

Between forward and backward either layer keeps the gate and the up projection, in the same buffers: PanelELL
over its slots, of which there are as many as (token, neuron) pairs, the dense layer over all pairs. So a
training step costs no more memory than the dense layer, and no more time than it and the probe;
``format="panel"`` is what saves memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dense as dense_layer
from pallas_kernels import panel, reference
from pallas_kernels.common import varying_axes
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import layer as panel_vjp

_PROBES, _PANELS_EACH = 4, 16
_GOLDEN = 0.6180339887498949


def pays(x: jax.Array, w_gate: jax.Array, panel_tokens: int, direction: str) -> jax.Array:
    """() bool: whether panels of x (M, D) activate few enough of the neurons of w_gate (F, D), on a sample.

    ``direction`` is ``"forward"``, or ``"train"`` for a call that is differentiated.
    """
    starts = [nth * panel_tokens for nth in _probed(x.shape[0] // panel_tokens)]
    sample = jnp.concatenate([lax.slice_in_dim(x, start, start + panel_tokens) for start in starts])
    active = reference.active(reference.project(sample, w_gate)).reshape(len(starts), panel_tokens, -1)
    return jnp.mean(jnp.any(active, axis=1), dtype=jnp.float32) < configs.BREAK_EVEN[direction]


def _probed(n_panels: int) -> list[int]:
    """Which panels to look at.

    Multiples of the golden ratio spread them over the call, and at none of its simple fractions: there
    sequences begin, and their first tokens activate far more neurons than others.
    """
    count = min(_PROBES, max(1, n_panels // _PANELS_EACH))
    return [int(n_panels * (nth * _GOLDEN % 1)) for nth in range(1, count + 1)]


def _plan(x, w_gate, w_up, options: FFNOptions, direction: str):
    """The probe's answer, and the options of the PanelELL layer with room for every pair."""
    options = FFNOptions(format="panel", panel=options.panel, capacity=1.0)
    return pays(x, w_up if w_gate is None else w_gate, options.panel, direction), options


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ffn(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer, PanelELL or dense: as `reference.ffn`,
    for x (M, D) of at least a panel, weights (F, D)."""
    arguments = dense_layer.rounded(x, w_gate, w_up, w_down)
    decision, options = _plan(*arguments[:3], options, "forward")

    def sparse(*arguments):
        return panel.ffn(*arguments, options, backend)

    return lax.cond(decision, sparse, reference.ffn, *arguments)


def _forward(x, w_gate, w_up, w_down, options, backend):
    saved = (x, w_gate, w_up, w_down)
    arguments = dense_layer.rounded(*saved)
    decision, options = _plan(*arguments[:3], options, "train")

    def sparse(x, w_gate, w_up, w_down):
        outputs, (_, residuals) = panel_vjp.forward(x, w_gate, w_up, w_down, options, backend)
        return outputs, residuals

    def dense(x, w_gate, w_up, w_down):
        like = jax.eval_shape(sparse, x, w_gate, w_up, w_down)[1]
        outputs, (gate, up) = dense_layer.forward(x, w_gate, w_up, w_down)
        kept = _into(gate, like.gate), None if up is None else _into(up, like.up)
        residuals = panel_vjp.Residuals(jnp.zeros((), bool), panel_vjp.empty(like.lists), *kept)
        # Constants too: what the other branch gives is computed.
        return varying_axes.vary_with(x, (outputs, residuals))

    outputs, residuals = lax.cond(decision, sparse, dense, *arguments)
    return outputs, (saved, residuals.named())


def _into(values: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Values in the first elements of an array of another shape."""
    flat = values.reshape(-1)
    return jnp.pad(flat, (0, like.size - flat.size)).reshape(like.shape)


def _out_of(values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """What `_into` put there."""
    return values.reshape(-1)[: shape[0] * shape[1]].reshape(shape)


def _backward(options, backend, saved, cotangents):
    arguments, dtype = dense_layer.rounded(*saved[0]), saved[0][2].dtype
    residuals: panel_vjp.Residuals = saved[1]
    x, _, w_up, _ = arguments
    options = FFNOptions(format="panel", panel=options.panel, capacity=1.0)

    def sparse(residuals, dy, dl1):
        return panel_vjp.pull_back(arguments, residuals, dy, dl1, options, backend, dtype=dtype)

    def dense(residuals, dy, dl1):
        shape = (x.shape[0], w_up.shape[0])
        gate, up = residuals.gate, residuals.up
        kept = _out_of(gate, shape), None if up is None else _out_of(up, shape)
        return dense_layer.backward(*arguments, *kept, dy, dl1, dtype=dtype)

    return lax.cond(residuals.fits, sparse, dense, residuals, cotangents[0], cotangents[1].l1)


ffn.defvjp(_forward, _backward)
