"""The PanelELL layer and its backward, written by hand.

Exactness. Without a gradient to compute, the lists have room for every neuron of every panel, so nothing can
overflow. Between forward and backward they have ``FFNOptions.capacity`` of that: a call that needs more is
known to after its gate stage, takes the dense path inside the same program, block by block of tokens, and
keeps nothing; so does its backward.

Backward, from dy (M, D) and the cotangent dl1 of l1, over the slots of each panel's list:

    dh  = dy Wd^T + sign(h) dl1 / M     where the gate is active       panel_dh
    dg  = dh u        du = dh g                                        panel_dh
    dx  = dg Wg + du Wu                                                panel_down with two terms
    dWg = dg^T x      dWu = du^T x      dWd = h^T dy                   panel_dw

Without a gate, g is h: dx = dh Wu and dWu = dh^T x. The counters have no gradient.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dense, reference
from pallas_kernels.common import varying_axes
from pallas_kernels.dense import blocks
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.config import PanelConfig
from pallas_kernels.panel.pallas_triton import gate_panel, panel_down, panel_up
from pallas_kernels.panel.pallas_triton_backward import panel_dh
from pallas_kernels.panel.pallas_triton_lists import (
    Counts,
    GatePanel,
    Lists,
    build_lists,
    count_active,
    n_chunks,
)
from pallas_kernels.panel.pallas_triton_weights import panel_dw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What is kept between forward and backward, besides the call's own arguments.

    Attributes:
      fits: () bool, whether the lists had room: if not, the other fields mean nothing.
      lists: the panels' neurons.
      gate, up: (n_slots, P) in x's type; without a gate, h and None.
    """

    fits: jax.Array
    lists: Lists
    gate: jax.Array
    up: jax.Array | None

    def named(self) -> "Residuals":
        """The same under names by which a remat policy may keep them."""
        return Residuals(
            fits=checkpoint_name(self.fits, "sparse_ffn_lists"),
            lists=jax.tree.map(partial(checkpoint_name, name="sparse_ffn_lists"), self.lists),
            gate=checkpoint_name(self.gate, "sparse_ffn_gate"),
            up=None if self.up is None else checkpoint_name(self.up, "sparse_ffn_up"),
        )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ffn(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer through PanelELL: as `reference.ffn`, for x (M, D) and weights (F, D).

    Weights of a wider type than x's are rounded to it; their gradients are not.
    ``backend`` runs the gate: ``"mosaic_gpu"``, ``"triton"`` or ``"interpret"``; the rest is Triton's,
    interpreted or not.
    """
    x, w_gate, w_up, w_down = dense.rounded(x, w_gate, w_up, w_down)
    tokens = x.shape[0]
    if tokens == 0:
        return reference.ffn(x, w_gate, w_up, w_down)
    config = configs.choose(x, w_up, options)
    interpret = backend == "interpret"
    gate_weight, up_weight = _roles(w_gate, w_up)
    gate = gate_stage(x, gate_weight, config, backend)
    counts = count_active(gate, d_ff=w_up.shape[0], interpret=interpret)
    lists, _ = build_lists(gate, counts, chunk=config.chunk, interpret=interpret)
    hidden = panel_up(gate, lists, x, up_weight, config=config.up, interpret=interpret)
    y = panel_down([(hidden.h, w_down)], lists, tokens=tokens, config=config.down, interpret=interpret)
    return y, _stats(counts, hidden.l1, tokens, jnp.zeros((), jnp.int32))


def _roles(w_gate: jax.Array | None, w_up: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The weight whose product is rectified, and the up projection's, None without a gate."""
    return (w_up, None) if w_gate is None else (w_gate, w_up)


def gate_stage(x: jax.Array, weight: jax.Array, config: PanelConfig, backend: str) -> GatePanel:
    """The gate stage of x (M, D) and weight (F, D) on a backend."""
    if backend == "mosaic_gpu":
        from pallas_kernels.panel import pallas_mosaic_gpu

        return pallas_mosaic_gpu.gate_panel(x, weight)
    return gate_panel(x, weight, panel=config.panel, config=config.gate, interpret=backend == "interpret")


def _stats(counts: Counts, l1: jax.Array, tokens: int, overflow_rows: jax.Array) -> FFNStats:
    return FFNStats(
        l1=l1 / tokens,
        l0=jnp.sum(counts.gates, dtype=jnp.float32) / tokens,
        neuron_hits=jnp.sum(counts.hits, axis=0, dtype=jnp.int32),
        max_nnz=jnp.max(counts.most),
        overflow_rows=overflow_rows,
    )


def forward(x, w_gate, w_up, w_down, options: FFNOptions, backend: str):
    """The layer and what its backward needs: ((y, stats), (arguments, Residuals, None without a token))."""
    saved = (x, w_gate, w_up, w_down)
    arguments = x, w_gate, w_up, w_down = dense.rounded(*saved)
    tokens, d_ff = x.shape[0], w_up.shape[0]
    if tokens == 0:
        return reference.ffn(*arguments), (saved, None)
    config = configs.choose(x, w_up, options)
    interpret = backend == "interpret"
    gate_weight, up_weight = _roles(w_gate, w_up)
    gate = gate_stage(x, gate_weight, config, backend)
    chunks = n_chunks(gate.values.shape[0], d_ff, config.chunk)
    room = max(1, round(chunks * options.capacity))
    counts = count_active(gate, d_ff=d_ff, interpret=interpret)
    lists, needed = build_lists(gate, counts, chunk=config.chunk, room=room, interpret=interpret)

    def sparse(gate, lists):
        hidden = panel_up(gate, lists, x, up_weight, config=config.up_keep, keep=True, interpret=interpret)
        y = panel_down([(hidden.h, w_down)], lists, tokens=tokens, config=config.down, interpret=interpret)
        return y, hidden.l1, (hidden.h, None) if up_weight is None else (hidden.gate, hidden.up)

    def instead(gate, lists):
        like = jax.eval_shape(sparse, gate, lists)[2]
        return *blocks.forward(*arguments), varying_axes.vary_with(x, empty(like))

    fits, listed = needed <= room, lists
    if room == chunks:
        y, l1, kept = sparse(gate, listed)
    else:
        listed = lists.only_if(fits)
        y, l1, kept = lax.cond(fits, sparse, instead, gate, listed)
    overflow_rows = jnp.where(fits, 0, tokens).astype(jnp.int32)
    return (y, _stats(counts, l1, tokens, overflow_rows)), (saved, Residuals(fits, listed, *kept).named())


def empty(like):
    """Arrays of some shapes whose values nobody reads."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def pull_back(
    arguments: dense.Weights,
    residuals: Residuals,
    dy,
    dl1,
    options: FFNOptions,
    backend: str,
    *,
    dtype: jax.typing.DTypeLike,
) -> dense.Weights:
    """Cotangents of x and, in ``dtype``, the weights from those of y (M, D) and l1, where the lists had room.

    All of ``arguments`` are of x's type.
    """
    x, w_gate, w_up, w_down = arguments
    config, interpret = configs.choose(x, w_up, options), backend == "interpret"
    lists, (gate_weight, up_weight) = residuals.lists, _roles(w_gate, w_up)
    scale = (dl1 / x.shape[0]).astype(x.dtype).astype(jnp.float32).reshape(1)
    kept = residuals.gate, residuals.up
    gradients = panel_dh(*kept, lists, dy, w_down, scale, config=config.dh, interpret=interpret)
    terms = [(gradients.gate, gate_weight)]
    if up_weight is not None and gradients.up is not None:
        terms.append((gradients.up, up_weight))
    dx = panel_down(terms, lists, tokens=x.shape[0], config=config.dx, interpret=interpret, name="panel_dx")
    weights = panel_dw(
        gradients,
        residuals.gate,
        lists,
        x,
        dy,
        hot_config=config.dw,
        rare_config=config.rare,
        dtype=dtype,
        interpret=interpret,
    )
    return dx, *weights


def backward(options: FFNOptions, backend: str, saved, cotangents) -> dense.Weights:
    """The cotangents of x and the weights, each in its own type; the counters have none."""
    arguments, dtype = dense.rounded(*saved[0]), saved[0][2].dtype
    residuals: Residuals | None = saved[1]
    dy, dl1 = cotangents[0], cotangents[1].l1
    if residuals is None:
        return dense.recompute_backward(*arguments, dy, dl1, dtype=dtype)

    def sparse(residuals, dy, dl1):
        return pull_back(arguments, residuals, dy, dl1, options, backend, dtype=dtype)

    def instead(residuals, dy, dl1):
        return blocks.backward(*arguments, dy, dl1, dtype=dtype)

    if options.capacity == 1:
        return sparse(residuals, dy, dl1)
    return lax.cond(residuals.fits, sparse, instead, residuals, dy, dl1)


ffn.defvjp(forward, backward)
