"""The contract on the dense path, which XLA compiles for any device."""

from functools import partial

import jax
import jax.numpy as jnp
from op_contract import Contract, Path, call, check_counts, check_values, run

from pallas_kernels import FFNOptions


class TestDense(Contract):
    path = Path(
        FFNOptions(format="dense", backend="xla"), d_model=40, d_ff=72, many_tokens=301, tile=32, slots=8
    )

    def test_without_jit(self):
        inputs, active = self.layer("uneven")
        y, stats = run(partial(call, options=self.path.options), jax.tree.map(jnp.asarray, inputs))
        check_values(y, stats, inputs)
        check_counts(stats, active, 0)
