"""A forward call of few panels: three launches behind the gate stage."""

import jax

from pallas_kernels.activations import Rule
from pallas_kernels.options import FFNStats
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.gate import roles, stage
from pallas_kernels.panel.pallas_triton_few import few_down, few_up, list_neurons


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    panel: int,
    rule: Rule,
    backend: str,
) -> tuple[jax.Array, FFNStats]:
    """y (M, D) and the statistics of x (M, D) and weights (F, D), in panels of ``panel`` tokens."""
    interpret, (gate_weight, up_weight) = backend == "interpret", roles(w_gate, w_up)
    config = configs.choose(x, w_up, panel)
    cut = configs.choose_few(x, config)
    gates = stage(config, backend, rule)(x, gate_weight)
    lists = list_neurons(gates, d_ff=w_up.shape[0], config=cut, interpret=interpret)
    h, parts = few_up(gates, lists, x, up_weight, config=cut, rule=rule, interpret=interpret)
    return few_down(h, parts, lists, w_down, tokens=x.shape[0], config=cut, interpret=interpret)
