"""The model made ready for inference computes what the model does."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowering import lowered

from sparse_lm import SparseLM, SparsityConfig
from sparse_lm.generate import generate
from sparse_lm.inference import InferenceModel, LayerCaches
from sparse_lm.rope import RopeScaling

SCALED = {
    "activation": "relu2",
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "logit_divisor": 2.0,
    "rope_scaling": RopeScaling("yarn", factor=4.0, original_context=4),
}
"""Every figure that some family of models has and others do not."""


@pytest.mark.parametrize("name", ["model", "tied_model", "scaled", "ordered"])
def test_logits_equal_the_models(name, request, config, forward, tokens):
    """A prompt, then one token, then several: at every place what the whole forward gives."""
    changes = {"scaled": SCALED, "ordered": {"token_order": "centroids"}}
    if name in changes:
        model = SparseLM(dataclasses.replace(config, **changes[name]), rngs=nnx.Rngs(0))
    else:
        model = request.getfixturevalue(name)
    want, _ = forward(*nnx.split(model), tokens)
    ready = InferenceModel.of(model)
    counts = jnp.array([3, 1, 5, 2], jnp.int32)
    hidden, cache = jax.jit(ready.prefill, static_argnums=2)(tokens[:, :5], counts, 12)
    rows = np.arange(4)
    np.testing.assert_allclose(ready.logits(hidden), want[rows, counts - 1], atol=2e-5, rtol=2e-5)
    extend = jax.jit(ready.extend, donate_argnums=1)
    for steps in (1, 4):
        places = np.asarray(cache.lengths)[:, None] + np.arange(steps)
        hidden, cache = extend(tokens[rows[:, None], places], cache)
        np.testing.assert_allclose(ready.logits(hidden), want[rows[:, None], places], atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(cache.lengths, counts + 5)


def test_weights_are_cast_and_scales_are_not(config):
    model = SparseLM(dataclasses.replace(config, dtype="bfloat16"), rngs=nnx.Rngs(0))
    ready = InferenceModel.of(model)
    assert len(ready.layers) == config.num_layers
    wide = {leaf.shape for leaf in jax.tree.leaves(ready) if leaf.dtype == jnp.float32}
    assert wide == {(config.d_model,)}
    np.testing.assert_array_equal(ready.layers[1].w_up, model.blocks.ffn.w_up[...][1].astype(jnp.bfloat16))


def test_a_step_writes_its_cache_in_place(model):
    """The compiled step holds no second copy of a donated cache."""
    ready = InferenceModel.of(model)
    _, cache = ready.prefill(jnp.ones((2, 2), jnp.int32), jnp.array([2, 2], jnp.int32), 16)
    compiled = jax.jit(ready.extend, donate_argnums=1).lower(jnp.ones((2, 1), jnp.int32), cache).compile()
    memory = compiled.memory_analysis()
    size = sum(leaf.nbytes for leaf in (*cache.keys, *cache.values))
    assert memory.alias_size_in_bytes >= size


SILU = {"activation": "silu", "sparsity": SparsityConfig(l1=0)}
WIDE = {"d_model": 128, "num_heads": 4, "num_kv_heads": 2, "d_ff": 48, "num_layers": 2}
"""Heads that the attention kernel takes."""


@pytest.mark.parametrize(
    ("format", "changes"),
    [
        ("decode", {}),
        ("decode", {"gated": False, "qkv_bias": False, "num_layers": 1} | SCALED),
        ("auto", {"residual_scale": 0.5, "num_layers": 1}),  # few tokens, interpreted, are dense
    ],
    ids=["decode", "decode, scaled", "dense"],
)
def test_a_step_of_kernels_equals_a_step_of_xla(config, format, changes):
    """One kernel for each part of a step, interpreted, on rows of different lengths and a full one."""
    plain, kernels = _plain_and_kernels(config, format, WIDE | changes)
    config = plain.config
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, config.vocab_size)
    _, cache = plain.prefill(tokens, jnp.array([7, 1, 4], jnp.int32), 8)
    extend = jax.jit(kernels.extend)
    for _ in range(2):  # the second step finds the first row's cache full
        hidden, want = plain.extend(tokens[:, :1], cache)
        got_hidden, got = extend(tokens[:, :1], cache)
        rows = slice(1, None) if cache.lengths[0] == 8 else slice(None)
        np.testing.assert_allclose(got_hidden[rows], hidden[rows], atol=1e-4, rtol=1e-4)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one[rows], other[rows], atol=1e-4, rtol=1e-4)
        logits = kernels.logits(got_hidden[:, 0])
        np.testing.assert_allclose(logits, plain.logits(got_hidden)[:, 0], atol=1e-4, rtol=1e-4)
        cache = want


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_of_kernels_give_the_text_of_xla(config, rows):
    plain, kernels = _plain_and_kernels(config, "decode", WIDE | {"num_layers": 1})
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4]][:rows]
    want = generate(plain, prompts, max_new_tokens=5)
    assert generate(kernels, prompts, max_new_tokens=5) == want


def _plain_and_kernels(config, format, changes):
    """A model whose steps XLA runs, and the same whose steps are kernels, interpreted."""
    config = dataclasses.replace(config, **changes)
    plain = InferenceModel.of(SparseLM(config, rngs=nnx.Rngs(0)))
    options = dataclasses.replace(config.ffn, format=format, backend="interpret")
    return plain, dataclasses.replace(plain, config=dataclasses.replace(config, ffn=options))


@pytest.mark.parametrize(
    ("rows", "changes", "kernels"),
    [
        (2, {}, ["rows_project", "attention", "rows_project", "rows_hidden", "sum"]),
        (3, {}, ["project", "attention", "project", "add_norm", "hidden", "down", "add_norm"]),
        (3, SILU, ["project", "attention", "project", "add_norm", "add_norm"]),
        (3, {"dtype": "float32"}, ["project", "attention", "project", "add_norm", "add_norm"]),
    ],
    ids=["vectors", "tensor cores", "silu", "float32"],
)
def test_kernels_of_a_step(config, rows, changes, kernels):
    """In their order, lowered for a GPU: of one or two rows sums and norms are parts of other kernels, where
    the feed-forward layers run those."""
    config = dataclasses.replace(config, **WIDE | {"dtype": "bfloat16"} | changes)
    ready = InferenceModel.of(SparseLM(config, rngs=nnx.Rngs(0)))
    kv = [jax.ShapeDtypeStruct((rows, 8, config.num_kv_heads, config.head_dim), config.dtype)] * 2
    cache = LayerCaches(tuple(kv), tuple(kv), jax.ShapeDtypeStruct((rows,), jnp.int32))
    text = lowered(ready.extend, jax.ShapeDtypeStruct((rows, 1), jnp.int32), cache)
    assert _kernels(text) == kernels * config.num_layers


def _kernels(text):
    """Decode's kernels in the order in which a program runs them; layers that are alike are one function."""
    name = r'@("[^"]+"|[\w.$]+)'
    functions = {
        re.match(rf"\w+ {name}", part)[1]: re.findall(rf'name = "decode_(\w+)"|\bcall {name}', part)
        for part in text.split("\n  func.func ")[1:]
    }

    def of(function):
        for kernel, called in functions[function]:
            yield from [kernel] if kernel else of(called)

    return list(of("main"))
