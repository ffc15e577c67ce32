"""The contract on the decode kernels, and the kernels around them, on an NVIDIA GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_checks import Path
from op_contract import Contract
from step_parts import check_add_norm, check_attention, check_project, check_stream

from pallas_kernels import FFNOptions, sparse_ffn
from pallas_kernels.bench.inputs import ffn_inputs, like_trained

pytestmark = pytest.mark.gpu


class TestDecodeOnGPU(Contract):
    path = Path(
        FFNOptions(format="decode", backend="triton"),
        d_model=300,
        d_ff=1000,
        tile=64,
        many_tokens=301,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("everything", [False, True], ids=["as trained", "every neuron active"])
@pytest.mark.parametrize("tokens", [1, 8, 32, 64])
def test_the_papers_layer(tokens, everything):
    inputs = ffn_inputs(jax.random.key(0), like_trained(45), tokens=tokens, d_model=2048, d_ff=5632)
    if everything:  # the first column of x is 1
        inputs["w_gate"] = inputs["w_gate"].at[:, 0].set(10)
    y, stats = jax.jit(lambda inputs: sparse_ffn(**inputs, options=FFNOptions(format="decode")))(inputs)
    want, expected = jax.jit(lambda inputs: sparse_ffn(**inputs, options=FFNOptions(format="dense")))(inputs)
    scale = float(jnp.abs(want.astype(jnp.float32)).max())
    np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), atol=0.02 * scale)
    np.testing.assert_allclose(stats.l0, expected.l0, rtol=0.01)  # gates about zero round either way


@pytest.mark.parametrize(("tokens", "alone"), [(8, 3), (32, 17), (64, 33)])
def test_a_row_does_not_depend_on_the_others(tokens, alone):
    """Bit for bit: neither on how many there are, nor on what they activate, which is everything for the
    first."""
    inputs = ffn_inputs(jax.random.key(0), like_trained(45), tokens=tokens, d_model=2048, d_ff=5632)
    inputs["x"] = inputs["x"].at[:, 1].set(0).at[0, 1].set(100)
    inputs["w_gate"] = inputs["w_gate"].at[:, 1].set(1)
    step = jax.jit(lambda x, weights: sparse_ffn(x, **weights, options=FFNOptions(format="decode")))
    x = inputs.pop("x")
    together, stats = step(x, inputs)
    assert np.all(stats.neuron_hits)
    fewer, stats = step(x[-alone:], inputs)
    assert not np.all(stats.neuron_hits)
    np.testing.assert_array_equal(fewer, together[-alone:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 32, 64), (32, 4, 64), (8, 2, 128), (3, 1, 32)]
)
def test_attention(heads, kv_heads, head_dim, dtype):
    check_attention(heads, kv_heads, head_dim, capacity=700, dtype=dtype, interpret=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 8, 17, 64, 70])
def test_projections_and_norms(tokens, dtype):
    check_project(tokens, d_model=1000, outputs=777, dtype=dtype, interpret=False)
    check_add_norm(tokens, d_model=1000, dtype=dtype, interpret=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gated", [False, True], ids=["non-gated", "gated"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_sums_and_norms_inside_the_kernels(tokens, gated, dtype):
    check_stream(tokens, d_model=1000, d_ff=777, dtype=dtype, gated=gated, factor=0.3, interpret=False)
