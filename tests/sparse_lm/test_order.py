"""Orders of tokens: what they put side by side, and that a layer gives the same in any of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import FFNOptions
from sparse_lm import SparseFFN, clusters, order
from sparse_lm.ffn import over_local_tokens
from sparse_lm.order import Permutation

M, D, F, V = 200, 16, 96, 50
P = PartitionSpec


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (M, D))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (M,), 0, V)


def permutation(places):
    places = jnp.asarray(places, jnp.int32)
    return Permutation(places, jnp.argsort(places).astype(jnp.int32))


REVERSED = permutation(np.arange(M)[::-1])
RANDOM = permutation(np.random.default_rng(0).permutation(M))


def test_by_key_is_the_stable_sort_in_any_shape(tokens):
    found = order.by_key(tokens.reshape(10, 20))
    want = np.argsort(np.asarray(tokens), kind="stable")
    np.testing.assert_array_equal(found.order.reshape(-1), want)
    np.testing.assert_array_equal(found.inverse.reshape(-1)[want], np.arange(M))
    assert found.order.shape == found.inverse.shape == (10, 20)
    assert found.order.dtype == found.inverse.dtype == jnp.int32


def test_gather_and_scatter_undo_each_other_and_so_do_their_gradients(x):
    weight = jax.random.normal(jax.random.key(3), x.shape)
    np.testing.assert_array_equal(RANDOM.gather(x), x[RANDOM.order])
    np.testing.assert_array_equal(RANDOM.scatter(RANDOM.gather(x)), x)
    gradient = jax.grad(lambda x: jnp.sum(RANDOM.gather(x) * weight))(x)
    np.testing.assert_array_equal(gradient, weight[RANDOM.inverse])
    gradient = jax.grad(lambda x: jnp.sum(RANDOM.scatter(x) * weight))(x)
    np.testing.assert_array_equal(gradient, weight[RANDOM.order])


def test_orders_map_over_batches_and_stay_int32(x, tokens):
    batch = x.reshape(4, 50, D), tokens.reshape(4, 50)
    mapped = jax.vmap(lambda x, tokens: order.by_id(tokens).gather(x))(*batch)
    for got, some, ids in zip(mapped, *batch, strict=True):
        np.testing.assert_array_equal(got, some[np.argsort(ids, kind="stable")])
    with jax.enable_x64(True):
        wide = order.by_centroids(x, x[:5], tokens, vocab_size=V)
    narrow = order.by_centroids(x, x[:5], tokens, vocab_size=V)
    assert wide.order.dtype == wide.inverse.dtype == jnp.int32
    np.testing.assert_array_equal(wide.order, narrow.order)


def test_ids_and_ranks(tokens):
    rank = jnp.asarray(np.random.default_rng(1).permutation(V), jnp.int32)
    assert (jnp.diff(tokens[order.by_id(tokens).order]) >= 0).all()
    assert (jnp.diff(rank[tokens][order.by_rank(tokens, rank).order]) >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_centroids_then_ids(dtype, x, tokens):
    x, centroids = x.astype(dtype), 2 * x[:7] + 0.1
    rounded = np.asarray(x, np.float64), np.asarray(centroids.astype(dtype), np.float64)
    distances = np.sum((rounded[0][:, None] - rounded[1]) ** 2, axis=-1)
    nearest = clusters.nearest(x, centroids)
    chosen = np.take_along_axis(distances, np.asarray(nearest)[:, None], axis=1)[:, 0]
    # Rounded centroids are at rounded distances: the choice is as good up to that.
    assert (chosen <= distances.min(axis=1) + (1e-4 if dtype == "float32" else 0.3)).all()
    assert len(set(nearest.tolist())) > 3
    found = order.by_centroids(x, centroids, tokens, vocab_size=V).order
    assert (jnp.diff(nearest[found] * V + tokens[found]) >= 0).all()
    without_ids = order.by_centroids(x, centroids).order
    np.testing.assert_array_equal(without_ids, np.argsort(nearest, kind="stable"))


def test_hash_puts_equal_inputs_together_whatever_their_length(x):
    repeated = jnp.tile(x[:20], (10, 1)) * jnp.linspace(0.5, 2, M)[:, None]
    found = np.asarray(order.by_hash(repeated).order) % 20
    changes = int(np.sum(np.diff(found) != 0))
    assert changes < 40, (
        "most of the 20 groups stand together; as they came, every token differs from the one before"
    )
    np.testing.assert_array_equal(order.by_hash(x).order, jax.jit(order.by_hash)(x).order)


def test_what_does_not_fit_is_refused(x, tokens):
    with pytest.raises(ValueError, match=r"4096 groups and then by id needs the number of ids, below 524288"):
        order.by_hash(x, tokens)
    with pytest.raises(ValueError, match="got vocab_size=600000"):
        order.by_hash(x, tokens, vocab_size=600_000)
    with pytest.raises(ValueError, match=r"tokens of shape \(200,\) takes x of shape \(200, 'D'\)"):
        SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=jnp.float32)(x.reshape(2, 100, D), order=RANDOM)


@pytest.fixture(scope="module")
def weights():
    """Of a layer with about a tenth of its gates active."""
    ffn = SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=jnp.float32, init_std=0.3)
    ffn.w_gate[...] = ffn.w_gate[...].at[:, 0].add(-1.5)
    return nnx.state(ffn)


def layer(options):
    """Jitted ``(weights, x, order) -> (y, statistics, gradients)`` of a layer with those options."""
    graphdef = nnx.split(SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=jnp.float32, options=options))[0]

    def loss(weights, x, order):
        y, stats = nnx.merge(graphdef, weights)(x, order=order)
        return jnp.mean(jnp.sin(y) * jnp.arange(D)) + 0.1 * stats.l1, (y, stats)

    @jax.jit
    def run(weights, x, order):
        gradients, (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, x, order)
        return y, stats, gradients

    return run


def assert_same(got, want):
    """Values and gradients up to the order of sums, integers bit for bit."""
    (y, stats, gradients), (want_y, want_stats, want_gradients) = got, want
    for name in ("neuron_hits", "max_nnz"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(want_stats, name))
    floats = (y, stats.l1, stats.l0, gradients), (want_y, want_stats.l1, want_stats.l0, want_gradients)
    for actual, wanted in zip(*map(jax.tree.leaves, floats), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(wanted))))


@pytest.mark.parametrize("name", ["dense", "panel", "hybrid", "twell", "auto"])
def test_every_format_gives_the_same_in_any_order(name, weights, x):
    x = x.at[:, 0].set(1.0)
    backend = "auto" if name == "dense" else "interpret"
    run = layer(FFNOptions(format=name, backend=backend))
    want = layer(FFNOptions(format="dense"))(weights, x, None)
    assert 0.05 < float(want[1].l0) / F < 0.2
    reverse, random, again = (run(weights, x, each) for each in (REVERSED, RANDOM, RANDOM))
    assert_same(reverse, want)
    assert_same(random, want)
    for one, other in zip(*map(jax.tree.leaves, (random, again)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_orders_are_of_each_devices_own_tokens(kind, weights, x, tokens):
    run, batch = layer(FFNOptions(format="dense")), (8, 25)
    x, tokens = x.reshape(*batch, D), tokens.reshape(batch)
    want = run(weights, x, None)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(kind,))):
        weights = jax.device_put(weights, P())
        x, tokens = jax.device_put((x, tokens), P("data"))
        local = jax.jit(lambda tokens: over_local_tokens(order.by_id, tokens))(tokens)
        got = run(weights, x, local)
    parts = np.asarray(local.order).reshape(4, 50)
    np.testing.assert_array_equal(np.sort(parts, axis=1), np.tile(np.arange(50), (4, 1)))
    for part, ids in zip(parts, np.asarray(tokens).reshape(4, 50), strict=True):
        assert (np.diff(ids[part]) >= 0).all()
    assert_same(got, want)


def test_where_another_axis_splits_the_neurons(x, tokens):
    """Tokens are split over the other axis alone, and in an order of their own there."""
    x, tokens = x.reshape(8, 25, D), tokens.reshape(8, 25)
    whole = SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=jnp.float32)
    want, want_stats = whole(x)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    metadata = {"out_sharding": ("model", None)}
    with jax.set_mesh(mesh):
        split = SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=jnp.float32, kernel_metadata=metadata)
        local = over_local_tokens(order.by_id, tokens, batch_axes=("data",))
        y, stats = jax.jit(lambda x: split(x, order=local))(x)
    np.testing.assert_array_equal(np.sort(local.order.reshape(2, 100)), np.tile(np.arange(100), (2, 1)))
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(want))))
    np.testing.assert_array_equal(stats.neuron_hits, want_stats.neuron_hits)


@pytest.mark.parametrize("mapped", ["shard_map", "pmap"])
def test_inside_the_callers_own_map(mapped, weights, x, tokens):
    graphdef = nnx.split(SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=jnp.float32))[0]

    def local(weights, x, tokens):
        y, stats = nnx.merge(graphdef, weights)(x, order=order.by_centroids(x, x[:5], tokens, vocab_size=V))
        return y, stats.all_reduce("data")

    if mapped == "pmap":
        step = jax.pmap(local, "data", in_axes=(None, 0, 0), out_axes=(0, None))
        y, stats = step(weights, x.reshape(4, -1, D), tokens.reshape(4, -1))
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P("data"), P())}
        y, stats = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(weights, x, tokens)
    want, want_stats = nnx.merge(graphdef, weights)(x)
    np.testing.assert_allclose(y.reshape(M, D), want, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(want))))
    np.testing.assert_array_equal(stats.neuron_hits, want_stats.neuron_hits)
