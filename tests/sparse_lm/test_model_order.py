"""The model's own order: it changes no result, is left out where it cannot pay, and follows the weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lowering import lowered

from pallas_kernels import FFNOptions
from sparse_lm import ModelConfig, SparseLM, clusters, model_order

ORDERS = ("id", "vocabulary", "centroids", "hash")


@pytest.fixture(scope="module", autouse=True)
def orders_of_few_tokens():
    """So that tiny models have an order: 16 tokens of a device are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_order, "LEAST_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def tokens(config):
    return jax.random.randint(jax.random.key(7), (8, config.context_length), 0, config.vocab_size)


def build(config, name, tokens, **changes):
    """A model of that order, refreshed once: its structure, parameters and what else it holds."""
    config = dataclasses.replace(config, token_order=name, token_clusters=5, **changes)
    model = SparseLM(config, rngs=nnx.Rngs(0))
    model.refresh_token_order(tokens)
    return nnx.split(model, nnx.Param, ...)


def loss_and_gradients(graphdef, params, others, tokens):
    def loss(params):
        logits, stats = nnx.merge(graphdef, params, others)(tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2) + 1e-3 * jnp.mean(stats.l1), stats

    return jax.value_and_grad(loss, has_aux=True)(params)


step = jax.jit(loss_and_gradients, static_argnums=0)


@pytest.fixture(scope="module")
def expected(config, tokens):
    """Loss, statistics and gradients of the model in the order of the text."""
    return step(*build(config, "text", tokens), tokens)


def assert_same(got, want):
    (value, stats), gradients = got
    (want_value, want_stats), want_gradients = want
    assert float(value) == pytest.approx(float(want_value), rel=1e-6)
    np.testing.assert_array_equal(stats.neuron_hits, want_stats.neuron_hits)
    np.testing.assert_array_equal(stats.max_nnz, want_stats.max_nnz)
    for actual, wanted in zip(*map(jax.tree.leaves, (gradients, want_gradients)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(wanted))))


@pytest.mark.parametrize(
    ("name", "remat"), [*((name, "none") for name in ORDERS), ("id", "full"), ("centroids", "full")]
)
def test_a_model_is_the_same_in_any_order(name, remat, config, tokens, expected):
    assert_same(step(*build(config, name, tokens, remat=remat), tokens), expected)


@pytest.mark.parametrize("name", ["vocabulary", "centroids"])
def test_each_device_orders_its_own_tokens(name, config, tokens, expected):
    graphdef, params, others = build(config, name, tokens)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        params, others = jax.device_put((params, others), whole)
        compiled = step.lower(graphdef, params, others, jax.device_put(tokens, split)).compile()
        assert_same(compiled(params, others, jax.device_put(tokens, split)), expected)
    # A layer's (8, 16, 32) tokens never meet on one device.
    assert "f32[8,16,32]" not in compiled.as_text()
    assert "f32[2,16,32]" in compiled.as_text()


@pytest.mark.parametrize("name", ["id", "centroids"])
def test_inside_the_callers_own_shard_map(name, config, tokens):
    graphdef, params, others = build(config, name, tokens)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")

    def logits(params, others, tokens):
        return nnx.merge(graphdef, params, others)(tokens)[0]

    whole = PartitionSpec()
    mapped = jax.shard_map(logits, mesh=mesh, in_specs=(whole, whole, split), out_specs=split)
    got, want = jax.jit(mapped)(params, others, tokens), jax.jit(logits)(params, others, tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(want))))


