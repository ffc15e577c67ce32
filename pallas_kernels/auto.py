"""``format="auto"`` on a GPU: the program itself finds out, call by call, whether sparsity pays.

A probe computes the gates of one panel of tokens in sixteen, and of four at most, and counts the neurons that
each of them activates: one in a hundred of the gate stage's FLOPs at 65,536 tokens.

A conditional then runs the PanelELL layer or the dense one (under ``vmap`` over the weights it is no longer
one: both run). Both are exact, so the decision is about how long a call takes and never about what it gives,
and it is part of the compiled program. With a driver of CUDA 12.3 or newer the host is not asked: XLA records
the conditional in a CUDA graph. In a trace of eight layers on one NVIDIA H100 (JAX 0.11.2, 16,384 tokens) the
call returned after 0.9 of 7.4 ms and the device stood still for 5 to 12 µs at each conditional, 32 at the
first; the same layers without one had no gap above 0.3 µs. Where layers are short the host is what a call
waits for, and a conditional costs it some 50 µs. On Hopper most forwards are not asked about, but are
PanelELL (`panel.unasked`).

A call that is differentiated and too small for a probe is dense.

Between forward and backward either layer keeps the gate and the up projection, in the same buffers: PanelELL
over its slots, of which there are as many as (token, neuron) pairs, the dense layer over all pairs. So a
training step costs no more memory than the dense layer, and no more time than it and the probe;
``format="panel"`` is what saves memory.

With ``block_tokens`` a forward without a gradient runs over blocks of tokens in both branches, since a
conditional takes the memory of the larger one. The probe decides once for all of them: a decision a block
would be a conditional a block. On Hopper the host waits for that decision: the gate stage reads each block of
x where it stands, and XLA (JAX 0.11.2) records no call on part of an array in a CUDA graph. A copy of the
block would be recorded, in a third more temporary memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import dense, device, panel, reference
from pallas_kernels.common import varying_axes
from pallas_kernels.common.groups import Groups
from pallas_kernels.common.platforms import where_kernels_run
from pallas_kernels.dense import blocks
from pallas_kernels.dense.layer import Projections
from pallas_kernels.options import Auto, FFNOptions, FFNStats, Panel
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.layer import Residuals, empty
from pallas_kernels.panel.unasked import is_unasked
from pallas_kernels.reference import Weights

_PROBES, _PANELS_EACH = 4, 16
_GOLDEN = 0.6180339887498949


def pays(x: jax.Array, w_gate: jax.Array, options: FFNOptions, share: float) -> jax.Array:
    """() bool: whether panels of x (M, D) activate under ``share`` of the neurons of w_gate (F, D), on a
    sample."""
    tokens = _layout(options).tokens
    starts = [nth * tokens for nth in _probed(x.shape[0] // tokens)]
    sample = jnp.concatenate([lax.slice_in_dim(x, start, start + tokens) for start in starts])
    active = options.rule.active(reference.project(sample, w_gate)).reshape(len(starts), tokens, -1)
    return jnp.mean(jnp.any(active, axis=1), dtype=jnp.float32) < share


def _probed(n_panels: int) -> list[int]:
    """Which panels to look at.

    Multiples of the golden ratio spread them over the call, and at none of its simple fractions: there
    sequences begin, and their first tokens activate far more neurons than others.
    """
    count = min(_PROBES, max(1, n_panels // _PANELS_EACH))
    return [int(n_panels * (nth * _GOLDEN % 1)) for nth in range(1, count + 1)]


def _layout(options: FFNOptions) -> Auto:
    layout = options.layout
    assert isinstance(layout, Auto)
    return layout


def _as_panel(options: FFNOptions) -> FFNOptions:
    """The options of the PanelELL layer with room for every pair."""
    layout = _layout(options)
    panels = Panel(tokens=layout.tokens, capacity=1.0, block_tokens=layout.block_tokens)
    return dataclasses.replace(options, format=panels)


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer, PanelELL or dense: as `reference.ffn`, for x (M, D) of at least a panel and
    weights (F, D) of one type."""
    block_tokens = _layout(options).block_tokens
    share = configs.break_even(device.current(), backend, gated=w_gate is not None).forward

    def sparse(x, w_gate, w_up, w_down):
        outputs = panel.infer(x, w_gate, w_up, w_down, _as_panel(options), backend, groups)
        return varying_axes.vary_with(x, outputs)

    def instead(x, w_gate, w_up, w_down):
        outputs = blocks.infer(x, w_gate, w_up, w_down, options, groups, block_tokens=block_tokens)
        return varying_axes.vary_with(x, outputs)

    def probe(x, w_gate, w_up, w_down):
        decision = pays(x, w_up if w_gate is None else w_gate, options, share)
        return lax.cond(decision, sparse, instead, x, w_gate, w_up, w_down)

    gated = w_gate is not None
    if groups is None and is_unasked(x, w_up, _layout(options), backend, gated=gated):
        return where_kernels_run(sparse, instead, backend, x, w_gate, w_up, w_down)
    if _too_small_for_a_probe(x, backend):
        return instead(x, w_gate, w_up, w_down)
    return where_kernels_run(probe, instead, backend, x, w_gate, w_up, w_down)


