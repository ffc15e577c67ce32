"""The TwELL kernels on an NVIDIA GPU: the contract, random layers, and sizes that only a GPU can afford."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designed import layer
from op_checks import Path, call, check_counts, check_values, run
from op_contract import Contract
from random_layers import DENSE, random_layer

from pallas_kernels import FFNOptions, Twell, device, dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


class TestTwELLOnGPU(Contract):
    path = Path(
        FFNOptions(format=Twell(tile=64, compression=4), backend="triton"),
        d_model=136,
        d_ff=200,
        many_tokens=16385,
        variants=(
            Twell(tile=32, compression=2),
            Twell(tile=64, compression=1),
            Twell(tile=64, compression=16, backup_rows=1),
        ),
        tile=64,
        slots=16,
    )


class TestTwELLOnGPUAtThePapersTile(Contract):
    path = Path(
        FFNOptions(format=Twell(tile=256, compression=8), backend="triton"),
        d_model=1000,
        d_ff=700,
        many_tokens=1027,
        variants=(
            Twell(tile=128, compression=8),
            Twell(tile=256, compression=1),
            Twell(tile=256, compression=128, backup_rows=2),
        ),
        tile=256,
        slots=32,
    )


class TestTwELLOnHopper(Contract):
    """The Mosaic GPU gate, which takes only a D and an F that its tiles divide: all else is skipped with its
    reason."""

    path = Path(
        FFNOptions(format=Twell(tile=256, compression=8), backend="mosaic_gpu"),
        d_model=128,
        d_ff=520,
        many_tokens=1031,
        variants=(
            Twell(tile=128, compression=16),
            Twell(tile=256, compression=1),
            Twell(tile=256, compression=128, backup_rows=2),
        ),
        tokens=61,
        dtype="bfloat16",
        partial=True,
        tile=256,
        slots=32,
    )

    def test_the_plain_call_is_not_skipped(self):
        if dispatch.device_reason("mosaic_gpu", device.current()):
            pytest.skip("Mosaic GPU does not run on this GPU")
        self.skip_unsupported = lambda inputs, options: None
        self.test_pattern("uneven", "bfloat16", "gated")


# -- random layers -----------------------------------------------------------------------------------------

DRAWS = 9
LAYERS = [
    # tokens, D, F, tile, compression, type, gated
    (1, 64, 200, 64, 4, "bfloat16", True),
    (2, 2048, 5632, 256, 8, "bfloat16", True),
    (7, 1000, 2816, 256, 8, "bfloat16", True),
    (16, 512, 1032, 128, 4, "bfloat16", False),
    (33, 136, 5000, 256, 4, "bfloat16", True),
    (100, 1024, 2816, 256, 2, "bfloat16", True),
    (128, 2048, 5632, 256, 8, "bfloat16", True),
    (129, 72, 96, 32, 1, "bfloat16", True),
    (255, 300, 1024, 64, 2, "bfloat16", False),
    (333, 2048, 8192, 256, 8, "bfloat16", False),
    (500, 96, 3000, 128, 8, "bfloat16", True),
    (512, 4096, 1024, 256, 8, "bfloat16", True),
    (777, 260, 777, 32, 4, "bfloat16", True),
    (1000, 1024, 1000, 128, 16, "bfloat16", True),
    (1024, 2048, 5632, 256, 8, "bfloat16", True),
    (1025, 64, 65536, 256, 8, "bfloat16", True),
    (2048, 640, 2560, 256, 16, "bfloat16", False),
    (3001, 120, 1111, 64, 8, "bfloat16", True),
    (4097, 2048, 5632, 256, 8, "bfloat16", True),
    (5000, 1600, 4096, 128, 8, "bfloat16", True),
    (257, 513, 2049, 256, 8, "float16", True),
    (1031, 768, 3072, 128, 8, "float16", False),
    (65, 200, 1500, 64, 4, "float32", True),
    (700, 512, 2048, 128, 8, "float32", False),
]
HOPPER_LAYERS = [
    (8, 2048, 5632, 256, 8, "bfloat16", True),
    (1000, 1024, 2816, 128, 4, "bfloat16", True),
    (4096, 2048, 5632, 256, 8, "bfloat16", True),
    (1016, 64, 65536, 256, 16, "float16", True),
    (2048, 4096, 14336, 256, 8, "bfloat16", False),
]
CASES = [("triton", case) for case in LAYERS] + [("mosaic_gpu", case) for case in HOPPER_LAYERS]


def errors(key, rate, *, options, **sizes):
    """Largest and root-mean-square error of y by TwELL and by the dense path against f32, and its scale."""
    inputs = random_layer(key, rate, **sizes)
    with jax.default_matmul_precision("highest"):
        true, _ = call({name: value.astype(jnp.float32) for name, value in inputs.items()}, DENSE)
    exact_products = "highest" if sizes["dtype"] == "float32" else None
    with jax.default_matmul_precision(exact_products):
        (y, stats), (dense, expected) = call(inputs, options), call(inputs, DENSE)

    def distance(values):
        error = values.astype(jnp.float32) - true
        return jnp.max(jnp.abs(error)), jnp.sqrt(jnp.mean(error**2))

    scale = jnp.max(jnp.abs(true)), jnp.sqrt(jnp.mean(true**2))
    return distance(y), distance(dense), scale, (stats, expected)


@pytest.fixture(scope="module")
def compiled_layers():
    """One program for each of `CASES` that this device can run, compiled side by side."""

    def compile_one(backend_and_case):
        backend, (tokens, d_model, d_ff, tile, compression, dtype, gated) = backend_and_case
        if backend == "mosaic_gpu" and dispatch.device_reason("mosaic_gpu", device.current()):
            return None
        options = FFNOptions(format=Twell(tile=tile, compression=compression), backend=backend)
        sizes = {"tokens": tokens, "d_model": d_model, "d_ff": d_ff, "dtype": dtype, "gated": gated}
        function = jax.jit(partial(errors, options=options, **sizes))
        return function.lower(jax.random.key(0), jnp.float32(0)).compile()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(compile_one, CASES))


@pytest.mark.parametrize(("index", "draw"), list(product(range(len(CASES)), range(DRAWS))))
def test_random_layers(compiled_layers, index, draw):
    """No further from f32 than 1.5 times the dense path in the same type; sparsity from 99.9 % to none."""
    if compiled_layers[index] is None:
        pytest.skip("Mosaic GPU does not run on this GPU")
    rng = np.random.default_rng([index, draw])
    rate = 10 ** rng.uniform(-3, -0.05)
    key = jax.random.key(int(rng.integers(2**31)))
    result = jax.device_get(compiled_layers[index](key, jnp.float32(rate)))
    ours, dense, scale, (stats, expected) = result
    tokens, *_, dtype, _ = CASES[index][1]
    # Where the dense error is by chance far smaller: what rounding y once costs; in f32, the
    # order of summation.
    ulp = float(jnp.finfo(dtype).eps)
    floors = (32 * ulp, 4 * ulp) if dtype == "float32" else (ulp / 2, ulp / 4)
    for error, reference, size, floor in zip(ours, dense, scale, floors, strict=True):
        assert error <= 1.5 * max(reference, floor * size)
    # A gate at zero but for rounding may be active in one order of summation and not in another.
    np.testing.assert_allclose(stats.l0, expected.l0, rtol=1e-3, atol=1 / tokens)
    np.testing.assert_allclose(stats.l1, expected.l1, rtol=4 * ulp + 1e-3, atol=1e-6)
    assert np.abs(stats.neuron_hits - expected.neuron_hits).sum() <= max(2, 1e-3 * expected.neuron_hits.sum())


def test_enough_random_layers():
    assert len(LAYERS) * DRAWS >= 200


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_model", "d_ff", "pattern"),
    [(16, 16384, "few"), (2056, 256, "one-over")],
    ids=["words", "x"],
)
def test_offsets_past_two_to_the_31(d_model, d_ff, pattern):
    """A million tokens, so that the packed words, or x and y, pass 2^31 elements:
    first, last and middle rows."""
    tokens = 2**20 + 3
    options = FFNOptions(format=Twell(tile=256, compression=8), backend="triton")
    sizes = {
        "d_model": d_model,
        "d_ff": d_ff,
        "tile": 256,
        "slots": options.format.slots,
        "dtype": jnp.bfloat16,
    }
    few, active = layer(pattern, tokens=4096, **sizes)
    repeats = -(-tokens // 4096)

    @jax.jit
    def million(inputs):
        x = jnp.tile(inputs["x"], (repeats, 1))[:tokens]
        y, stats = call(inputs | {"x": x}, options)
        first = y[:4096].astype(jnp.float32)
        whole = y[: tokens // 4096 * 4096].reshape(-1, *first.shape)
        furthest = jnp.max(jnp.abs(whole - first[None]), axis=(1, 2))
        rest = y[whole.shape[0] * 4096 :]
        return first.astype(y.dtype), furthest, rest, stats

    first, furthest, rest, stats = jax.device_get(million(few))
    assert max(tokens * -(-d_ff // 256) * options.format.slots, tokens * d_model) > 2**31
    check_values(first, stats, few)
    ulp = float(jnp.finfo(first.dtype).eps) * np.abs(first.astype(np.float32)).max()
    assert furthest.max() <= ulp, (
        f"rows differ from the same rows at 0: {np.flatnonzero(furthest > ulp)} * 4096"
    )
    np.testing.assert_allclose(
        rest.astype(np.float32), first[: len(rest)].astype(np.float32), rtol=0, atol=ulp
    )
    counted = np.concatenate([active] * repeats)[:tokens]
    overflowing = Path(options, d_model, d_ff, tokens).overflow_rows(counted)
    check_counts(stats, counted, overflowing)


def test_without_jit():
    path = TestTwELLOnGPU.path
    inputs, active = path.layer("uneven", 7, "float32")
    y, stats = run(partial(call, options=path.options), jax.tree.map(jnp.asarray, inputs))
    check_values(y, stats, inputs)
    check_counts(stats, active, path.overflow_rows(active))


def test_peak_memory():
    """At C = 8, where the gate packs its own product, a call's temporaries are under 15 % of the dense
    layer's three (M, F) intermediates."""
    if device.current().capability > 90:
        pytest.skip("the gate is XLA's product, an (M, F) array, before it is packed")
    options = FFNOptions(format="twell")
    tokens, d_model, d_ff = 65536, 2048, 5632
    weight = jax.ShapeDtypeStruct((d_ff, d_model), jnp.bfloat16)
    inputs = {"x": jax.ShapeDtypeStruct((tokens, d_model), jnp.bfloat16)}
    inputs |= dict.fromkeys(("w_gate", "w_up", "w_down"), weight)
    compiled = jax.jit(partial(call, options=options)).lower(inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.15 * 3 * tokens * d_ff * 2
