"""Which path runs where, decided from a description of the device, before anything is lowered."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import Auto, Decode, Dense, FFNOptions, Twell, device, dispatch, sparse_ffn
from pallas_kernels.device import Device
from pallas_kernels.options import parse_layout

CPU = Device("cpu", "cpu", 0, 0)
H200 = Device("gpu", "NVIDIA H200", 90, 132)
B200 = Device("gpu", "NVIDIA B200", 100, 148)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", 80, 108)
V100 = Device("gpu", "NVIDIA V100-SXM2-16GB", 70, 80)
B300 = Device("gpu", "NVIDIA B300", 103, 148)
AMD = Device("gpu", "AMD Instinct MI300X", 0, 304)

NEEDS_GPU = "backend='triton' needs an NVIDIA GPU of compute capability 8.0"


def on(found: Device):
    """A context in which calls are traced for a device that is not here."""
    described = AbstractDevice(device_kind=found.kind, num_cores=found.cores, platform=found.platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


PLAIN = dispatch.Call(tokens=64, d_model=2048, d_ff=5632, dtype=jnp.dtype("bfloat16"))
MANY = PLAIN._replace(tokens=65536)


def reason(layout, backend, found, **changes):
    return dispatch.unsupported_reason(parse_layout(layout), backend, PLAIN._replace(**changes), found)


@pytest.mark.parametrize("found", [H200, A100], ids=lambda d: d.kind)
def test_triton_runs_from_ampere_on(found):
    assert reason("twell", "triton", found) is None


@pytest.mark.parametrize("found", [CPU, V100, AMD], ids=lambda d: d.kind)
def test_triton_says_what_it_misses(found):
    sentence = reason("twell", "triton", found)
    assert sentence.startswith(NEEDS_GPU)
    assert f"got {found.kind} ({found.platform})" in sentence


@pytest.mark.parametrize("found", [H200, B200], ids=lambda d: d.kind)
@pytest.mark.parametrize("format", ["twell", "panel"])
def test_mosaic_runs_on_hopper_and_blackwell(format, found):
    assert reason(format, "mosaic_gpu", found, tokens=1031) is None


def test_mosaic_runs_on_blackwell_for_those_alone_who_ask():
    """Nothing was measured there: neither a format nor a backend of "auto" takes it."""
    sentence = "take mosaic_gpu on Hopper alone, where it was measured; got NVIDIA B200"
    with on(B200):
        for format in ("panel", "twell"):
            layout = parse_layout(format)
            assert dispatch.choose(FFNOptions(format=format), MANY) == (layout, "triton")
            named = FFNOptions(format=format, backend="mosaic_gpu")
            assert dispatch.choose(named, MANY) == (layout, "mosaic_gpu")
            with pytest.raises(ValueError, match="F to be a multiple of 8"):
                dispatch.choose(named, MANY._replace(d_ff=5633))
        assert dispatch.choose(FFNOptions(), MANY) == (Auto(), "triton")
        x, weight = (jax.ShapeDtypeStruct((n, 2048), jnp.bfloat16) for n in (65536, 5632))
        explained = dispatch.explain(x, weight, FFNOptions(format="panel"))
        assert f"not panel on mosaic_gpu: format='auto' and backend='auto' {sentence}" in explained
        assert "runs panel on triton" in explained
        with pytest.raises(ValueError, match=sentence):
            dispatch.choose(FFNOptions(backend="mosaic_gpu"), MANY)


@pytest.mark.parametrize("found", [CPU, A100, V100, AMD, B300], ids=lambda d: d.kind)
def test_mosaic_says_what_it_misses(found):
    sentence = reason("twell", "mosaic_gpu", found)
    assert sentence.startswith("backend='mosaic_gpu' needs an NVIDIA Hopper GPU (compute capability 9.0) or")
    assert f"got {found.kind} ({found.platform})" in sentence


@pytest.mark.parametrize(
    "changes",
    [{"dtype": jnp.dtype("float32")}, {"d_ff": 5633}, {"d_model": 100}],
    ids=str,
)
def test_mosaic_refuses_what_its_tiles_cannot_hold(changes):
    sentence = reason("twell", "mosaic_gpu", H200, **changes)
    (value,) = changes.values()
    assert sentence.startswith("backend='mosaic_gpu'")
    assert str(value) in sentence


@pytest.mark.parametrize(("format", "tokens"), [("twell", 7), ("panel", 1031), ("auto", 65537)])
def test_mosaic_takes_any_number_of_tokens(format, tokens):
    assert reason(format, "mosaic_gpu", H200, tokens=tokens) is None


@pytest.mark.parametrize("found", [CPU, H200, V100, AMD], ids=lambda d: d.kind)
@pytest.mark.parametrize(("format", "backend"), [("dense", "xla"), ("twell", "interpret")])
def test_what_runs_anywhere(format, backend, found):
    assert reason(format, backend, found) is None


def test_sixteen_bit_indices_bound_f():
    assert reason("twell", "triton", H200, d_ff=65536) is None
    assert "F is at most 65536; got F=65537" in reason("twell", "triton", H200, d_ff=65537)
    assert reason("dense", "xla", H200, d_ff=65537) is None


def test_byte_counts_bound_the_tile():
    assert reason("twell", "triton", H200) is None
    assert "at most 256 columns; got tile=512" in reason("twell(tile=512)", "triton", H200)


@pytest.mark.parametrize(
    ("format", "backend", "sentence"),
    [
        ("dense", "triton", "format='dense' runs on backend 'xla'; got backend='triton'"),
        ("twell", "xla", "format='twell' runs on backend 'mosaic_gpu' or 'triton' or 'interpret'; got"),
    ],
)
def test_combinations_that_do_not_exist(format, backend, sentence):
    assert sentence in reason(format, backend, H200)


@pytest.mark.parametrize("found", [CPU, V100, AMD], ids=lambda d: d.kind)
def test_auto_is_dense_where_kernels_cannot_run(found):
    with on(found):
        assert dispatch.choose(FFNOptions(), MANY) == (Dense(), "xla")


def test_auto_decides_inside_the_program_where_they_can():
    with on(H200):
        assert dispatch.choose(FFNOptions(), MANY) == (Auto(), "mosaic_gpu")
        assert dispatch.choose(FFNOptions(), MANY._replace(d_model=100)) == (Auto(), "triton")
        assert dispatch.choose(FFNOptions(backend="triton"), MANY) == (Auto(), "triton")
        assert dispatch.choose(FFNOptions(backend="xla"), MANY) == (Dense(), "xla")
    with on(A100):
        assert dispatch.choose(FFNOptions(), MANY) == (Auto(), "triton")


@pytest.mark.parametrize(("found", "most"), [(H200, 64), (A100, 2)], ids=["H200", "A100"])
def test_auto_decodes_a_few_tokens(found, most):
    with on(found):
        for tokens in (1, 2, 3, 64, 65):
            choice = dispatch.choose(FFNOptions(), PLAIN._replace(tokens=tokens))
            assert choice == ((Dense(), "xla") if tokens > most else (Decode(), "triton"))


def test_auto_is_no_dense_layer_from_1024_tokens_on_hopper():
    with on(H200):
        assert dispatch.choose(FFNOptions(), MANY._replace(tokens=1024)) == (Auto(), "mosaic_gpu")
    with on(A100):
        assert dispatch.choose(FFNOptions(), MANY._replace(tokens=2047)) == (Dense(), "xla")


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 1023}, {"tokens": 2047, "d_model": 100}, {"dtype": jnp.dtype("float32")}],
    ids=str,
)
def test_auto_is_dense_where_a_decision_would_not_pay(changes):
    with on(H200):
        assert dispatch.choose(FFNOptions(), MANY._replace(**changes)) == (Dense(), "xla")


def test_explain_tells_what_would_run_and_why():
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 2048, 2048), (5632, 2048)))
    with on(H200):
        auto, small, few = (
            dispatch.explain(x, weight),
            dispatch.explain(
                jax.ShapeDtypeStruct((700, 2048), x.dtype), weight, FFNOptions(backend="triton")
            ),
            dispatch.explain(jax.ShapeDtypeStruct((2, 2048), x.dtype), weight),
        )
        first, more = (
            dispatch.explain(jax.ShapeDtypeStruct((tokens, 2048), x.dtype), weight) for tokens in (1024, 8192)
        )
        named = dispatch.explain(x, weight, FFNOptions(format="twell", backend="triton"))
    assert "65536 tokens, D=2048, F=5632, bfloat16, on NVIDIA H200" in auto
    assert (
        "runs auto on mosaic_gpu: PanelELL in a forward of a gated layer; of another, and where a gradient "
        "is taken, the program itself takes PanelELL"
    ) in auto
    assert (
        "runs auto on mosaic_gpu: PanelELL in a forward; where a gradient is taken the dense layer" in first
    )
    assert "PanelELL in a forward; where a gradient is taken the program itself takes PanelELL" in more
    assert "not auto on triton: format='auto' is dense on triton under 2048 tokens; got 700" in small
    assert "runs dense on xla" in small
    assert "runs decode on triton: the gate's rows" in few
    assert "runs twell on triton" in named
    with on(CPU):
        refused = dispatch.explain(x, weight, FFNOptions(format="panel"))
    assert NEEDS_GPU in refused
    assert refused.endswith("raises: nothing that was asked for can run this call")


def test_panels_of_hopper_are_128_tokens():
    assert reason("panel", "mosaic_gpu", H200, tokens=128) is None
    assert "has panels of 128 tokens; got panel=64" in reason(
        "panel(tokens=64)", "mosaic_gpu", H200, tokens=128
    )
    assert "at least 128 tokens, one panel; got 64" in reason("panel", "mosaic_gpu", H200)


def test_auto_backend_is_the_first_that_can():
    auto = FFNOptions(format="twell")
    with on(H200):
        assert dispatch.choose(auto, PLAIN) == (Twell(), "mosaic_gpu")
        assert dispatch.choose(auto, PLAIN._replace(d_ff=5633)) == (Twell(), "triton")
        assert dispatch.choose(FFNOptions(format="twell", backend="triton"), PLAIN) == (Twell(), "triton")
        assert dispatch.choose(FFNOptions(format="twell", backend="interpret"), PLAIN) == (
            Twell(),
            "interpret",
        )
        assert dispatch.choose(FFNOptions(format="dense"), PLAIN) == (Dense(), "xla")
    with on(A100):
        assert dispatch.choose(auto, PLAIN) == (Twell(), "triton")


@pytest.mark.parametrize("found", [CPU, V100, AMD], ids=lambda d: d.kind)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_format_asked_for_by_name_raises_the_reason(backend, found):
    with on(found), pytest.raises(ValueError, match=NEEDS_GPU):
        dispatch.choose(FFNOptions(format="twell", backend=backend), PLAIN)


def test_auto_never_interprets():
    """The interpreter is for tests: nobody gets it without asking."""
    with on(CPU), pytest.raises(ValueError, match="backend='interpret' to test"):
        dispatch.choose(FFNOptions(format="twell"), PLAIN)


def test_the_public_call_raises_the_reason():
    """Eagerly and under jit alike, before anything is lowered."""
    weight = jnp.ones((12, 8))
    options = FFNOptions(format="twell", backend="triton")
    for call in (sparse_ffn, jax.jit(sparse_ffn, static_argnames="options")):
        with on(CPU), pytest.raises(ValueError, match=NEEDS_GPU):
            call(jnp.ones((3, 8)), weight, weight, weight, options=options)


@pytest.mark.parametrize("found", [H200, A100, AMD], ids=lambda d: d.kind)
def test_an_abstract_device_is_described(found):
    with on(found):
        assert device.current() == found


def test_the_device_at_hand_is_described():
    described = device.current()
    assert described.platform == jax.default_backend()
    assert described.kind == jax.devices()[0].device_kind


def test_an_explicit_default_device_is_described():
    with jax.default_device(jax.devices("cpu")[0]):
        assert device.current().platform == "cpu"


@pytest.mark.parametrize(
    ("kind", "capability", "kilobytes"),
    [
        ("NVIDIA H100 80GB HBM3", 90, 227),
        ("NVIDIA B200", 100, 227),
        ("NVIDIA A100-SXM4-40GB", 80, 163),
        ("NVIDIA A10G", 86, 99),
        ("NVIDIA L4", 89, 99),
        ("NVIDIA L40S", 89, 99),
        ("NVIDIA GeForce RTX 4090", 89, 99),
        ("NVIDIA GeForce RTX 5090", 120, 99),
        ("NVIDIA GB200", 100, 227),
        ("NVIDIA GH200 480GB", 90, 227),
        ("NVIDIA Quadro of another age", 0, 99),
    ],
)
def test_capabilities_of_abstract_devices(kind, capability, kilobytes):
    """An abstract device has a name and no capability: the name has to give it."""
    with on(Device("gpu", kind, 0, 0)):
        described = device.current()
    assert described.capability == capability
    assert described.shared_memory == kilobytes * 1024
