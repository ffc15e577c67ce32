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
from pallas_kernels.decode import config as configs
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
    ("capability", "wanted"), [(80, [64, 32, 32]), (89, [64, 32, 16]), (90, [64, 32, 32])]
)
def test_attention_reads_as_many_positions_as_shared_memory_has_room_for(capability, wanted):
    device = Device("gpu", "NVIDIA", capability, 100)
    heads = [(64, "bfloat16"), (256, "bfloat16"), (256, "float32")]
    caches = [jax.ShapeDtypeStruct((8, 100, 4, head_dim), dtype) for head_dim, dtype in heads]
    assert [configs.choose_attention(cache, device).block for cache in caches] == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", decode.HEAD_DIMS)
def test_the_kernels_around_the_layer(head_dim, dtype):
    batch, kv_heads, heads, capacity = 3, 2, 10, 100

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache = shape(batch, capacity, kv_heads, head_dim)
    angles = shape(batch, head_dim // 2, dtype=jnp.float32)
    qkv, lengths = shape(batch, (heads + 2 * kv_heads) * head_dim), shape(batch, dtype=jnp.int32)
    arrivals = shape(batch, kv_heads, dtype=jnp.int32)
    text = lowered(decode.attention, qkv, cache, cache, lengths, angles, angles, arrivals)
    assert re.search(r"output_operand_aliases?", text)
    # Programs for each key/value head, for each split of a row's positions, and for each row.
    splits = configs.choose_attention(cache).splits
    assert splits > 1
    assert [int(size) for size in re.findall(r"grid_\w = (\d+)", text)] == [kv_heads, splits, batch]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "name"), [(2, "rows_project"), (3, "project"), (64, "project")])
def test_projections_and_sums_with_norms(tokens, name, dtype):
    def with_norms(x, scale, output, head):
        x, normed = decode.add_norm(x, decode.project(x, output), scale, eps=1e-5)
        return x, decode.project(normed, head)

    arguments = _shapes(tokens, dtype)
    assert _kernels(lowered(with_norms, *arguments[:3], arguments[-1])) == [name, "add_norm", name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_one_or_two_tokens_have_sums_and_norms_in_their_kernels(tokens, dtype):
    def on_stream(x, scale, output, weight, head):
        first = decode.project_onto(decode.Residual(x, 0.3), x, output)
        weights = weight, weight, weight
        normed, onto = first.normed(scale, 1e-5), decode.Residual(first.x)
        second = decode.layer_onto(onto, normed, *weights, rule=RELU)
        return decode.project(second.normed(scale, 1e-5), head)

    wanted = ["rows_project", "rows_hidden", "sum", "rows_project"]
    assert _kernels(lowered(on_stream, *_shapes(tokens, dtype))) == wanted


def _shapes(tokens, dtype):
    """x, a norm's scale, an output projection, the weights of a layer and a projection that follows."""
    sizes = [(tokens, 100), (100,), (100, 100), (65, 100), (33, 100)]
    types = [dtype, jnp.float32, dtype, dtype, dtype]
    return [jax.ShapeDtypeStruct(size, each) for size, each in zip(sizes, types, strict=True)]


def _kernels(text):
    """Names of the decode kernels of a program, as they are called one after the other."""
    return re.findall(r'name = "decode_(\w+)"', text)
