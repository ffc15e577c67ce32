"""The contract on the decode kernels, run by Pallas' interpreter on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_contract import Contract, Path
from step_parts import check_add_norm, check_attention, check_project

from pallas_kernels import FFNOptions
from pallas_kernels.activations import RELU
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.pallas_triton import decode_ffn


class TestDecodeInterpreted(Contract):
    path = Path(
        FFNOptions(format="decode", backend="interpret"),
        d_model=40,
        d_ff=72,
        many_tokens=61,
        check_vma=False,  # 2026-11: Pallas' interpreter mixes its own arrays with varying ones
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(2, 2, "float32"), (4, 2, "bfloat16"), (20, 1, "float32")]
)
def test_attention(heads, kv_heads, dtype):
    check_attention(heads, kv_heads, head_dim=32, capacity=41, dtype=dtype, interpret=True)


@pytest.mark.parametrize(("tokens", "dtype"), [(1, "bfloat16"), (5, "float32"), (70, "float32")])
def test_projections_and_norms(tokens, dtype):
    check_project(tokens, d_model=72, outputs=37, dtype=dtype, interpret=True)
    check_add_norm(tokens, d_model=72, dtype=dtype, interpret=True)


@pytest.mark.parametrize("tokens", [8, 9])
@pytest.mark.parametrize("pattern", ["few", "uneven"])
def test_a_row_does_not_depend_on_how_many_others_there_are(pattern, tokens):
    """Bit for bit, within one padding of the tokens: with shares of y at once (8), and in two kernels (9)."""
    inputs, _ = TestDecodeInterpreted.path.layer(pattern, tokens, "bfloat16")
    config = dataclasses.replace(configs.choose(inputs["x"], 72), tile=16)
    arguments = [jnp.asarray(inputs[name]) for name in ("w_gate", "w_up", "w_down")]

    @jax.jit
    def layer(x):
        return decode_ffn(x, *arguments, rule=RELU, config=config, interpret=True)[0]

    together = layer(jnp.asarray(inputs["x"]))
    np.testing.assert_array_equal(layer(jnp.asarray(inputs["x"][-3:])), together[-3:])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tile": 24}, r"DecodeConfig.tile must be a power of two from 1 to 32; got 24"),
        ({"rows": 128}, r"DecodeConfig.rows must be a power of two from 16 to 64; got 128"),
        ({"num_stages": 0}, r"DecodeConfig.num_stages must be at least 1; got 0"),
        ({"splits": -1}, r"DecodeConfig.splits must be at least 0; got -1"),
    ],
)
def test_the_laws_of_a_config(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(configs.choose(jnp.zeros((1, 40)), 72), **fields)
