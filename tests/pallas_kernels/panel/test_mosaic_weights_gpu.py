"""The weight gradients of hot neurons on Mosaic GPU on a Hopper GPU: to the bit against Triton's, and whole
calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_checks import DL1, call, check_gradients, differentiate
from panel_path import PanelPath

from pallas_kernels import FFNOptions, Panel, device
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import pallas_mosaic_gpu_weights
from pallas_kernels.panel import pallas_triton_weights as triton

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("count", "tokens", "d_model", "n_hot", "dtype", "out"),
    [
        (3, 4099, 2048, 700, "bfloat16", "float32"),
        (2, 1000, 320, 129, "float16", "float16"),
        (3, 1024, 256, 0, "bfloat16", "bfloat16"),
    ],
    ids=str,
)
def test_every_row_as_on_triton(count, tokens, d_model, n_hot, dtype, out):
    """Of random values, among them NaN in slots that no panel has."""
    if device.current().capability != 90:
        pytest.skip("needs a Hopper GPU")
    d_ff, room = 1000, 640
    rng = np.random.default_rng(tokens)
    n_panels = -(-tokens // 128)
    slots, used = np.full((n_panels, d_ff), -1, np.int32), np.zeros(n_panels * room, bool)
    for panel, n in enumerate(rng.integers(0, room, n_panels)):
        slots[panel, rng.permutation(d_ff)[:n]] = room * panel + np.arange(n)
        used[room * panel : room * panel + n] = True
    zs = [
        jnp.asarray(np.where(used[:, None], rng.standard_normal((len(used), 128)), np.nan), dtype)
        for _ in range(count)
    ]
    x, dy = (jnp.asarray(rng.standard_normal((tokens, d_model)), dtype) for _ in range(2))
    xs, order = [x] * (count - 1) + [dy], rng.permutation(d_ff)
    ranking = triton.Ranking(
        totals=None,
        order=jnp.asarray(order, jnp.int32),
        n_hot=jnp.full((1,), n_hot, jnp.int32),
        starts=None,
    )
    table, config = jnp.asarray(slots), configs.HotConfig(128, 256, 32, 8, 8, 1)
    expected = triton.panel_dw_hot(zs, xs, ranking, table, config=config, dtype=out)
    function = jax.jit(lambda *given: pallas_mosaic_gpu_weights.panel_dw_hot(*given, dtype=out))
    found, again = (function(zs, xs, ranking, table) for _ in range(2))
    hot = order[:n_hot]
    for ours, twice, theirs in zip(found, again, expected, strict=True):
        ours, twice, theirs = (np.asarray(each)[hot].astype(np.float32) for each in (ours, twice, theirs))
        assert np.isfinite(theirs).all()
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(twice, ours)


PATH = PanelPath(
    FFNOptions(format=Panel(capacity=1.0), backend="mosaic_gpu"),
    d_model=256,
    d_ff=536,
    many_tokens=0,
    tile=64,
    slots=16,
)


@pytest.mark.parametrize(("pattern", "dtype"), [("uneven", "bfloat16"), ("fully-dense", "float16")])
def test_gradients_of_a_call(pattern, dtype):
    if device.current().capability != 90:
        pytest.skip("needs a Hopper GPU")
    inputs, _ = PATH.layer(pattern, 1033, dtype)
    dy = np.random.default_rng(0).integers(-2, 3, (1033, 256)).astype(np.float32)
    step = jax.jit(partial(differentiate, dl1=DL1, apply=partial(call, options=PATH.options)))
    assert '"panel_dw_hot"' not in step.lower(inputs, dy).as_text()
    _, gradients = step(inputs, dy)
    check_gradients(jax.tree.map(np.asarray, gradients), inputs, dy, DL1)
