"""The contract on the PanelELL kernels, run by Pallas' interpreter on a CPU."""

from op_contract import Contract
from panel_path import PanelPath

from pallas_kernels import FFNOptions


class TestPanelInterpreted(Contract):
    path = PanelPath(
        FFNOptions(format="panel", backend="interpret", tile=32, compression=4, panel=16, capacity=1.0),
        d_model=40,
        d_ff=72,
        many_tokens=301,
        check_vma=False,  # 2026-11: Pallas' interpreter mixes its own arrays with varying ones
        variants=({"panel": 32}, {"capacity": 0.5}, {"capacity": 1e-6}),
    )