def test_on_a_gpu_one_pass_moves_and_computes(config, tokens):
    config = dataclasses.replace(config, token_order="id", remat="full", layer_loop="scan")
    graphdef, params, others = nnx.split(SparseLM(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    text = lowered(partial(loss_and_gradients, graphdef), params, others, tokens)
    for name in ("norm_rows", "add_rows", "norm_rows_backward", "take_rows"):
        assert f'name = "{name}"' in text, name


def test_the_order_is_by_what_enters_the_first_layer_then_by_id(config, tokens):
    config = dataclasses.replace(config, token_order="centroids", token_clusters=5, num_layers=3)
    model = SparseLM(config, rngs=nnx.Rngs(0))
    model.refresh_token_order(tokens)
    entering = model.ffn_inputs(tokens)[0]
    nearest = clusters.nearest(entering, model.token_order.centroids[...])
    key = np.asarray(nearest * config.vocab_size + tokens).reshape(-1)
    order = model.token_order.of_input(entering, tokens).order
    np.testing.assert_array_equal(order.reshape(-1), np.argsort(key, kind="stable"))
    np.testing.assert_allclose(model.first_ffn_input(tokens), entering, rtol=1e-5, atol=1e-6)


def test_where_an_order_is_left_out(config):
    order = SparseLM(dataclasses.replace(config, token_order="id"), rngs=nnx.Rngs(0)).token_order
    assert order.choose((2, 8)) == "id"
    assert order.choose((1, 15)) == "text", "too few tokens"
    assert order.choose((64, 1)) == "text", "a step of decoding"
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))):
        assert order.choose((4, 16)) == "id"
        assert order.choose((4, 8)) == "text", "too few tokens of each device"


@pytest.mark.parametrize(
    ("format", "chosen"), [("dense", "text"), ("hybrid", "text"), ("panel", "centroids")]
)
def test_auto_orders_for_panels_alone(format, chosen, config):
    backend = "auto" if format == "dense" else "interpret"
    ffn = FFNOptions(format=format, backend=backend)
    model = SparseLM(dataclasses.replace(config, token_order="auto", ffn=ffn), rngs=nnx.Rngs(0))
    assert model.token_order.choose((2, 64)) == chosen


def test_parameters_do_not_depend_on_the_order(config, tokens):
    """What an order keeps is no parameter, and draws after all of them."""
    text = build(config, "text", tokens)
    assert not jax.tree.leaves(text[2])
    kept = {"vocabulary": {"rank"}, "centroids": {"centroids", "weights"}, "id": set(), "hash": set()}
    for name, names in kept.items():
        _, params, others = build(config, name, tokens)
        jax.tree.map(np.testing.assert_array_equal, params, text[1])
        assert set(nnx.to_pure_dict(others).get("token_order", {})) == names


def test_a_vocabulary_in_clusters():
    groups = jnp.asarray([2, 0, 1, 0, 2, 1, 1, 0, 2])
    embedding = jnp.eye(4)[groups] + 0.01 * jax.random.normal(jax.random.key(0), (9, 4))
    rank = clusters.vocabulary_rank(embedding, 3)
    np.testing.assert_array_equal(jnp.sort(rank), jnp.arange(9))
    ids = np.argsort(rank)
    by_group = [ids[start : start + 3] for start in (0, 3, 6)]
    assert {tuple(group) for group in by_group} == {(1, 3, 7), (2, 5, 6), (0, 4, 8)}


def test_centroids_follow_what_enters():
    """They find three groups, follow when those move, and the same over devices that split the batch."""
    centres = 4.0 * jnp.eye(3, 8)
    noise = 0.1 * jax.random.normal(jax.random.key(0), (96, 8))
    batch = jnp.repeat(centres, 32, axis=0) + noise
    state = clusters.follow(jnp.zeros((3, 8)), jnp.zeros(3), batch, rounds=4)
    groups = np.asarray(clusters.nearest(batch, state[0])).reshape(3, 32)
    assert {tuple(np.unique(group)) for group in groups} == {(0,), (1,), (2,)}
    for _ in range(16):
        state = clusters.follow(*state, batch + 1.0)
    moved = state[0]
    means = (batch + 1.0).reshape(3, 32, 8).mean(axis=1)
    distances = jnp.linalg.norm(moved[:, None] - means, axis=-1)
    assert float(jnp.max(jnp.min(distances, axis=0))) < 0.1
    mapped = jax.pmap(lambda x: clusters.follow(*state, x, axis_name="data"), "data", out_axes=None)(
        batch.reshape(4, 24, 8)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        mapped,
        clusters.follow(*state, batch),
    )


@pytest.mark.parametrize(
    ("fields", "law"),
    [
        ({"token_order": "random"}, "one of text, auto, id, vocabulary, centroids, hash; got 'random'"),
        ({"token_clusters": 0}, "model.token-clusters must be at least 1; got 0"),
        ({"token_clusters": 2**16, "vocab_size": 2**15}, "below 2\\^31"),
    ],
)
def test_what_cannot_be_an_order_is_refused(fields, law):
    with pytest.raises(ValueError, match=law):
        ModelConfig(**fields)
