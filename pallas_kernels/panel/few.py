"""A forward call of few panels: what is known of it after its gate stage, and two ways to end it.

By then every panel's active neurons are counted, so ``format="auto"`` needs no probe to decide: it ends the
call over the lists, or densely from the gates that are there.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.activations import Rule
from pallas_kernels.common.products import multiply, project
from pallas_kernels.options import FFNStats
from pallas_kernels.panel.config import FewConfig
from pallas_kernels.panel.pallas_triton_few import FewLists, few_down, few_up
from pallas_kernels.panel.pallas_triton_lists import GatePanel


def sparse(
    gate: GatePanel,
    lists: FewLists,
    x: jax.Array,
    w_up: jax.Array | None,
    w_down: jax.Array,
    *,
    config: FewConfig,
    rule: Rule,
    interpret: bool = False,
) -> tuple[jax.Array, FFNStats]:
    """y (M, D) and the statistics over the lists: x (M, D), w_up (F, D) or None without a gate projection,
    w_down (F, D)."""
    h, parts = few_up(gate, lists, x, w_up, config=config, rule=rule, interpret=interpret)
    return few_down(h, parts, lists, w_down, tokens=x.shape[0], config=config, interpret=interpret)


def dense(
    gate: GatePanel, lists: FewLists, x: jax.Array, w_up: jax.Array | None, w_down: jax.Array, *, rule: Rule
) -> tuple[jax.Array, FFNStats]:
    """As `sparse`, densely by XLA."""
    tokens, d_ff = x.shape[0], w_down.shape[0]
    up = None if w_up is None else project(x, w_up)
    h, _ = reference.hidden(unpack(gate, tokens, d_ff), up, rule)
    zero = jnp.zeros((), jnp.int32)
    return multiply(h, w_down), FFNStats(
        l1=jnp.sum(jnp.abs(h), dtype=jnp.float32) / tokens,
        l0=jnp.sum(lists.gates, dtype=jnp.int32).astype(jnp.float32) / tokens,
        neuron_hits=lists.hits,
        max_nnz=jnp.max(lists.most),
        overflow_rows=zero,
        pairs=jnp.sum(lists.counts, dtype=jnp.int32),
        dense_tokens=zero + tokens,
    )


def unpack(gate: GatePanel, tokens: int, d_ff: int) -> jax.Array:
    """The rectified gates (M, F) of a gate stage's panels."""
    n_panels, width, panel = gate.values.shape
    segments = gate.segments
    values = gate.values.reshape(n_panels, width, segments, panel // segments)
    hit = gate.hits.reshape(n_panels, segments, width).transpose(0, 2, 1)[..., None] > 0
    dense = jnp.where(hit, values, 0).astype(values.dtype)
    return dense.transpose(0, 2, 3, 1).reshape(n_panels * panel, width)[:tokens, :d_ff]
