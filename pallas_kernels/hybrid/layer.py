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
    dg  = dh b(u) a'(g)      du = dh a(g) b'(u)                pull_rows
    dx  = dg Wg + du Wu                                        pull_rows
    the non-zeros, neuron by neuron                            by_neuron
    dWg = dg^T x      dWu = du^T x      dWd = h^T dy           pull_weights

and the same lines densely for the rows that overflow: their dx takes its place among the others, their part
of the weight gradients is summed in f32 over all rounds and handed to pull_weights, which adds the non-zeros
and rounds once. Without a gate projection dg = dh a'(g), dx = dg Wu, dWu = dg^T x. The counters have no
gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from pallas_kernels import dense, reference
from pallas_kernels.activations import Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.common.gate_stage import GateStage
from pallas_kernels.common.groups import Groups
from pallas_kernels.common.products import multiply
from pallas_kernels.common.row_kernel import Ell, up_down
from pallas_kernels.dense import backup_rows, token_hits
from pallas_kernels.dense.backup_rows import rows_of
from pallas_kernels.hybrid import config as configs
from pallas_kernels.hybrid.config import HybridConfig
from pallas_kernels.hybrid.pallas_triton_backward import (
    MAX_ENTRIES,
    by_neuron,
    outer,
    pull_rows,
    pull_weights,
)
from pallas_kernels.options import FFNOptions, FFNStats, Hybrid
from pallas_kernels.reference import Weights
from pallas_kernels.twell import gate as gate_stages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What is kept between forward and backward, besides the call's own arguments.

    Attributes:
      ell: the non-zeros; None for a call without tokens.
    """

    ell: Ell | None

    def named(self) -> "Residuals":
        """The same under names by which a remat policy may keep them."""
        if self.ell is None:
            return self
        indices, gate, up, nnz = self.ell
        return Residuals(
            Ell(
                checkpoint_name(indices, "sparse_ffn_indices"),
                checkpoint_name(gate, "sparse_ffn_gate"),
                None if up is None else checkpoint_name(up, "sparse_ffn_up"),
                checkpoint_name(nnz, "sparse_ffn_nnz"),
            )
        )


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer through HybridELL: as `reference.ffn`, for x (M, D) and weights (F, D) of one
    type. ``backend`` is ``"triton"`` or ``"interpret"``."""
    return _layer(x, w_gate, w_up, w_down, options, backend, groups, keep=False)[0]


def forward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[tuple[jax.Array, FFNStats], Residuals]:
    """`infer`, and what `backward` needs.

    Raises:
      ValueError: more slots than 31 bits number.
    """
    width = _layout(options).width
    if x.shape[0] * width > MAX_ENTRIES:
        raise ValueError(
            f"format='hybrid' numbers M * width slots in 31 bits for its gradient; got {x.shape[0]} tokens "
            f"and width={width}: differentiate fewer tokens at a time, or narrow the rows"
        )
    result, ell = _layer(x, w_gate, w_up, w_down, options, backend, groups, keep=True)
    return result, Residuals(ell)


def _layout(options: FFNOptions) -> Hybrid:
    layout = options.layout
    assert isinstance(layout, Hybrid)
    return layout


def _layer(x, w_gate, w_up, w_down, options, backend, groups, *, keep):
    """((y, stats), the non-zeros if asked to ``keep`` them)."""
    tokens, layout, rule = x.shape[0], _layout(options), options.rule
    if tokens == 0:
        return dense.infer(x, w_gate, w_up, w_down, options, backend, groups), None
    config = configs.choose(x, w_up, layout)
    interpret = backend == "interpret"
    gate_weight, up_weight = _roles(w_gate, w_up)
    packed, hits = gate_stage(config, backend, rule)(x, gate_weight)
    rows = up_down(
        packed,
        x,
        up_weight,
        w_down,
        width=layout.width,
        keep=keep,
        config=config.up_down,
        name="hybrid_down" if up_weight is None else "hybrid_up_down",
        rule=rule,
        interpret=interpret,
    )
    bound = config.backup_rows
    y, l1 = backup_rows.mend(rows.y, rows.l1, rows.overflows, bound, x, w_gate, w_up, w_down, rule)
    if groups is not None:
        hits = token_hits(x, gate_weight, rule, groups)
    return (y, FFNStats.of_rows(l1, rows.nnz, rows.overflows, hits, groups)), rows.ell


