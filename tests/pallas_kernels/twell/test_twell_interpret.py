"""The contract on the TwELL kernels, run by Pallas' interpreter on a CPU."""

from op_contract import Contract, Path

from pallas_kernels import FFNOptions


class TestTwELLInterpreted(Contract):
    path = Path(
        FFNOptions(format="twell", backend="interpret", tile=32, compression=4),
        d_model=40,
        d_ff=72,
        many_tokens=301,
        check_vma=False,  # 2026-11: Pallas' interpreter mixes its own arrays with varying ones
        variants=({"tile": 64, "compression": 1}, {"compression": 16, "backup_rows": 1}),
    )
