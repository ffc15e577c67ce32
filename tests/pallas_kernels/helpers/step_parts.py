"""Checks of the kernels around a decode step's feed-forward layers, on any backend, against float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode
from pallas_kernels.activations import RELU
from pallas_kernels.decode import config as configs

_TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}


def check_attention(heads, kv_heads, head_dim, *, capacity, dtype, interpret):
    """Rows of an empty, a half-filled, an all but full and a full cache, in one split of the positions and in
    several."""
    for splits in (1, 4):
        _check_attention(
            heads, kv_heads, head_dim, splits, capacity=capacity, dtype=dtype, interpret=interpret
        )


def _check_attention(heads, kv_heads, head_dim, splits, *, capacity, dtype, interpret):
    lengths = np.array([0, capacity // 2, capacity - 1, capacity], np.int32)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    qkv = draw(len(lengths), (heads + 2 * kv_heads) * head_dim)
    keys, values = (draw(len(lengths), capacity, kv_heads, head_dim) for _ in range(2))
    angles = rng.uniform(0, 6, (len(lengths), head_dim // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    config = dataclasses.replace(configs.choose_attention(keys), splits=splits)
    if interpret:
        config = dataclasses.replace(config, block=16)  # several blocks of a small cache
    arrivals = jnp.zeros((len(lengths), kv_heads), jnp.int32)
    step = jax.jit(partial(decode.attention, config=config, interpret=interpret))
    with jax.default_matmul_precision("highest"):
        y, new_keys, new_values, left = step(qkv, keys, values, jnp.asarray(lengths), cos, sin, arrivals)
    np.testing.assert_array_equal(left, arrivals)

    parts = np.asarray(qkv, np.float64).reshape(len(lengths), -1, head_dim)
    query, key, value = np.split(parts, (heads, heads + kv_heads), axis=1)
    query, key = (_rounded(_rotated(part, cos[:, None], sin[:, None]), dtype) for part in (query, key))
    for row, length in enumerate(lengths):
        old = [np.asarray(cache[row, :length], np.float64) for cache in (keys, values)]
        all_keys, all_values = (
            np.concatenate([old[0], key[row, None]]),
            np.concatenate([old[1], value[row, None]]),
        )
        of_head = np.arange(heads) // (heads // kv_heads)
        scores = np.einsum("nh,cnh->nc", query[row], all_keys[:, of_head]) / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        want = np.einsum("nc,cnh->nh", weights, all_values[:, of_head])
        _close(y[row], want.ravel(), dtype)
        for new, cache, entry in ((new_keys, keys, key), (new_values, values, value)):
            expected = np.array(cache[row], np.float64)
            if length < capacity:
                expected[length] = entry[row]
            _close(new[row], expected, dtype)
            np.testing.assert_array_equal(new[row, :length], cache[row, :length])


def check_project(tokens, *, d_model, outputs, dtype, interpret):
    """Also that a row's result does not depend on how many others there are, among 3 to 16."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal((n, d_model)), dtype) for n in (tokens, outputs))
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    got = decode.project(x, weight, interpret=interpret)
    assert got.dtype == x.dtype
    _close(got, want, dtype)
    wide = decode.project(x, weight, dtype=jnp.float32, interpret=interpret)
    assert wide.dtype == jnp.float32
    _close(wide, want, "float32")
    if 3 < tokens <= 16:
        fewer = decode.project(x[-3:], weight, interpret=interpret)
        np.testing.assert_array_equal(fewer, got[-3:])


def check_add_norm(tokens, *, d_model, dtype, interpret):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((tokens, d_model)), dtype) for _ in range(2))
    scale = rng.uniform(0.5, 2, d_model).astype(np.float32)
    total, normed = decode.add_norm(x, y, jnp.asarray(scale), eps=1e-5, interpret=interpret)
    np.testing.assert_array_equal(total, x + y)
    wide = np.asarray(total, np.float64)
    want = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * scale
    _close(normed, want, dtype)


def check_stream(tokens, *, d_model, d_ff, dtype, gated, factor, interpret):
    """A residual stream through an output projection, a feed-forward layer and the next layer's projection,
    against the same with kernels for sums and norms between them. Also that the same inputs give the same
    bits."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), dtype)

    x, y, output, qkv = draw(tokens, d_model), draw(tokens, 40), draw(d_model, 40), draw(50, d_model)
    weights = (draw(d_ff, d_model) if gated else None, draw(d_ff, d_model), draw(d_ff, d_model))
    scales = [jnp.asarray(rng.uniform(0.5, 2, d_model), jnp.float32) for _ in range(2)]
    project = partial(decode.project, interpret=interpret)
    add_norm = partial(decode.add_norm, eps=1e-5, interpret=interpret)

    def scaled(values):
        return values if factor == 1 else (values.astype(jnp.float32) * factor).astype(dtype)

    @jax.jit
    def on_stream(x, y):
        first = decode.project_onto(decode.Residual(x, factor), y, output, interpret=interpret)
        normed, onto = first.normed(scales[0], 1e-5), decode.Residual(first.x, factor)
        second = decode.layer_onto(onto, normed, *weights, rule=RELU, interpret=interpret)
        return first.x, second.x, project(second.normed(scales[1], 1e-5), qkv)

    @jax.jit
    def with_norms(x):
        first, normed = add_norm(x, scaled(project(y, output)), scales[0])
        h, _ = decode.layer.run(normed, *weights, rule=RELU, interpret=interpret)
        second, normed = add_norm(first, scaled(h), scales[1])
        return first, second, project(normed, qkv)

    got, want = on_stream(x, y), with_norms(x)
    jax.tree.map(np.testing.assert_array_equal, on_stream(x, y), got)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        _close(one, np.asarray(other, np.float64), dtype)
    np.testing.assert_array_equal(got[0], want[0])


def _rotated(part, cos, sin):
    first, second = np.split(part, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rounded(values, dtype):
    return np.asarray(jnp.asarray(values, dtype), np.float64)


def _close(got, want, dtype):
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=_TOLERANCE[dtype] * max(1e-30, np.abs(want).max()))
