"""The gate stage of PanelELL: one of three implementations, for all of which the lists are built alike."""

import jax

from pallas_kernels import device
from pallas_kernels.activations import Rule
from pallas_kernels.common import gate_stage
from pallas_kernels.common.gate_stage import GateStage
from pallas_kernels.panel.config import PanelConfig
from pallas_kernels.panel.pallas_triton_counts import GatePanel
from pallas_kernels.panel.pallas_triton_gate import gate_panel, pack_panel


def roles(w_gate: jax.Array | None, w_up: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The weight whose product is rectified, and the up projection's, None without a gate."""
    return (w_up, None) if w_gate is None else (w_gate, w_up)


def stage(config: PanelConfig, backend: str, rule: Rule) -> GateStage[GatePanel]:
    """The gate stage on a backend: the active gates of ``x Wg^T`` by panels."""

    def gate(x: jax.Array, w_gate: jax.Array) -> GatePanel:
        match gate_stage.implementation(backend, x, w_gate, device.current()):
            case "mosaic_gpu":
                from pallas_kernels.panel import pallas_mosaic_gpu

                return pallas_mosaic_gpu.gate_panel(x, w_gate, rule)
            case "triton":
                return gate_panel(x, w_gate, panel=config.panel, config=config.gate, rule=rule)
            case "xla":
                return pack_panel(
                    gate_stage.xla_product(x, w_gate),
                    d_ff=w_gate.shape[0],
                    panel=config.panel,
                    config=config.pack,
                    rule=rule,
                    interpret=backend == "interpret",
                )

    return gate