def _too_small_for_a_probe(x: jax.Array, backend: str) -> bool:
    return x.shape[0] < configs.LEAST_PROBED_TOKENS and backend != "interpret"


def forward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[tuple[jax.Array, FFNStats], Residuals | Projections]:
    """`infer`, and what either layer keeps, in the same buffers; the dense layer's projections where no other
    layer is considered."""
    if _too_small_for_a_probe(x, backend):
        return dense.forward(x, w_gate, w_up, w_down, options, "xla", groups)

    def sparse(x, w_gate, w_up, w_down):
        outputs = panel.forward(x, w_gate, w_up, w_down, _as_panel(options), backend, groups)
        return varying_axes.vary_with(x, outputs)  # constants too: a conditional's branches vary alike

    def instead(x, w_gate, w_up, w_down):
        like = jax.eval_shape(sparse, x, w_gate, w_up, w_down)[1]
        outputs, (gate, up) = dense.forward(x, w_gate, w_up, w_down, options, "xla", groups)
        kept = _into(gate, like.gate), None if up is None else _into(up, like.up)
        residuals = Residuals(jnp.zeros((), bool), empty(like.lists), *kept)
        return varying_axes.vary_with(x, (outputs, residuals))

    share = configs.break_even(device.current(), backend, gated=w_gate is not None).train

    def probe(x, w_gate, w_up, w_down):
        decision = pays(x, w_up if w_gate is None else w_gate, options, share)
        return lax.cond(decision, sparse, instead, x, w_gate, w_up, w_down)

    return where_kernels_run(probe, instead, backend, x, w_gate, w_up, w_down)


def _into(values: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Values in the first elements of an array of another shape."""
    flat = values.reshape(-1)
    return jnp.pad(flat, (0, like.size - flat.size)).reshape(like.shape)


def _out_of(values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """What `_into` put there."""
    return values.reshape(-1)[: shape[0] * shape[1]].reshape(shape)


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    kept: Residuals | Projections,
    dy: jax.Array,
    scale: jax.Array | None,
    options: FFNOptions,
    backend: str,
    *,
    dtype: DTypeLike,
    weights: bool = True,
) -> Weights:
    """Cotangents of x and, in ``dtype``, the weights (None where not asked for), by the layer that ran."""
    arguments = x, w_gate, w_up, w_down

    def densely(projections, dy, scale):
        dx, *gradients = dense.backward(*arguments, projections, dy, scale, options, "xla", dtype=dtype)
        return (dx, *(gradients if weights else (None, None, None)))

    if isinstance(kept, Projections):
        return densely(kept, dy, scale)

    def sparse(kept, dy, scale):
        return panel.backward(
            *arguments, kept, dy, scale, _as_panel(options), backend, dtype=dtype, weights=weights
        )

    def instead(kept, dy, scale):
        shape = (x.shape[0], w_up.shape[0])
        up = None if kept.up is None else _out_of(kept.up, shape)
        return densely(Projections(_out_of(kept.gate, shape), up), dy, scale)

    def as_decided(kept, dy, scale):
        return lax.cond(kept.fits, sparse, instead, kept, dy, scale)

    return where_kernels_run(as_decided, instead, backend, kept, dy, scale)
