"""The PanelELL kernels on an NVIDIA GPU: the contract, random layers with their
gradients, adversarial inputs."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_contract import Contract
from panel_path import PanelPath, check_a_batch_of_which_one_has_no_room
from random_layers import check_errors, errors

from pallas_kernels import FFNOptions, Panel, device, dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


class TestPanelOnGPU(Contract):
    path = PanelPath(
        FFNOptions(format=Panel(tokens=32, capacity=1.0), backend="triton"),
        d_model=136,
        d_ff=200,
        many_tokens=16385,
        variants=(
            Panel(tokens=16, capacity=1.0),
            Panel(tokens=64, capacity=0.5),
            Panel(tokens=32, capacity=1e-06),
        ),
        tile=64,
        slots=16,
    )


class TestPanelOnGPUAt128Tokens(Contract):
    path = PanelPath(
        FFNOptions(format=Panel(tokens=128, capacity=1.0), backend="triton"),
        d_model=1000,
        d_ff=700,
        many_tokens=1027,
        variants=(
            Panel(tokens=64, capacity=1.0),
            Panel(tokens=128, capacity=0.5),
            Panel(tokens=128, capacity=1e-06),
        ),
        tokens=130,
        dtype="bfloat16",
        tile=64,
        slots=16,
    )


class TestPanelOnHopper(Contract):
    """The Mosaic GPU gate, which takes only a D and an F that its tiles divide, and no less than a panel of
    tokens: all else is skipped with its reason."""

    path = PanelPath(
        FFNOptions(format=Panel(capacity=1.0), backend="mosaic_gpu"),
        d_model=128,
        d_ff=520,
        many_tokens=1031,
        variants=(
            Panel(tokens=128, capacity=0.5),
            Panel(tokens=128, capacity=1e-06),
        ),
        tokens=133,
        dtype="bfloat16",
        partial=True,
        tile=64,
        slots=16,
    )

    def test_the_plain_call_is_not_skipped(self):
        if dispatch.device_reason("mosaic_gpu", device.current()):
            pytest.skip("Mosaic GPU does not run on this GPU")
        self.skip_unsupported = lambda inputs, options: None
        self.test_pattern("uneven", "bfloat16", "gated")


@pytest.mark.parametrize("backend", ["triton", "mosaic_gpu"])
def test_a_batch_of_which_one_has_no_room(backend):
    if backend == "mosaic_gpu" and dispatch.device_reason("mosaic_gpu", device.current()):
        pytest.skip("Mosaic GPU does not run on this GPU")
    options = FFNOptions(format="panel", backend=backend)
    check_a_batch_of_which_one_has_no_room(options, d_model=128, d_ff=1024, tokens=512)


# -- random layers, forward and backward -------------------------------------------------------------------

DRAWS = 8
LAYERS = [
    # backend, tokens, D, F, capacity, type, gated
    ("triton", 1, 64, 200, 0.25, "bfloat16", True),
    ("triton", 7, 1000, 2816, 0.5, "bfloat16", True),
    ("triton", 100, 1024, 2816, 0.25, "bfloat16", True),
    ("triton", 129, 72, 96, 1.0, "bfloat16", True),
    ("triton", 255, 300, 1024, 0.25, "bfloat16", False),
    ("triton", 777, 260, 777, 0.25, "bfloat16", True),
    ("triton", 1024, 2048, 5632, 0.25, "bfloat16", True),
    ("triton", 1025, 64, 20000, 0.1, "bfloat16", True),
    ("triton", 2048, 640, 2560, 0.5, "bfloat16", False),
    ("triton", 1031, 768, 3072, 0.25, "float16", True),
    ("triton", 65, 200, 1500, 0.5, "float32", True),
    ("mosaic_gpu", 136, 2048, 5632, 0.5, "bfloat16", True),
    ("mosaic_gpu", 1000, 64, 2816, 0.25, "bfloat16", True),
    ("mosaic_gpu", 4096, 2048, 5632, 0.25, "bfloat16", True),
    ("mosaic_gpu", 2048, 1024, 4104, 1.0, "float16", False),
]


@pytest.fixture(scope="module")
def compiled_layers():
    """One program for each of `LAYERS` that this device can run, compiled side by side."""

    def compile_one(case):
        backend, tokens, d_model, d_ff, capacity, dtype, gated = case
        if backend == "mosaic_gpu" and dispatch.device_reason("mosaic_gpu", device.current()):
            return None
        options = FFNOptions(format=Panel(capacity=capacity), backend=backend)
        sizes = {"tokens": tokens, "d_model": d_model, "d_ff": d_ff, "dtype": dtype, "gated": gated}
        function = jax.jit(partial(errors, options=options, **sizes))
        return function.lower(jax.random.key(0), jnp.float32(0)).compile()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(compile_one, LAYERS))


@pytest.mark.parametrize(("index", "draw"), list(product(range(len(LAYERS)), range(DRAWS))))
def test_random_layers(compiled_layers, index, draw):
    """No further from f32 than 1.5 times the dense path in the same type; sparsity from 99.9 % to none."""
    if compiled_layers[index] is None:
        pytest.skip("Mosaic GPU does not run on this GPU")
    rng = np.random.default_rng([index, draw])
    rate = 10 ** rng.uniform(-3, -0.05)
    key = jax.random.key(int(rng.integers(2**31)))
    ours, dense, scale = jax.device_get(compiled_layers[index](key, jnp.float32(rate)))
    check_errors(ours, dense, scale, dtype=LAYERS[index][5])


def test_enough_random_layers():
    assert len(LAYERS) * DRAWS >= 100
