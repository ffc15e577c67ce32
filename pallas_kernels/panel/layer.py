"""The PanelELL layer and its backward, written by hand.

Exactness. Without a gradient to compute, the lists have room for every neuron of every panel, so nothing can
overflow. Between forward and backward they have ``Panel.capacity`` of that: a call that needs more is
known to after its gate stage, takes the dense path inside the same program, block by block of tokens, and
keeps nothing; so does its backward.

Memory. The gates are (tokens, F) values, of which a kernel writes the active ones, and so is h. With
``Panel.block_tokens`` a call without a gradient runs over blocks of tokens, in which h takes the place of the
gates. At 65,536 tokens, D 2048 and F 5632 in bf16, 32,768 of them at a time, its temporaries are 375 MiB; in
one piece they are 1,422, and the dense layer's 2,112.

Backward, from dy (M, D) and the cotangent dl1 of l1, over the slots of each panel's list:

    dh  = dy Wd^T + sign(h) dl1 / M     where the gate is active       panel_dh
    dg  = dh b(u) a'(g)      du = dh a(g) b'(u)                        panel_dh
    dx  = dg Wg + du Wu                                                panel_down with two terms
    dWg = dg^T x      dWu = du^T x      dWd = h^T dy                   panel_dw

Without a gate projection dg = dh a'(g), dx = dg Wu and dWu = dg^T x. The counters have no gradient.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from pallas_kernels import dense
from pallas_kernels.activations import Rule
from pallas_kernels.common import token_blocks, varying_axes
from pallas_kernels.common.groups import Groups, by_group, group_size
from pallas_kernels.dense import blocks, token_hits
from pallas_kernels.options import FFNOptions, FFNStats, Panel
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import few
from pallas_kernels.panel import gate as gate_stages
from pallas_kernels.panel.gate import roles
from pallas_kernels.panel.gathered import make_lists, panel_dh, panel_down, panel_up
from pallas_kernels.panel.pallas_triton_counts import Counts, GatePanel, count_active
from pallas_kernels.panel.pallas_triton_lists import NeuronLists, Totals, n_chunks
from pallas_kernels.panel.weights import panel_dw
from pallas_kernels.reference import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What is kept between forward and backward, besides the call's own arguments.

    Attributes:
      fits: () bool, whether the lists had room: if not, the other fields mean nothing.
      lists: the panels' neurons.
      gate, up: (n_slots, P) in x's type, the projections, of a panel's slots up to a multiple of the config's
        ``pad``; up is None without a gate projection.
    """

    fits: jax.Array
    lists: NeuronLists
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


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer through PanelELL: as `reference.ffn`, for x (M, D) and weights (F, D) of one
    type.

    ``backend`` runs the gate: ``"mosaic_gpu"``, ``"triton"`` or ``"interpret"``; the rest is Triton's,
    interpreted or not, but for what `gathered` has on Mosaic GPU.
    """
    tokens = x.shape[0]
    if tokens == 0:
        return dense.infer(x, w_gate, w_up, w_down, options, backend, groups)
    if groups is None and configs.are_few(tokens, _layout(options).tokens):
        return few.infer(x, w_gate, w_up, w_down, _layout(options).tokens, options.rule, backend)
    config = configs.choose(x, w_up, _layout(options).tokens)
    by_token = groups is not None
    one = partial(_infer_block, options=options, backend=backend, config=config, by_token=by_token)
    weights = w_gate, w_up, w_down
    *others, last = token_blocks.split(tokens, _layout(options).block_tokens)
    if not others:
        y, counted = one(x, *weights, None, None, rows=tokens)
    else:
        y, counted = _over_blocks(one, x, weights, others, last)
    gate_weight, _ = roles(w_gate, w_up)
    return y, _stats(counted, x, gate_weight, config.panel, options.rule, groups)


def _over_blocks(one, x, weights, others, last):
    """`_infer_block` over the blocks of x, all of which write to one y."""

    def start_of(block):
        return varying_axes.vary_with(x, jnp.full((1,), block.start, jnp.int32))

    # The last block makes y, since its size may be its own: the others are one function, lowered once.
    y, of_last = one(x, *weights, None, start_of(last), rows=last.tokens)
    one = jax.jit(one, static_argnames="rows")
    parts = []
    for block in others:
        # A block waits for the one before: together they would hold the temporaries of both.
        x, y = lax.optimization_barrier((x, y))
        y, counted = one(x, *weights, y, start_of(block), rows=block.tokens)
        parts.append(counted)
    return y, _Counted.joined([*parts, of_last], x.shape[0])


def _infer_block(
    x, w_gate, w_up, w_down, y, start, *, rows, options, backend, config, by_token
) -> tuple[jax.Array, "_Counted"]:
    """The layer for ``rows`` tokens from ``start`` (1,) on, all from 0 where it is None: their rows are
    written to y, or to a new one, and h takes the place of the gates."""
    rule, interpret, blocked = options.rule, backend == "interpret", start is not None
    gate_weight, up_weight = roles(w_gate, w_up)
    block = lax.dynamic_slice_in_dim(x, start[0], rows) if blocked else x
    gate = gate_stages.stage(config, backend, rule)(block, gate_weight)
    counts = count_active(gate, d_ff=w_up.shape[0], interpret=interpret)
    lists, totals = make_lists(
        counts,
        x,
        up_weight,
        config=config,
        backend=backend,
        tokens=rows,
        with_slots=False,
        in_blocks=blocked,
        by_token=by_token,
    )
    hidden = panel_up(
        gate, lists, x, up_weight, config=config, backend=backend, rule=rule, start=start, by_token=by_token
    )
    y = panel_down(
        [(hidden.h, w_down)],
        lists,
        tokens=x.shape[0],
        config=config,
        backend=backend,
        start=start,
        into=y,
    )
    return y, _Counted.of(counts, totals, gate, hidden.l1, rows, by_token)


def _layout(options: FFNOptions) -> Panel:
    layout = options.layout
    assert isinstance(layout, Panel)
    return layout


class _Counted(NamedTuple):
    """What the statistics of some tokens are made of.

    Attributes:
      neurons: (n_panels,) int32, active neurons of each panel.
      totals: of all panels.
      l1: () f32, the sum of |h|, or (tokens,), that of each token.
      nnz: (tokens,) int32, each token's active gates; None where l1 is one sum.
    """

    neurons: jax.Array
    totals: Totals
    l1: jax.Array
    nnz: jax.Array | None

    @classmethod
    def of(
        cls, counts: Counts, totals: Totals, gate: GatePanel, l1: jax.Array, tokens: int, by_token: bool
    ) -> "_Counted":
        """Of ``tokens`` tokens in panels; l1 as `panel_up` gives it."""
        if not by_token:
            return cls(counts.neurons, totals, l1, None)
        return cls(counts.neurons, totals, l1[:tokens], jnp.sum(gate.nnz, axis=0)[:tokens])

    @classmethod
    def joined(cls, parts: "list[_Counted]", tokens: int) -> "_Counted":
        """Of ``tokens`` tokens that come one after the other, none of them computed densely."""

        def join(*leaves):
            return jnp.concatenate(leaves) if leaves[0].ndim else sum(leaves)

        neurons, totals, l1, nnz = zip(*parts, strict=True)
        all_gates = sum(each.gates for each in totals)
        return cls(
            neurons=jnp.concatenate(neurons),
            totals=totals[0]._replace(
                hits=sum(each.hits for each in totals),
                neurons=sum(each.neurons for each in totals),
                gates=all_gates,
                most=jnp.max(jnp.stack([each.most for each in totals])),
                mean=all_gates / tokens,
            ),
            l1=join(*l1),
            nnz=None if nnz[0] is None else jnp.concatenate(nnz),
        )


def _stats(counted: _Counted, x, weight, panel: int, rule: Rule, groups: Groups) -> FFNStats:
    """The statistics of a call in panels of ``panel`` tokens, or of each of its groups."""
    tokens, (neurons, totals, l1, nnz) = x.shape[0], counted
    if groups is None or nnz is None:
        return FFNStats(
            l1=l1 / tokens,
            l0=totals.mean,
            neuron_hits=totals.hits,
            max_nnz=totals.most,
            overflow_rows=totals.overflow_rows,
            pairs=totals.neurons,
            dense_tokens=totals.dense_tokens,
        )
    size = group_size(tokens, groups)
    dense_tokens = jnp.where(totals.dense_tokens > 0, size, 0)
    nnz = by_group(nnz, groups)
    # A panel's pairs are counted for the group that its first token is in.
    first = jnp.arange(neurons.shape[0]) * panel // size
    each = jnp.zeros((groups,), jnp.int32)
    return FFNStats(
        l1=jnp.sum(by_group(l1, groups), axis=-1) / size,
        l0=jnp.sum(nnz, axis=-1, dtype=jnp.float32) / size,
        neuron_hits=token_hits(x, weight, rule, groups),
        max_nnz=jnp.max(nnz, axis=-1),
        overflow_rows=each + dense_tokens,
        pairs=each.at[first].add(neurons),
        dense_tokens=each + dense_tokens,
    )


def forward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[tuple[jax.Array, FFNStats], Residuals | None]:
    """`infer`, and what `backward` needs: None without a token."""
    arguments = x, w_gate, w_up, w_down
    tokens, d_ff = x.shape[0], w_up.shape[0]
    if tokens == 0:
        return dense.infer(*arguments, options, backend, groups), None
    layout, rule, interpret = _layout(options), options.rule, backend == "interpret"
    by_token = groups is not None
    config = configs.choose(x, w_up, layout.tokens)
    gate_weight, up_weight = roles(w_gate, w_up)
    gate = gate_stages.stage(config, backend, rule)(x, gate_weight)
    chunks = n_chunks(gate.values.shape[0], d_ff, config.chunk)
    room = max(1, round(chunks * layout.capacity))
    counts = count_active(gate, d_ff=d_ff, interpret=interpret)
    lists, totals = make_lists(
        counts, x, up_weight, config=config, backend=backend, room=room, by_token=by_token
    )

    def sparse(gate, lists):
        hidden = panel_up(
            gate,
            lists,
            x,
            up_weight,
            config=config,
            backend=backend,
            rule=rule,
            keep=True,
            by_token=by_token,
        )
        y = panel_down([(hidden.h, w_down)], lists, tokens=tokens, config=config, backend=backend)
        return y, hidden.l1[:tokens] if by_token else hidden.l1, (hidden.gate, hidden.up)

    def instead(gate, lists):
        like = jax.eval_shape(sparse, gate, lists)[2]
        y, l1 = blocks.forward(*arguments, rule)
        return y, l1 if by_token else jnp.sum(l1), varying_axes.vary_with(x, empty(like))

    fits = lists.needed <= room
    if room == chunks:
        y, l1, kept = sparse(gate, lists)
    else:
        y, l1, kept = lax.cond(fits, sparse, instead, gate, lists)
    counted = _Counted.of(counts, totals, gate, l1, tokens, by_token)
    stats = _stats(counted, x, gate_weight, config.panel, rule, groups)
    return (y, stats), Residuals(fits, lists, *kept)


def empty(like):
    """Arrays of some shapes whose values nobody reads."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def pull_back(
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
    """`backward` where the lists had room."""
    config = configs.choose(x, w_up, _layout(options).tokens)
    lists, (gate_weight, up_weight) = kept.lists, roles(w_gate, w_up)
    gradients = panel_dh(
        kept.gate, kept.up, lists, dy, w_down, scale, config=config, backend=backend, rule=options.rule
    )
    terms = [(gradients.gate, gate_weight)]
    if up_weight is not None and gradients.up is not None:
        terms.append((gradients.up, up_weight))
    dx = panel_down(terms, lists, tokens=x.shape[0], config=config, backend=backend, gradient=True)
    if not weights:
        return dx, None, None, None  # type: ignore[return-value]
    return dx, *panel_dw(
        gradients,
        kept.gate,
        lists,
        x,
        dy,
        config=config,
        backend=backend,
        dtype=dtype,
    )


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    kept: Residuals | None,
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
    arguments = x, w_gate, w_up, w_down
    if kept is None:
        return dense.recompute_backward(*arguments, dy, scale, rule=options.rule, dtype=dtype)

    def sparse(kept, dy, scale):
        return pull_back(*arguments, kept, dy, scale, options, backend, dtype=dtype, weights=weights)

    def instead(kept, dy, scale):
        dx, *gradients = blocks.backward(*arguments, dy, scale, rule=options.rule, dtype=dtype)
        return (dx, *(gradients if weights else (None, None, None)))

    if _layout(options).capacity == 1:
        return sparse(kept, dy, scale)
    return lax.cond(kept.fits, sparse, instead, kept, dy, scale)
