"""A forward call of few panels: what is known of it after its gate stage, and two ways to end it.

By then every panel's active neurons are counted and listed. So ``format="auto"`` needs no probe to decide: it
ends the call over the lists, or densely from the gates that are there.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.activations import Rule
from pallas_kernels.common.products import multiply, project
from pallas_kernels.options import FFNStats
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.config import FewConfig, PanelConfig
from pallas_kernels.panel.gate import roles, stage
from pallas_kernels.panel.pallas_triton_few import FewLists, few_down, few_up, list_neurons, under
from pallas_kernels.panel.pallas_triton_lists import GatePanel
from pallas_kernels.reference import Weights


class Gates(NamedTuple):
    """The gates of a call, and which neurons are active."""

    panels: GatePanel
    lists: FewLists

    def under(self, share: float, backend: str) -> jax.Array:
        """() bool, whether panels activate under a share of the neurons."""
        n_panels, d_ff = self.lists.counts.shape[0], self.lists.hits.shape[0]
        return under(self.lists.counts, math.ceil(share * n_panels * d_ff), interpret=backend == "interpret")


def applies(tokens: int, panel: int) -> bool:
    """Whether a call has few panels of so many tokens."""
    return 0 < tokens <= configs.FEW_PANELS * panel


def gates_of(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, panel: int, rule: Rule, backend: str
) -> Gates:
    """The gates of x (M, D) and weights (F, D), in panels of ``panel`` tokens."""
    config, cut = _configs(x, w_up, panel)
    panels = stage(config, backend, rule)(x, roles(w_gate, w_up)[0])
    lists = list_neurons(panels, d_ff=w_up.shape[0], config=cut, interpret=backend == "interpret")
    return Gates(panels, lists)


def _configs(x: jax.Array, w: jax.Array, panel: int) -> tuple[PanelConfig, FewConfig]:
    config = configs.choose(x, w, panel)
    return config, configs.choose_few(x, config)


def sparse(gates: Gates, arguments: Weights, rule: Rule, backend: str) -> tuple[jax.Array, FFNStats]:
    """y (M, D) and the statistics over the lists, from the gates of a call and its arguments."""
    (panels, lists), (x, w_gate, w_up, w_down) = gates, arguments
    config, interpret = _configs(x, w_up, panels.values.shape[2])[1], backend == "interpret"
    up_weight = roles(w_gate, w_up)[1]
    h, parts = few_up(panels, lists, x, up_weight, config=config, rule=rule, interpret=interpret)
    return few_down(h, parts, lists, w_down, tokens=x.shape[0], config=config, interpret=interpret)


def dense(gates: Gates, arguments: Weights, rule: Rule) -> tuple[jax.Array, FFNStats]:
    """As `sparse`, densely by XLA."""
    x, w_gate, w_up, w_down = arguments
    (tokens, _), d_ff, lists = x.shape, w_up.shape[0], gates.lists
    up_weight = roles(w_gate, w_up)[1]
    up = None if up_weight is None else project(x, up_weight)
    h, _ = reference.hidden(_unpacked(gates.panels, tokens, d_ff), up, rule)
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


def _unpacked(panels: GatePanel, tokens: int, d_ff: int) -> jax.Array:
    """The rectified gates (M, F)."""
    (n_panels, width, panel), segments = panels.values.shape, panels.segments
    values = panels.values.reshape(n_panels, width, segments, panel // segments)
    hits = panels.hits.reshape(n_panels, segments, width).transpose(0, 2, 1)
    # Values of a segment without a hit were never written.
    written = jnp.where(hits[..., None] > 0, values, jnp.zeros_like(values))
    return written.transpose(0, 2, 3, 1).reshape(n_panels * panel, width)[:tokens, :d_ff]