def gate_stage(config: HybridConfig, backend: str, rule: Rule) -> GateStage[gate_stages.Words]:
    """TwELL's gate stage with slots enough that a tile overflows only in a row of more than W non-zeros.

    The words are read by the next kernel and then gone: they are no residual.
    """
    return gate_stages.in_pieces(
        gate_stages.stage(
            backend,
            tile=config.tile,
            slots=config.slots,
            fused=config.gate_pack,
            pack=config.word_pack,
            rule=rule,
        )
    )


def _roles(w_gate: jax.Array | None, w_up: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The gate's weight and the up projection's: without a gate, w_up is the gate's and there is no other."""
    return (w_up, None) if w_gate is None else (w_gate, w_up)


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    kept: Residuals,
    dy: jax.Array,
    scale: jax.Array | None,
    options: FFNOptions,
    backend: str,
    *,
    dtype: DTypeLike,
    weights: bool = True,
) -> Weights:
    """Cotangents of x and, in ``dtype``, the weights (None where not asked for), from dy (M, D) and
    ``scale``, the cotangent of every |h|: (1,) or (M,) f32, or None for none."""
    ell, rule = kept.ell, options.rule
    if ell is None:
        return dense.recompute_backward(x, w_gate, w_up, w_down, dy, scale, rule=rule, dtype=dtype)
    config = configs.choose(x, w_down, _layout(options))
    interpret = backend == "interpret"
    gate_weight, up_weight = _roles(w_gate, w_up)
    pulled = pull_rows(
        ell, dy, scale, gate_weight, up_weight, w_down, config=config.dx, rule=rule, interpret=interpret
    )
    zero = varying_axes.vary_with(x, jnp.zeros(w_down.shape, jnp.float32))
    sums = [zero] * (3 if weights and up_weight is not None else 2) if weights else []
    dx, *sums = _backup_gradients(
        ell.overflows, config.backup_rows, (pulled.dx, *sums), x, dy, scale, (w_gate, w_up, w_down), rule
    )
    if not weights:
        return dx, None, None, None  # type: ignore[return-value]
    lists = by_neuron(ell, w_down.shape[0])
    gradients = pull_weights(
        pulled, ell, lists, x, dy, sums, dtype=dtype, config=config.weights, interpret=interpret
    )
    return (dx, None, *gradients) if up_weight is None else (dx, *gradients)


def _backup_gradients(overflows, bound, carry, x, dy, scale, arguments, rule: Rule):
    """dx (M, D) with the overflowing rows' own, and their part of the weight gradients, (F, D) f32 each, if
    the carry has places for them."""
    w_gate, w_up, w_down = arguments

    def one_round(ids, carry):
        dx, *sums = carry
        x_rows, dy_rows = rows_of(x, ids), rows_of(dy, ids)
        gate, up = reference.projections(x_rows, w_gate, w_up)
        h, mask = reference.hidden(gate, up, rule)
        own = scale if scale is None or scale.shape[0] != x.shape[0] else rows_of(scale, ids)
        dh = reference.hidden_gradient(dy_rows, w_down, h, own)
        dg, du = reference.pull_back(gate, up, dh, mask, rule)
        inner = [(dg, w_up)] if w_gate is None else [(dg, w_gate), (du, w_up)]
        rows = sum(multiply(z, weight).astype(jnp.float32) for z, weight in inner)
        if sums:
            terms = [*[outer(z, x_rows) for z, _ in inner], outer(h, dy_rows)]
            sums = [total + term for total, term in zip(sums, terms, strict=True)]
        return dx.at[ids].set(jnp.asarray(rows).astype(dx.dtype), mode="drop"), *sums

    return backup_rows.rounds(overflows, bound, one_round, carry)
