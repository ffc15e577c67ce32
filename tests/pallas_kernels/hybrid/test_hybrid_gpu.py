"""The HybridELL kernels on an NVIDIA GPU: the contract, random layers with their gradients, the same bits,
memory."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrid_path import HybridPath
from op_checks import call, differentiate
from op_contract import Contract
from random_layers import DENSE, check_errors, errors, random_layer

from pallas_kernels import FFNOptions, Hybrid

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


class TestHybridOnGPU(Contract):
    """At W 45 three tiles of 15 fill a row exactly."""

    path = HybridPath(
        FFNOptions(format=Hybrid(tile=64, width=45), backend="triton"),
        d_model=136,
        d_ff=200,
        many_tokens=16385,
        variants=(
            Hybrid(tile=64, width=15, backup_rows=1),
            Hybrid(width=16, tile=32),
            Hybrid(tile=64, width=1, backup_rows=3),
            Hybrid(tile=64, width=256),
        ),
        tile=64,
        slots=16,
    )


class TestHybridOnGPUAtThePapersWidth(Contract):
    """F and M large enough that the hottest neurons take the dense product; D of several slices."""

    path = HybridPath(
        FFNOptions(format=Hybrid(tile=256, width=128), backend="triton"),
        d_model=1000,
        d_ff=2100,
        many_tokens=4099,
        variants=(
            Hybrid(tile=256, width=31, backup_rows=2),
            Hybrid(tile=128, width=128),
            Hybrid(tile=256, width=500),
        ),
        tokens=33,
        dtype="bfloat16",
        tile=256,
        slots=32,
    )


# -- random layers, forward and backward -------------------------------------------------------------------

DRAWS = 8
LAYERS = [
    # tokens, D, F, width, type, gated
    (1, 64, 200, 128, "bfloat16", True),
    (7, 1000, 2816, 128, "bfloat16", True),
    (100, 1024, 2816, 64, "bfloat16", True),
    (129, 72, 96, 32, "bfloat16", True),
    (255, 300, 1024, 128, "bfloat16", False),
    (777, 260, 777, 16, "bfloat16", True),
    (1024, 2048, 5632, 128, "bfloat16", True),
    (1025, 64, 20000, 256, "bfloat16", True),
    (2048, 640, 2560, 200, "bfloat16", False),
    (4097, 2048, 5632, 128, "bfloat16", True),
    (5000, 512, 2048, 128, "bfloat16", False),
    (1031, 768, 3072, 128, "float16", True),
    (65, 200, 1500, 128, "float32", True),
    (4100, 256, 2048, 128, "float32", True),
]


@pytest.fixture(scope="module")
def compiled_layers():
    """One program for each of `LAYERS`, compiled side by side."""

    def compile_one(case):
        tokens, d_model, d_ff, width, dtype, gated = case
        options = FFNOptions(format=Hybrid(width=width), backend="triton")
        sizes = {"tokens": tokens, "d_model": d_model, "d_ff": d_ff, "dtype": dtype, "gated": gated}
        function = jax.jit(partial(errors, options=options, **sizes))
        return function.lower(jax.random.key(0), jnp.float32(0)).compile()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(compile_one, LAYERS))


@pytest.mark.parametrize(("index", "draw"), list(product(range(len(LAYERS)), range(DRAWS))))
def test_random_layers(compiled_layers, index, draw):
    """No further from f32 than 1.5 times the dense path in the same type; sparsity from 99.9 % to none."""
    rng = np.random.default_rng([index, draw])
    rate = 10 ** rng.uniform(-3, -0.05)
    key = jax.random.key(int(rng.integers(2**31)))
    ours, dense, scale = jax.device_get(compiled_layers[index](key, jnp.float32(rate)))
    check_errors(ours, dense, scale, dtype=LAYERS[index][4])


def test_enough_random_layers():
    assert len(LAYERS) * DRAWS >= 100


# -- the paper's sizes -------------------------------------------------------------------------------------


def training_step(options):
    def step(inputs, dy):
        return differentiate(inputs, dy, 1.0, partial(call, options=options))

    return jax.jit(step)


def paper_layer(tokens, rate=0.008):
    sizes = {"tokens": tokens, "d_model": 2048, "d_ff": 5632, "dtype": "bfloat16", "gated": True}
    inputs = random_layer(jax.random.key(3), rate, **sizes)
    return inputs, jax.random.normal(jax.random.key(4), inputs["x"].shape)


def test_same_bits_at_the_papers_sizes():
    """Hot neurons, lists of every length and overflowing rows: five runs, the same bits everywhere."""
    inputs, dy = paper_layer(16384, rate=0.02)
    step = training_step(FFNOptions(format="hybrid", backend="triton"))
    first = jax.device_get(step(inputs, dy))
    assert 0 < first[0][1].overflow_rows < 16384
    for _ in range(4):
        again = jax.device_get(step(inputs, dy))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert a.tobytes() == b.tobytes()


def test_peak_memory_of_a_training_step():
    """Under what the dense layer's step needs, which keeps three (M, F) arrays."""
    inputs, dy = paper_layer(16384)
    temporary = {
        options.format: training_step(options)
        .lower(inputs, dy)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for options in (FFNOptions(format="hybrid", backend="triton"), DENSE)
    }
    assert temporary["hybrid"] < temporary["dense"]
