"""The HybridELL layer and its backward, written by hand.

Between forward and backward a token keeps W (index, gate, up) triples and a count: 6 W + 4 bytes in 16-bit
types (772 at W 128, where the dense layer keeps 6 F: 33,792 at F 5632). No (M, F) array outlives the forward.

Exactness. A row with more than W non-zeros comes out of the kernels as zero and keeps nothing. The backup
computes such rows densely, ``backup_rows`` of them at a time, in a loop that runs on the device for as many
rounds as there are rows left: none for most inputs, all rows if every row overflows, which is the dense layer
cut into blocks of rows. The backward does the same again, from x: it recomputes g and u of those rows. No
result depends on W or B.

Backward, from dy (M, D) and the cotangent dl1 of l1:

    dh  = dy Wd^T + sign(h) dl1 / M     at the non-zeros       pull_rows
    dg  = dh u        du = dh g                                pull_rows
    dx  = dg Wg + du Wu                                        pull_rows
    the non-zeros, neuron by neuron                            by_neuron
    dWg = dg^T x      dWu = du^T x      dWd = h^T dy           pull_weights

and the same lines densely for the rows that overflow: their dx takes its place among the others, their part
of the weight gradients is summed in f32 over all rounds and handed to pull_weights, which adds the non-zeros
and rounds once. Without a gate, g is h: dg = dh, dx = dh Wu, dWu = dh^T x. The counters have no gradient.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dense as dense_layer
from pallas_kernels import reference
from pallas_kernels.common import varying_axes
from pallas_kernels.dense import backup_rows
from pallas_kernels.hybrid import config as configs
from pallas_kernels.hybrid.pallas_triton import Ell, Rows, gate_pack, up_down
from pallas_kernels.hybrid.pallas_triton_backward import (
    MAX_ENTRIES,
    by_neuron,
    outer,
    pull_rows,
    pull_weights,
)
from pallas_kernels.options import FFNOptions, FFNStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What is kept between forward and backward.

    Attributes:
      x: (M, D).  w_gate, w_up, w_down: (F, D); w_gate None for a non-gated layer. The call's own arguments,
        the weights as they came, not as they were rounded.
      ell: the non-zeros, named "sparse_ffn_indices", "sparse_ffn_gate", "sparse_ffn_up" and "sparse_ffn_nnz"
        for rematerialisation policies; None for a call without tokens.
    """

    x: jax.Array
    w_gate: jax.Array | None
    w_up: jax.Array
    w_down: jax.Array
    ell: Ell | None


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ffn(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer through HybridELL: as `reference.ffn`, for x (M, D) and weights (F, D).

    Weights of a wider type than x's are rounded to it; their gradients are not.
    ``backend`` is ``"triton"`` or ``"interpret"``.
    """
    return _layer(x, w_gate, w_up, w_down, options, backend, keep=False)[0]


def _layer(x, w_gate, w_up, w_down, options, backend, *, keep):
    """((y, stats), what the backward needs if asked to ``keep`` it)."""
    x, w_gate, w_up, w_down = dense_layer.rounded(x, w_gate, w_up, w_down)
    tokens = x.shape[0]
    if tokens == 0:
        return reference.ffn(x, w_gate, w_up, w_down), None
    config = configs.choose(x, w_up, options)
    interpret = backend == "interpret"
    gate_weight, up_weight = _roles(w_gate, w_up)
    packed, hits = gate_pack(x, gate_weight, config=config, interpret=interpret)
    rows = up_down(
        packed,
        x,
        up_weight,
        w_down,
        width=options.width,
        keep=keep,
        config=config.up_down,
        interpret=interpret,
    )
    overflows = rows.nnz > options.width
    y, l1 = _backup(rows, overflows, config.backup_rows, x, w_gate, w_up, w_down)
    stats = FFNStats(
        l1=jnp.sum(l1) / tokens,
        l0=jnp.sum(hits, dtype=jnp.float32) / tokens,
        neuron_hits=hits,
        max_nnz=jnp.max(rows.nnz),
        overflow_rows=jnp.sum(overflows, dtype=jnp.int32),
    )
    return (y, stats), rows.ell


def _roles(w_gate: jax.Array | None, w_up: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The gate's weight and the up projection's: without a gate, w_up is the gate's and there is no other."""
    return (w_up, None) if w_gate is None else (w_gate, w_up)


def _rows_of(array: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of an array, zero where the id is out of range."""
    return array.at[ids].get(mode="fill", fill_value=0)


def _backup(rows: Rows, overflows, bound, x, w_gate, w_up, w_down):
    """y (M, D) and l1 (M,) with the overflowing rows computed densely, ``bound`` of them a round."""

    def one_round(ids, carry):
        y, l1 = carry
        h, _ = reference.hidden(_rows_of(x, ids), w_gate, w_up)
        row_l1 = jnp.sum(jnp.abs(h), axis=1, dtype=jnp.float32)
        dense = reference.multiply(h, w_down)
        return y.at[ids].set(dense, mode="drop"), l1.at[ids].set(row_l1, mode="drop")

    return backup_rows.rounds(overflows, bound, one_round, (rows.y, rows.l1))


def _forward(x, w_gate, w_up, w_down, options, backend):
    entries = x.shape[0] * options.width
    if entries > MAX_ENTRIES:
        raise ValueError(
            f"format='hybrid' numbers M * width slots in 31 bits for its gradient; got {x.shape[0]} tokens "
            f"and width={options.width}: differentiate fewer tokens at a time, or narrow the rows"
        )
    result, ell = _layer(x, w_gate, w_up, w_down, options, backend, keep=True)
    if ell is not None:
        ell = Ell(
            checkpoint_name(ell.indices, "sparse_ffn_indices"),
            checkpoint_name(ell.gate, "sparse_ffn_gate"),
            None if ell.up is None else checkpoint_name(ell.up, "sparse_ffn_up"),
            checkpoint_name(ell.nnz, "sparse_ffn_nnz"),
        )
    return result, Residuals(x, w_gate, w_up, w_down, ell)


def _backward(options, backend, residuals, cotangents):
    """Cotangents of x and the weights, each in its own type, from those of y and l1."""
    dy, dl1 = cotangents[0], cotangents[1].l1
    saved, ell = residuals, residuals.ell
    dtype = saved.w_up.dtype
    arguments = dense_layer.rounded(saved.x, saved.w_gate, saved.w_up, saved.w_down)
    if ell is None:
        return dense_layer.recompute_backward(*arguments, dy, dl1, dtype=dtype)
    x, *_, w_down = arguments
    config = configs.choose(x, w_down, options)
    interpret = backend == "interpret"
    # The mean's cotangent reaches every |h| as a value of the input type.
    scale = (dl1 / x.shape[0]).astype(x.dtype).astype(jnp.float32).reshape(1)
    w_gate, w_up = _roles(*arguments[1:3])
    pulled = pull_rows(ell, dy, scale, w_gate, w_up, w_down, config=config.dx, interpret=interpret)
    zero = varying_axes.vary_with(x, jnp.zeros(w_down.shape, jnp.float32))
    dense = [zero] * (2 if w_up is None else 3)
    dx, *dense = _backup_gradients(
        ell.overflows, config.backup_rows, (pulled.dx, *dense), x, dy, scale, w_gate, w_up, w_down
    )
    lists = by_neuron(ell, w_down.shape[0])
    weights = pull_weights(
        pulled, ell, lists, x, dy, dense, dtype=dtype, config=config.weights, interpret=interpret
    )
    return (dx, None, *weights) if w_up is None else (dx, *weights)


def _backup_gradients(overflows, bound, carry, x, dy, scale, w_gate, w_up, w_down):
    """dx (M, D) with the overflowing rows' own, and their part of the weight gradients, (F, D) f32 each."""

    def one_round(ids, carry):
        dx, *dense = carry
        x_rows, dy_rows = _rows_of(x, ids), _rows_of(dy, ids)
        gate = reference.project(x_rows, w_gate)
        mask = reference.active(gate)
        up = None if w_up is None else reference.project(x_rows, w_up)
        h = jnp.where(mask, gate if up is None else gate * up, 0)
        # dh = dy Wd^T + sign(h) dl1 / M where the gate is active
        dh = reference.project(dy_rows, w_down)
        dh = jnp.where(mask, dh + jnp.sign(h) * scale[0].astype(dh.dtype), 0)
        if up is None:
            inner, weights = [dh], [w_gate]
        else:  # h = g u: dg = dh u, du = dh g; an inactive gate has no gradient, whatever u is
            inner, weights = [jnp.where(mask, dh * other, 0) for other in (up, gate)], [w_gate, w_up]
        rows = jnp.zeros(x_rows.shape, jnp.float32)
        for z, weight in zip(inner, weights, strict=True):
            rows += reference.multiply(z, weight).astype(jnp.float32)
        terms = [*[outer(z, x_rows) for z in inner], outer(h, dy_rows)]
        dense = [total + term for total, term in zip(dense, terms, strict=True)]
        return dx.at[ids].set(rows.astype(dx.dtype), mode="drop"), *dense

    return backup_rows.rounds(overflows, bound, one_round, carry)


ffn.defvjp(_forward, _backward)
