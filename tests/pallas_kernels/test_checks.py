"""Bad input: each mistake is one sentence that says what was expected, what was found and what to do."""

import math
import re
import types

import jax.numpy as jnp
import pytest

from pallas_kernels import (
    Auto,
    Dense,
    FFNOptions,
    Hybrid,
    Panel,
    Threshold,
    Twell,
    activations,
    sparse_ffn,
    sparse_mlp,
)

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
    "a parameter that holds an array": (
        {"w_gate": types.SimpleNamespace(shape=(F, D), dtype="float32", ndim=2, __jax_array__=None)},
        TypeError,
        r"w_gate must be an array; got SimpleNamespace, which holds one: .* w_gate\[\.\.\.\]",
    ),
    "a format in place of options": (
        {"options": "panel"},
        TypeError,
        r"options must be FFNOptions, such as FFNOptions\(format='panel'\); got str: ",
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
    options = FFNOptions(format=Twell(tile=512), backend="interpret")
    with pytest.raises(ValueError, match="tiles of at most 256 columns; got tile=512") as raised:
        sparse_ffn(**arguments(), options=options)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"format": "ellpack"}, "FFNOptions.format must be one of auto, panel, .*; got 'ellpack'"),
        ({"backend": "cuda"}, "FFNOptions.backend must be one of auto, triton, .*; got 'cuda'"),
        (
            {"weight_gradients": "float16"},
            "FFNOptions.weight_gradients must be one of auto, input, float32; got 'float16'",
        ),
        ({"activation": "gelu"}, "activation must be one of relu, relu2, drelu, or Threshold"),
        (
            {"format": "panel(width=3)"},
            "format 'panel' has the options tokens, capacity, block_tokens; got 'width=3'",
        ),
        ({"format": "decode(tile=3)"}, "format 'decode' has no options; got 'tile=3'"),
        ({"format": "panel(tokens=many)"}, "Panel.tokens must be a number; got 'many'"),
        ({"format": 3}, "FFNOptions.format must be one of .*; got 3"),
    ],
    ids=str,
)
def test_bad_options(fields, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        FFNOptions(**fields)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (Twell, {"tile": 16}, "Twell.tile must be a power of two of at least 32; got 16"),
        (Twell, {"tile": 96}, "Twell.tile must be a power of two of at least 32; got 96"),
        (Twell, {"compression": 0}, "must divide tile=256 and leave at least 2 slots a tile; got 0"),
        (Twell, {"compression": 3}, "must divide tile=256 and leave at least 2 slots a tile; got 3"),
        (Twell, {"compression": 256}, "must divide tile=256 and leave at least 2 slots a tile; got 256"),
        (Twell, {"backup_rows": 0}, "Twell.backup_rows must be at least 1; got 0"),
        (Hybrid, {"width": 0}, "Hybrid.width must be at least 1; got 0"),
        (Hybrid, {"backup_rows": 0}, "Hybrid.backup_rows must be at least 1; got 0"),
        (Panel, {"tokens": 24}, "Panel.tokens must be a power of two from 16 to 128; got 24"),
        (Panel, {"capacity": 0.0}, "Panel.capacity must be above 0 and at most 1; got 0.0"),
        (Auto, {"tokens": 256}, "Auto.tokens must be a power of two from 16 to 128; got 256"),
        (Threshold, {"value": -0.1}, "Threshold.value must be a finite number of at least 0"),
        (Threshold, {"value": math.nan}, "Threshold.value must be a finite number of at least 0.*got nan"),
        (Threshold, {"value": "a"}, "Threshold.value must be a finite number of at least 0.*got 'a'"),
    ],
    ids=str,
)
def test_bad_layouts_and_activations(kind, fields, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        kind(**fields)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    "layout",
    [Auto(), Dense(), Dense(32), Panel(64, 0.5), Hybrid(3, None, 32), Hybrid(4, 5), Twell(32, 4, 1)],
)
def test_a_layout_is_its_text(layout):
    assert FFNOptions(str(layout)).layout == layout


@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu", Threshold(0.01)])
def test_an_activation_is_its_text(activation):
    assert activations.parse(str(activation)) == activation


def test_an_activation_of_two_projections_needs_both():
    weights = {name: value for name, value in arguments().items() if name != "w_gate"}
    with pytest.raises(ValueError, match="rectifies the gate and the up projection") as raised:
        sparse_mlp(**weights, options=FFNOptions(activation="drelu"))
    assert_one_sentence(raised.value)


def assert_one_sentence(error):
    message = str(error)
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message)
    assert len(message) < 250
