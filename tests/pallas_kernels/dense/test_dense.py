"""The contract on the dense path, which XLA compiles for any device."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lowered, shapes
from op_checks import Path, call, check_counts, check_values, run
from op_contract import Contract

from pallas_kernels import FFNOptions, sparse_mlp


@pytest.mark.parametrize(("tokens", "groups"), [(301, None), (40, 2), (0, None)])
def test_pairs_of_panels_that_were_not_made(tokens, groups):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((tokens, 8), np.float32), rng.standard_normal((24, 8), np.float32)
    w[:6] = 0

    def count(x):
        return sparse_mlp(x, w, w, options=FFNOptions(format="dense(tokens=16)"))[1]

    stats = jax.jit(jax.vmap(count) if groups else count)(x.reshape(groups, -1, 8) if groups else x)
    active = (x @ w.T > 0).reshape(groups or 1, -1, 24)
    starts = range(0, active.shape[1], 16)
    pairs = sum((active[:, at : at + 16].any(1).sum(-1) for at in starts), np.zeros(groups or 1, int))
    np.testing.assert_array_equal(np.atleast_1d(stats.pairs), pairs)
    np.testing.assert_array_equal(stats.neuron_hits, active.sum(1) if groups else active[0].sum(0))
    np.testing.assert_array_equal(stats.dense_tokens, [20, 20] if groups else tokens)


class TestDense(Contract):
    path = Path(
        FFNOptions(format="dense", backend="xla"), d_model=40, d_ff=72, many_tokens=301, tile=32, slots=8
    )

    def test_without_jit(self):
        inputs, active = self.layer("uneven")
        y, stats = run(partial(call, options=self.path.options), jax.tree.map(jnp.asarray, inputs))
        check_values(y, stats, inputs)
        check_counts(stats, active, 0)


@pytest.mark.parametrize(("platform", "rows"), [("cuda", 2), ("cpu", 1)])
def test_a_single_row_is_a_product_of_two_on_a_gpu(platform, rows):
    """There a product of one row is an elementwise one, which reads weights slower."""
    text = lowered(partial(call, options=FFNOptions(format="dense")), shapes(1, 40, 96), platform=platform)
    products = re.findall(r"stablehlo\.dot_general.*: \(tensor<(\d+)x\d+xbf16>", text)
    assert products == [str(rows)] * 3
