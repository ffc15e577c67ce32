"""A model whose layers run in several formats is the model, and costs no copies of its weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import FFNOptions
from pallas_kernels.options import Dense, Panel
from sparse_lm import LayerPlan, ModelConfig, SparseLM, SparsityConfig
from sparse_lm.layer_plan import Segment

CONFIG = ModelConfig(
    vocab_size=61, d_model=16, d_ff=32, num_layers=4, num_heads=2, num_kv_heads=1, context_length=16,
    dtype="float32", init_std=0.3, ffn=FFNOptions("dense"),
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 16))
# The same arithmetic under several names.
IN_TWO = LayerPlan((Dense(), Dense(), Dense(16), Dense(16)))
IN_THREE = LayerPlan((Dense(), Dense(16), Dense(16), Dense()))


def values_and_gradient(config, plan=None, tokens=TOKENS):
    model = SparseLM(config, rngs=nnx.Rngs(0), plan=plan)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        logits, stats = nnx.merge(graphdef, params, rest)(tokens)
        ce = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])
        return ce + 0.1 * jnp.mean(stats.l1), (logits, stats)

    gradient, (logits, stats) = jax.jit(jax.grad(loss, has_aux=True))(params, rest)
    return logits, stats, nnx.to_pure_dict(gradient)


def assert_close(found, wanted):
    """f32 sums in another order."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * abs(b).max()), found, wanted
    )


@functools.cache
def of_one_scan():
    return values_and_gradient(CONFIG)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "sparse"])
def test_scans_of_segments_change_no_bit(remat):
    found, wanted = values_and_gradient(dataclasses.replace(CONFIG, remat=remat), IN_TWO), of_one_scan()
    assert found[1].pairs[:2].tolist() == [0, 0]
    assert found[1].pairs[2:].min() > 0
    without_pairs = [dataclasses.replace(stats, pairs=None) for _, stats, _ in (found, wanted)]
    jax.tree.map(
        np.testing.assert_array_equal, (*found[::2], without_pairs[0]), (*wanted[::2], without_pairs[1])
    )


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
def test_layers_alone_change_nothing_but_how_xla_fuses_them(layer_loop):
    found, wanted = (
        values_and_gradient(dataclasses.replace(CONFIG, layer_loop=layer_loop), IN_THREE),
        of_one_scan(),
    )
    assert_close(found[2], wanted[2])
    assert_close(found[0], wanted[0])


def test_panels_and_an_order_of_the_tokens_beside_dense_layers():
    """The first layer, whose input makes the order, then stands alone."""
    config = dataclasses.replace(CONFIG, num_layers=3, token_order="hash")
    plan = LayerPlan((Dense(16), Dense(16), Panel(16, 1.0)))
    assert plan.segments(first_alone=True) == [
        Segment(0, 1, Dense(16)), Segment(1, 2, Dense(16)), Segment(2, 3, Panel(16, 1.0)),
    ]  # fmt: skip
    tokens = np.tile(TOKENS, (16, 1))
    wanted = values_and_gradient(config, tokens=tokens)
    planned = dataclasses.replace(config, ffn=FFNOptions(backend="interpret"))
    found = values_and_gradient(planned, plan, tokens)
    np.testing.assert_array_equal(found[1].overflow_rows, [0, 0, 0])
    np.testing.assert_array_equal(found[1].dense_tokens, [512, 512, 0])
    assert found[1].pairs.min() > 0
    assert_close(found[2], wanted[2])
    assert_close(found[0], wanted[0])
    assert_close(found[1].l1, wanted[1].l1)


def test_weights_and_gradients_exist_once():
    """What a program needs beside its arguments grows with its activations, not with its weights."""
    config = dataclasses.replace(CONFIG, d_ff=4096, layer_loop="unrolled")

    def temporary_bytes(plan):
        graphdef, state = nnx.split(SparseLM(config, rngs=nnx.Rngs(0), plan=plan))

        def loss(state):
            return jnp.mean(nnx.merge(graphdef, state)(TOKENS[:1, :4])[0])

        return jax.jit(jax.grad(loss)).lower(state).compile().memory_analysis().temp_size_in_bytes

    weights = 4 * 3 * 4096 * 16 * 4
    more = temporary_bytes(IN_TWO) - temporary_bytes(None)
    assert more < 0.01 * weights


def test_a_plan_is_text_and_says_what_it_is():
    plan = LayerPlan((Dense(64), *[Panel(capacity=0.125)] * 2, Dense()))
    assert LayerPlan.parse(plan.texts) == plan
    assert plan.texts == ["dense(tokens=64)", *["panel(capacity=0.125)"] * 2, "dense"]
    assert str(plan) == "dense(tokens=64), 2 × panel(capacity=0.125), dense"


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a format for each of the model's 4 layers; got 1"):
        SparseLM(CONFIG, rngs=nnx.Rngs(0), plan=LayerPlan((Dense(),)))
    silu = dataclasses.replace(CONFIG, activation="silu", sparsity=SparsityConfig(l1=0.0))
    with pytest.raises(ValueError, match="a plan is for layers with silent neurons"):
        SparseLM(silu, rngs=nnx.Rngs(0), plan=IN_TWO)
