"""The contract on the TwELL kernels, run by Pallas' interpreter on a CPU."""

from op_checks import Path
from op_contract import Contract

from pallas_kernels import FFNOptions, Twell


class TestTwELLInterpreted(Contract):
    path = Path(
        FFNOptions(format=Twell(tile=32, compression=4), backend="interpret"),
        d_model=40,
        d_ff=72,
        many_tokens=301,
        check_vma=False,
        variants=(
            Twell(tile=64, compression=1),
            Twell(tile=32, compression=16, backup_rows=1),
        ),
        tile=32,
        slots=8,
    )
