"""Forwards that ``format="auto"`` takes to be PanelELL's without looking at a panel."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import FFNOptions, auto, device, dispatch, sparse_ffn, sparse_mlp
from pallas_kernels.options import Auto
from pallas_kernels.panel.unasked import is_unasked

H200 = device.Device("gpu", "NVIDIA H200", 90, 132)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: H200)


def unasked(tokens, d_model=2048, d_ff=5632, backend="mosaic_gpu", gated=True, **of_layout):
    x = jax.ShapeDtypeStruct((tokens, d_model), jnp.bfloat16)
    w_up = jax.ShapeDtypeStruct((d_ff, d_model), jnp.bfloat16)
    return is_unasked(x, w_up, Auto(**of_layout), backend, gated=gated)


def test_few_panels_are_not_asked_about():
    assert [unasked(tokens, gated=False) for tokens in (1023, 1024, 8192, 8193)] == [False, True, True, False]


def test_nor_are_many_whose_products_are_all_on_mosaic_gpu():
    assert unasked(8193)
    assert unasked(65536)
    assert unasked(65536, block_tokens=65536)
    assert not unasked(65536, block_tokens=32768)
    assert not unasked(65536, gated=False)
    assert not unasked(65536, d_model=32768, d_ff=131072)  # more than 4 GiB of a weight


@pytest.mark.parametrize("tokens", [2048, 65536])
def test_those_on_triton_are_asked_about(tokens):
    assert not unasked(tokens, backend="triton")


@pytest.mark.parametrize(("gated", "asked"), [(True, False), (False, True)])
def test_a_forward_has_a_probe_only_where_it_is_asked_about(monkeypatch, gated, asked):
    probed = []
    pays = auto.pays
    monkeypatch.setattr(auto, "pays", lambda *args: probed.append(1) or pays(*args))
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((16384, 128), (512, 128)))
    options = FFNOptions(backend="mosaic_gpu")
    assert dispatch.choose(options, dispatch.Call.of(x, w)) == (Auto(), "mosaic_gpu")
    layer, weights = (sparse_ffn, (w, w, w)) if gated else (sparse_mlp, (w, w))
    jax.clear_caches()  # a layer that was traced by another test is not traced again
    jax.eval_shape(lambda *arrays: layer(*arrays, options=options), x, *weights)
    assert bool(probed) == asked
    jax.clear_caches()
