"""The weight gradients of hot neurons on Mosaic GPU, where there is no GPU: when a call takes them, what it
becomes, and the warpgroups' protocol under an interpreter that sees races."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from lowering import lowered, shapes
from op_checks import call, differentiate
from plain_weights import PlainSteps

from pallas_kernels import FFNOptions, device
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import pallas_mosaic_gpu_weights, weights
from pallas_kernels.panel import pallas_triton_weights as triton

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])
HOPPER = device.Device("gpu", "NVIDIA H200", 90, 132)
PANEL = 128


@pytest.mark.skipif(VERSION < (0, 11, 2), reason="JAX interprets Mosaic GPU kernels from 0.11.2 on")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(
    ("count", "d_model", "cores", "dtype", "n_hot"),
    [(2, 256, 3, "bfloat16", 150), (3, 320, 4, "float16", 20), (2, 256, 2, "bfloat16", 0)],
    ids=str,
)
def test_the_protocol_under_the_interpreter(count, d_model, cores, dtype, n_hot, monkeypatch):
    """Programs with two tiles, one and none; a panel of no neuron, and a call that ends within a panel.
    To the bit what Triton's gives, of whole numbers and an infinity; slots that no panel has hold NaN."""
    counts, d_ff, cut = [0, 130], 152, 5
    monkeypatch.setattr(device, "current", lambda: dataclasses.replace(HOPPER, cores=cores))
    rng = np.random.default_rng(0)
    slots, used = np.full((len(counts), d_ff), -1, np.int32), np.zeros(len(counts) * 256, bool)
    for panel, n in enumerate(counts):
        slots[panel, rng.permutation(d_ff)[:n]] = 256 * panel + np.arange(n)
        used[256 * panel : 256 * panel + n] = True
    busy = np.flatnonzero(slots[1] == 256 + 3)[0]
    values = [rng.integers(-1, 2, (len(used), PANEL)).astype(np.float32) for _ in range(count)]
    values[0][256 + 3, 7] = np.inf
    zs = [jnp.asarray(np.where(used[:, None], z, np.nan), dtype) for z in values]
    x, dy = (jnp.asarray(rng.integers(-1, 2, (len(counts) * PANEL - cut, d_model)), dtype) for _ in range(2))
    xs = [x] * (count - 1) + [dy]
    order = rng.permutation(d_ff)
    order[[0, np.flatnonzero(order == busy)[0]]] = busy, order[0]
    ranking = triton.Ranking(
        totals=None,
        order=jnp.asarray(order, jnp.int32),
        n_hot=jnp.full((1,), n_hot, jnp.int32),
        starts=None,
    )
    config = configs.HotConfig(64, 64, 32, 4, 2)
    expected = triton.panel_dw_hot(
        zs, xs, ranking, jnp.asarray(slots), config=config, dtype="float32", interpret=True
    )
    found = pallas_mosaic_gpu_weights.panel_dw_hot(
        zs,
        xs,
        ranking,
        jnp.asarray(slots),
        dtype="float32",
        steps=PlainSteps(),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # has no public name

    assert not get_races().races_found
    hot = order[:n_hot]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours[hot], theirs[hot])
    assert np.isfinite(found[0][hot]).all() == (n_hot == 0)
    assert np.isfinite(found[-1][hot]).all()


def test_the_implementation_of_a_call():
    x = jax.ShapeDtypeStruct((65536, 2048), "bfloat16")
    config = configs.heuristic(x, PANEL, HOPPER)
    assert weights.implementation(config, "mosaic_gpu", x) == config.dw_backend == "mosaic_gpu"
    newer = dataclasses.replace(HOPPER, capability=100)
    assert configs.heuristic(x, PANEL, newer).dw_backend == "triton"
    for backend in ("triton", "interpret"):
        assert weights.implementation(config, backend, x) == "triton"
    assert weights.implementation(dataclasses.replace(config, panel=64), "mosaic_gpu", x) == "triton"
    for d_model, dtype in ((192, "bfloat16"), (264, "bfloat16"), (2048, "float32")):
        other = jax.ShapeDtypeStruct((65536, d_model), dtype)
        assert weights.implementation(config, "mosaic_gpu", other) == "triton", other
    with pytest.raises(ValueError, match="dw_backend must be 'triton' or 'mosaic_gpu'; got 'xla'"):
        dataclasses.replace(config, dw_backend="xla")
    with pytest.raises(ValueError, match="mosaic_gpu_share must be at least 1; got 0"):
        configs.RareConfig(mosaic_gpu_share=0)


@pytest.mark.parametrize("kind", ["gated", "non-gated"])
@pytest.mark.parametrize(
    ("d_model", "backend", "share"),
    [(1984, "mosaic_gpu", 96), (1984, "triton", 64), (192, "mosaic_gpu", 64)],
)
def test_a_training_call(d_model, backend, share, kind):
    """One launch on Mosaic GPU for Triton's, and as few tokens of a rare neuron as its own share says."""
    tokens, d_ff = 16512, 5640
    options = FFNOptions(format="panel", backend=backend)
    step = partial(differentiate, dl1=1.0, apply=partial(call, options=options))
    text = lowered(
        step, shapes(tokens, d_model, d_ff, kind=kind), jax.ShapeDtypeStruct((tokens, d_model), jnp.float32)
    )
    launches = re.findall(r'"(panel_\w+)"', text)
    assert launches.count("panel_dw_hot") == (share == 64)
    assert launches.count("panel_dw_rare") == 1
    assert f"tensor<{d_ff}x{tokens // share}xi32>" in text


def test_layers_of_a_batch():
    """As experts are: mapped weights are one launch, and so is a loop over layers."""
    step = partial(differentiate, dl1=1.0, apply=partial(call, options=FFNOptions(format="panel")))
    inputs = {
        name: jax.ShapeDtypeStruct((3, *s.shape), s.dtype) for name, s in shapes(2048, 256, 520).items()
    }
    dy = jax.ShapeDtypeStruct((3, 2048, 256), jnp.float32)

    def loop(inputs, dy):
        return jax.lax.scan(lambda _, layer: (0, jax.checkpoint(step)(*layer)), 0, (inputs, dy))[1]

    for function in (jax.vmap(step), loop):
        text = lowered(function, inputs, dy)
        assert text.count("custom_call @mosaic_gpu_v2") == 6  # gate, up, down, dh, dx and this one
        assert '"panel_dw_hot"' not in text
