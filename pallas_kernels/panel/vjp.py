"""The PanelELL layer and its backward, written by hand.

Exactness. Without a gradient to compute, the lists have room for every neuron of every panel, so nothing can
overflow. Between forward and backward they have ``FFNOptions.capacity`` of that: a call that needs more is known to
after its gate stage, takes the dense path inside the same program, keeps nothing, and its backward is the dense
path's.

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

from pallas_kernels import axes, reference
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import pallas_triton as kernels
from pallas_kernels.panel.config import PanelConfig
from pallas_kernels.panel.pallas_triton import GatePanel, Lists, build_lists, gate_panel, panel_down, panel_up
from pallas_kernels.panel.pallas_triton_backward import panel_dh, panel_dw


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

    ``backend`` runs the gate: ``"mosaic_gpu"``, ``"triton"`` or ``"interpret"``; the rest is Triton's, interpreted
    or not.
    """
    tokens = x.shape[0]
    if tokens == 0:
        return reference.ffn(x, w_gate, w_up, w_down)
    config = configs.choose(x, w_up, options)
    interpret = backend == "interpret"
    x, gate_weight, up_weight, w_down = _operands(x, w_gate, w_up, w_down)
    gate = _gate(x, gate_weight, config, backend)
    lists, _ = build_lists(gate, d_ff=w_up.shape[0], chunk=config.up.tile, interpret=interpret)
    hidden = panel_up(gate, lists, x, up_weight, config=config.up, interpret=interpret)
    y = panel_down([(hidden.h, w_down)], lists, tokens=tokens, config=config.down, interpret=interpret)
    return y, _stats(gate, hidden.l1, jnp.zeros((), jnp.int32), w_up.shape[0])


def _operands(x, w_gate, w_up, w_down):
    """x, the gate's weight, the up projection's (None without a gate) and w_down, varying alike."""
    x, gate, w_up, w_down = axes.vary_alike(x, w_up if w_gate is None else w_gate, w_up, w_down)
    return x, gate, None if w_gate is None else w_up, w_down


def _gate(x: jax.Array, weight: jax.Array, config: PanelConfig, backend: str) -> GatePanel:
    if backend == "mosaic_gpu":
        from pallas_kernels.panel import pallas_mosaic_gpu

        return pallas_mosaic_gpu.gate_panel(x, weight)
    return gate_panel(x, weight, panel=config.panel, config=config.gate, interpret=backend == "interpret")


def _stats(gate: GatePanel, l1: jax.Array, overflow_rows: jax.Array, d_ff: int) -> FFNStats:
    tokens = gate.nnz.shape[0]
    hits = jnp.sum(gate.hits, axis=0, dtype=jnp.int32)[:d_ff]
    return FFNStats(
        l1=l1 / tokens,
        l0=jnp.sum(hits, dtype=jnp.float32) / tokens,
        neuron_hits=hits,
        max_nnz=jnp.max(gate.nnz),
        overflow_rows=overflow_rows,
    )


def forward(x, w_gate, w_up, w_down, options: FFNOptions, backend: str):
    """The layer and what its backward needs: ((y, stats), (arguments, Residuals, None without a token))."""
    arguments = (x, w_gate, w_up, w_down)
    tokens, d_ff = x.shape[0], w_up.shape[0]
    if tokens == 0:
        return reference.ffn(*arguments), (arguments, None)
    config = configs.choose(x, w_up, options)
    interpret = backend == "interpret"
    x, gate_weight, up_weight, down_weight = _operands(*arguments)
    gate = _gate(x, gate_weight, config, backend)
    chunks = kernels.n_chunks(gate.values.shape[0], d_ff, config.up.tile)
    room = max(1, round(chunks * options.capacity))
    lists, needed = build_lists(gate, d_ff=d_ff, chunk=config.up.tile, room=room, interpret=interpret)

    def sparse(gate, lists):
        hidden = panel_up(gate, lists, x, up_weight, config=config.up, keep=True, interpret=interpret)
        y = panel_down(
            [(hidden.h, down_weight)], lists, tokens=tokens, config=config.down, interpret=interpret
        )
        return y, hidden.l1, (hidden.h, None) if up_weight is None else (hidden.gate, hidden.up)

    def dense(gate, lists):
        y, stats = reference.ffn(x, None if up_weight is None else gate_weight, w_up, down_weight)
        like = jax.eval_shape(sparse, gate, lists)[2]
        return y, stats.l1 * tokens, _vary_like(empty(like), x)

    fits = needed <= room
    y, l1, kept = sparse(gate, lists) if room == chunks else lax.cond(fits, sparse, dense, gate, lists)
    overflow_rows = jnp.where(fits, 0, tokens).astype(jnp.int32)
    return (y, _stats(gate, l1, overflow_rows, d_ff)), (arguments, _name(Residuals(fits, lists, *kept)))


def _name(residuals: Residuals) -> Residuals:
    """With names by which a remat policy may keep them."""
    return dataclasses.replace(
        residuals,
        lists=jax.tree.map(partial(checkpoint_name, name="sparse_ffn_lists"), residuals.lists),
        gate=checkpoint_name(residuals.gate, "sparse_ffn_gate"),
        up=None if residuals.up is None else checkpoint_name(residuals.up, "sparse_ffn_up"),
    )


def empty(like):
    """Arrays of some shapes whose values nobody reads."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def _vary_like(tree, like):
    return jax.tree.map(lambda leaf: axes.vary_alike(leaf, like)[0], tree)


def backward(options: FFNOptions, backend: str, saved, cotangents):
    """Cotangents of x and the weights from those of y and l1; the counters have none."""
    arguments, residuals = saved
    dy, dl1 = cotangents[0], cotangents[1].l1
    x, w_gate, w_up, w_down = arguments
    if residuals is None:
        return reference.pull_back(*arguments, dy, dl1)
    config = configs.choose(x, w_up, options)
    interpret = backend == "interpret"
    scale = (dl1 / x.shape[0]).astype(x.dtype).astype(jnp.float32).reshape(1)

    def sparse(residuals, dy, scale):
        lists = residuals.lists
        operands = axes.vary_alike(x, w_up if w_gate is None else w_gate, w_up, w_down, dy, scale)
        x_, gate_weight, up_weight, down_weight, dy, scale = operands
        gradients = panel_dh(
            residuals.gate, residuals.up, lists, dy, down_weight, scale, config=config.dh, interpret=interpret
        )
        terms = [(gradients.gate, gate_weight)]
        if gradients.up is not None:
            terms.append((gradients.up, up_weight))
        dx = panel_down(
            terms, lists, tokens=x.shape[0], config=config.dx, interpret=interpret, name="panel_dx"
        )
        dw_gate, dw_up, dw_down = panel_dw(
            gradients, lists, x_, dy, d_ff=w_up.shape[0], config=config.dw, interpret=interpret
        )
        return dx, dw_gate, dw_up, dw_down

    def dense(residuals, dy, scale):
        return reference.pull_back(x, w_gate, w_up, w_down, dy, dl1)

    if options.capacity == 1:
        return sparse(residuals, dy, scale)
    return lax.cond(residuals.fits, sparse, dense, residuals, dy, scale)


ffn.defvjp(forward, backward)
