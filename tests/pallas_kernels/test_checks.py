"""Bad input: each mistake is one sentence that says what was expected, what was found and what to do."""

import re

import jax.numpy as jnp
import pytest

from pallas_kernels import FFNOptions, sparse_ffn, sparse_mlp

M, D, F = 3, 8, 12


def arguments(**changes):
    good = {
        "x": jnp.ones((M, D)),
        "w_gate": jnp.ones((F, D)),
        "w_up": jnp.ones((F, D)),
        "w_down": jnp.ones((F, D)),
    }
    return good | changes


def shaped(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


BAD = {
    "a scalar x": (
        {"x": shaped()},
        ValueError,
        r"x must have shape \(\.\.\., D\) with at least one axis; got \(\)",
    ),
    "a weight of rank 1": ({"w_up": shaped(F)}, ValueError, r"w_up must have shape \(F, D\), .*; got \(12\)"),
    "a weight of rank 3": (
        {"w_gate": shaped(1, F, D)},
        ValueError,
        r"w_gate must have shape .*; got \(1, 12, 8\)",
    ),
    "another D": (
        {"x": shaped(M, 9)},
        ValueError,
        r"w_gate must have shape \(F, D\) = \(12, 9\), .*; got \(12, 8\)",
    ),
    "another F": (
        {"w_down": shaped(13, D)},
        ValueError,
        r"w_down must have .* = \(12, 8\), .*; got \(13, 8\)",
    ),
    "a transposed down matrix": (
        {"w_down": shaped(D, F)},
        ValueError,
        r"w_down must be neuron-major, \(F, D\) with D=8 as in x; got \(8, 12\), .*: pass w_down\.T",
    ),
    "all weights transposed": (
        dict.fromkeys(("w_gate", "w_up", "w_down"), shaped(D, F)),
        ValueError,
        r"w_gate must be neuron-major, .*: pass w_gate\.T",
    ),
    "no features": (
        {"x": shaped(M, 0)} | dict.fromkeys(("w_gate", "w_up", "w_down"), shaped(F, 0)),
        ValueError,
        "D and F must be at least 1; got D=0, F=12",
    ),
    "no neurons": (dict.fromkeys(("w_gate", "w_up", "w_down"), shaped(0, D)), ValueError, "got D=8, F=0"),
    "weights of two types": (
        {"x": shaped(M, D, dtype="bfloat16"), "w_gate": shaped(F, D, dtype="bfloat16")},
        TypeError,
        "all weights must share one dtype; got w_up float32 and w_gate bfloat16: cast one of them",
    ),
    "weights narrower than x": (
        dict.fromkeys(("w_gate", "w_up", "w_down"), shaped(F, D, dtype="bfloat16")),
        TypeError,
        (
            "must have x's dtype, or float32 as master weights; got x float32 and w_up bfloat16: "
            "cast one of them"
        ),
    ),
    "two 16-bit types": (
        {"x": shaped(M, D, dtype="float16")}
        | dict.fromkeys(("w_gate", "w_up", "w_down"), shaped(F, D, dtype="bfloat16")),
        TypeError,
        (
            "must have x's dtype, or float32 as master weights; got x float16 and w_up bfloat16: "
            "cast one of them"
        ),
    ),
    "integers": (
        {"x": shaped(M, D, dtype="int32")},
        TypeError,
        "x must be bfloat16, float16 or float32; got int32",
    ),
    "a list": ({"x": [[1.0] * D]}, TypeError, "x must be an array; got list"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_arguments(mistake):
    changes, error, sentence = BAD[mistake]
    with pytest.raises(error, match=sentence) as raised:
        sparse_ffn(**arguments(**changes))
    assert_one_sentence(raised.value)


def test_float32_gradients_of_narrow_weights():
    narrow = {name: value.astype("bfloat16") for name, value in arguments().items()}
    with pytest.raises(
        ValueError, match=r"needs float32 weights: .*; got w_up bfloat16: pass float32 master"
    ) as raised:
        sparse_ffn(**narrow, options=FFNOptions(weight_gradients="float32"))
    assert_one_sentence(raised.value)


def test_bad_arguments_of_the_layer_without_a_gate():
    with pytest.raises(ValueError, match=r"w_down must be neuron-major, .*: pass w_down\.T") as raised:
        sparse_mlp(shaped(M, D), shaped(F, D), shaped(D, F))
    assert_one_sentence(raised.value)


def test_too_many_neurons_for_twell():
    wide = dict.fromkeys(("w_gate", "w_up", "w_down"), shaped(65537, D))
    with pytest.raises(ValueError, match="F is at most 65536; got F=65537") as raised:
        sparse_ffn(**arguments(**wide), options=FFNOptions(format="twell", backend="interpret"))
    assert_one_sentence(raised.value)


def test_tiles_that_the_kernels_cannot_pack():
    options = FFNOptions(format="twell", backend="interpret", tile=512)
    with pytest.raises(ValueError, match="tiles of at most 256 columns; got tile=512") as raised:
        sparse_ffn(**arguments(), options=options)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"format": "ellpack"}, "FFNOptions.format must be one of auto, twell, .*; got 'ellpack'"),
        ({"backend": "cuda"}, "FFNOptions.backend must be one of auto, triton, .*; got 'cuda'"),
        (
            {"weight_gradients": "float16"},
            "FFNOptions.weight_gradients must be one of auto, input, float32; got 'float16'",
        ),
        ({"tile": 16}, "tile must be a power of two of at least 32; got 16"),
        ({"tile": 96}, "tile must be a power of two of at least 32; got 96"),
        ({"compression": 0}, "must divide tile=256 and leave at least 2 slots a tile; got 0"),
        ({"compression": 3}, "must divide tile=256 and leave at least 2 slots a tile; got 3"),
        ({"compression": 256}, "must divide tile=256 and leave at least 2 slots a tile; got 256"),
        ({"backup_rows": 0}, "backup_rows must be at least 1; got 0"),
    ],
    ids=str,
)
def test_bad_options(fields, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        FFNOptions(**fields)
    assert_one_sentence(raised.value)


def assert_one_sentence(error):
    message = str(error)
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message)
    assert len(message) < 250
