"""The decode kernels lowered for CUDA with no GPU at hand, through an abstract H200."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from lowering import lowered, shapes
from op_checks import DTYPES, LAYERS, call

from pallas_kernels import FFNOptions, decode
from pallas_kernels.activations import RELU
from pallas_kernels.decode.pallas_triton_attention import positions
from pallas_kernels.device import Device

OPTIONS = FFNOptions(format="decode", backend="triton")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 40, 200), (8, 40, 200), (9, 129, 65), (64, 1000, 5633), (300, 64, 96)], ids=str
)
def test_types_and_odd_sizes(sizes, dtype, kind):
    text = lowered(partial(call, options=OPTIONS), shapes(*sizes, dtype, kind))
    few = sizes[0] <= 2
    for name in ("decode_rows_hidden", "decode_sum"):
        assert (name in text) == few
    for name in ("decode_hidden", "decode_down"):
        assert (name in text) != few


@pytest.mark.parametrize(
    ("tokens", "kernels"),
    [(1, ["decode_rows_hidden", "decode_sum"]), (64, ["decode_hidden", "decode_down"]), (65, [])],
)
def test_auto_takes_the_decode_kernels_for_a_few_tokens(tokens, kernels):
    text = lowered(partial(call, options=FFNOptions()), shapes(tokens, 2048, 5632))
    for name in ("decode_rows_hidden", "decode_sum", "decode_hidden", "decode_down"):
        assert (name in text) == (name in kernels)


@pytest.mark.parametrize("tokens", [1, 64])
def test_auto_is_dense_where_the_program_runs_on_no_gpu(tokens):
    text = lowered(partial(call, options=FFNOptions()), shapes(tokens, 256, 512), platform="cpu")
    assert "decode_" not in text
    assert "dot_general" in text


def test_auto_leaves_float32_to_xla():
    assert "decode_" not in lowered(partial(call, options=FFNOptions()), shapes(1, 256, 512, "float32"))


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_layer_of_a_stack_is_not_copied(tokens):
    def stack(x, *weights):
        return jax.lax.fori_loop(0, 3, lambda nth, x: decode.layer_of_stack(x, *weights, nth)[0], x)

    weight = jax.ShapeDtypeStruct((3, 512, 256), jnp.bfloat16)
    text = lowered(stack, jax.ShapeDtypeStruct((tokens, 256), jnp.bfloat16), weight, weight, weight)
    assert "tensor<1536x256xbf16>" in text
    assert "dynamic_slice" not in text
    assert "tensor<512x256xbf16>" not in text


@pytest.mark.parametrize(
    ("capability", "wanted"), [(80, [128, 32, 32]), (89, [128, 32, 16]), (90, [128, 32, 32])]
)
def test_attention_reads_as_many_positions_as_shared_memory_has_room_for(capability, wanted):
    device = Device("gpu", "NVIDIA", capability, 100)
    heads = [(64, "bfloat16"), (256, "bfloat16"), (256, "float32")]
    assert [positions(*each, device) for each in heads] == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", decode.HEAD_DIMS)
def test_the_kernels_around_the_layer(head_dim, dtype):
    batch, kv_heads, heads, capacity = 3, 2, 10, 100

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache = shape(batch, capacity, kv_heads, head_dim)
    angles = shape(batch, head_dim // 2, dtype=jnp.float32)
    qkv, lengths = shape(batch, (heads + 2 * kv_heads) * head_dim), shape(batch, dtype=jnp.int32)
    text = lowered(decode.attention, qkv, cache, cache, lengths, angles, angles)
    assert re.search(r"output_operand_aliases?", text)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "kernels"),
    [
        (2, ["rows_project", "rows_hidden", "sum", "rows_project"]),
        (3, ["project", "hidden", "down", "project"]),
        (64, ["project", "hidden", "down", "project"]),
    ],
)
def test_projections_with_sums_and_norms_in_them_and_between_them(tokens, kernels, dtype):
    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def on_stream(x, scale, output, weight, head):
        first = decode.project_onto(decode.Residual(x, 0.3), x, output)
        weights = weight, weight, weight
        normed, onto = first.normed(scale, 1e-5), decode.Residual(first.x)
        second = decode.layer_onto(onto, normed, *weights, rule=RELU)
        return decode.project(second.normed(scale, 1e-5), head)

    def with_norms(x, scale, output, weight, head):
        x, normed = decode.add_norm(x, decode.project(x, output), scale, eps=1e-5)
        return x, decode.project(normed, head)

    scale = shape(100, dtype=jnp.float32)
    arguments = shape(tokens, 100), scale, shape(100, 100), shape(65, 100), shape(33, 100)
    assert _kernels(lowered(on_stream, *arguments)) == kernels
    assert _kernels(lowered(with_norms, *arguments)) == [kernels[0], "add_norm", kernels[-1]]


def _kernels(text):
    """Names of the decode kernels of a program, as they are called one after the other."""
    return re.findall(r'name = "decode_(\w+)"', text)
