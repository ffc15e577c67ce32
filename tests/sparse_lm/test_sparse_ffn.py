"""The drop-in module under every transformation: each gives the single-device result, gradients included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import FFNOptions
from sparse_lm import SparseFFN

D, F = 32, 64
P = PartitionSpec


@pytest.fixture(scope="module", params=[True, False], ids=["gated", "plain"])
def ffn(request):
    return SparseFFN(D, F, rngs=nnx.Rngs(0), gated=request.param, dtype=jnp.float32, init_std=0.2)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (4, 6, D))


def loss(y, stats):
    """Of both outputs that carry a gradient; linear in means over tokens, so that devices may average it."""
    return jnp.mean(jnp.sin(y) * jnp.arange(D)) + 0.1 * stats.l1


def objective(graphdef, state, x, apply=lambda ffn, x: ffn(x)):
    y, stats = apply(nnx.merge(graphdef, state), x)
    return loss(y, stats), (y, stats)


def differentiate(graphdef, state, x, **kwargs):
    return jax.value_and_grad(objective, argnums=(1, 2), has_aux=True)(graphdef, state, x, **kwargs)


@pytest.fixture(scope="module")
def expected(ffn, x):
    """Loss, y, statistics and the gradients of the weights and of x, with no transformation but grad."""
    return differentiate(*nnx.split(ffn), x)


def assert_close(got, want):
    for (path, actual), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        bound = 1e-5 * max(float(np.max(np.abs(wanted))), 1e-6)  # f32 sums in another order
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_without_a_type_of_its_own_it_follows_its_input(dtype):
    ffn = SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=None)
    y, stats = ffn(jnp.ones((2, D), dtype))
    assert (y.dtype, stats.l1.dtype) == (jnp.dtype(dtype), jnp.float32)


def test_values_are_the_formula(ffn, x):
    y, stats = ffn(x)
    up = x @ ffn.w_up[...].T
    hidden = jax.nn.relu(up) if ffn.w_gate is None else jax.nn.relu(x @ ffn.w_gate[...].T) * up
    assert_close(y, hidden @ ffn.w_down[...])
    assert_close(stats.l1, jnp.abs(hidden).sum() / 24)
    assert_close(stats.l0, jnp.sum(hidden != 0) / 24)
    np.testing.assert_array_equal(stats.neuron_hits, jnp.sum(hidden != 0, axis=(0, 1)))
    np.testing.assert_array_equal(stats.max_nnz, jnp.max(jnp.sum(hidden != 0, axis=-1)))


def test_jit(ffn, x, expected):
    assert_close(jax.jit(differentiate, static_argnums=0)(*nnx.split(ffn), x), expected)


def test_nnx_jit_and_grad(ffn, x, expected):
    """The way a Flax user writes it, module in and module-shaped gradients out."""

    @nnx.jit
    def step(ffn, x):
        return nnx.value_and_grad(lambda ffn: loss(*ffn(x)))(ffn)

    value, gradients = step(ffn, x)
    (want, _), (want_gradients, _) = expected
    assert_close((value, jax.tree.leaves(gradients)), (want, jax.tree.leaves(want_gradients)))


def test_vmap(ffn, x):
    """One call, and one set of statistics, for each element."""
    graphdef, state = nnx.split(ffn)
    batched = jax.vmap(lambda x: differentiate(graphdef, state, x))(x)
    one_by_one = [differentiate(graphdef, state, row) for row in x]
    assert_close(batched, jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one))


@pytest.mark.parametrize(
    "apply",
    [nnx.remat(lambda ffn, x: ffn(x)), jax.checkpoint(lambda ffn, x: ffn(x))],
    ids=["nnx.remat", "jax.checkpoint"],
)
def test_remat(apply, ffn, x, expected):
    assert_close(differentiate(*nnx.split(ffn), x, apply=apply), expected)


def test_scan_over_layers(ffn, x):
    graphdef, state = nnx.split(ffn)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, leaf[::-1]]), state)

    def total(layers, x, scan):
        def layer(x, state):
            y, stats = nnx.merge(graphdef, state)(x)
            return x + y, loss(y, stats)

        return jnp.sum(scan(layer, x, layers)[1])

    def python_loop(layer, x, layers):
        losses = []
        for index in range(3):
            x, value = layer(x, jax.tree.map(lambda leaf, index=index: leaf[index], layers))
            losses.append(value)
        return x, jnp.stack(losses)

    differentiate = jax.value_and_grad(total, argnums=(0, 1))
    assert_close(differentiate(layers, x, jax.lax.scan), differentiate(layers, x, python_loop))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, ffn, x, expected):
    """Inside the caller's own shard_map the module is local and ``all_reduce`` completes the statistics."""

    def apply(ffn, x):
        graphdef, state = nnx.split(ffn)

        def local(state, x):
            y, stats = nnx.merge(graphdef, state)(x)
            return y, stats.all_reduce("data")

        specs = {"in_specs": (P(), P("data")), "out_specs": (P("data"), P())}
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        return jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs)(state, x)

    graphdef, state = nnx.split(ffn)
    assert_close(jax.jit(lambda state, x: differentiate(graphdef, state, x, apply=apply))(state, x), expected)


def test_pmap(ffn, x, expected):
    """A data-parallel step: each device differentiates its rows, means over devices make the whole."""
    graphdef, state = nnx.split(ffn)

    def local(state, x):
        (value, (y, stats)), (d_state, d_x) = differentiate(graphdef, state, x)
        value, d_state = jax.lax.pmean((value, d_state), "data")
        return (value, (y, stats.all_reduce("data"))), (d_state, d_x / jax.lax.axis_size("data"))

    step = jax.pmap(local, "data", in_axes=(None, 0), out_axes=((None, (0, None)), (None, 0)))
    assert_close(step(state, x), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_ambient_mesh(kind, ffn, x, expected):
    """The module splits its batch over the mesh by itself, also where the weights arrive split (FSDP)."""
    graphdef, state = nnx.split(ffn)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    step = jax.jit(differentiate, static_argnums=0)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("data"))
        got = step(graphdef, jax.device_put(state, split), jax.device_put(x, split))
        assert_close(got, expected)
        y = got[0][1][0]
        assert y.sharding.is_equivalent_to(split, y.ndim)


def test_ambient_mesh_takes_batches_that_do_not_divide(ffn, x):
    """Three rows over four devices, and a single token."""
    for some in (x[:3], x[0, 0]):
        want = ffn(some)
        with jax.set_mesh(jax.make_mesh((4,), ("data",))):
            got = ffn(some)
        assert_close(got, want)


def test_ambient_mesh_splits_the_named_axes_only(ffn, x, expected):
    named = SparseFFN(
        D,
        F,
        rngs=nnx.Rngs(0),
        gated=ffn.w_gate is not None,
        dtype=jnp.float32,
        init_std=0.2,
        batch_axes="data",
    )
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        y, stats = jax.jit(lambda x: named(x))(x)
    assert_close((y, stats), expected[0][1])
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), y.ndim)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("names", [("model", None), (("data", "model"), None), (None, "data")], ids=str)
def test_partition_metadata_splits_the_neurons(names, kind, ffn, x, expected):
    """As a Flax user writes it: an initializer with names, under a mesh. The seed's weights are the same."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.normal(0.2), names)
        split = SparseFFN(
            D,
            F,
            rngs=nnx.Rngs(0),
            gated=ffn.w_gate is not None,
            dtype=jnp.float32,
            kernel_init=init,
            batch_axes="data",
        )
        assert split.w_up[...].sharding.spec == P(*names)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        got = jax.jit(differentiate, static_argnums=0)(*nnx.split(split), x)
        stats = got[0][1][1]
        assert ("model" in str(stats.neuron_hits.sharding.spec)) == ("model" in str(names))
    if "model" in str(names):  # the most in each half of the neurons: a bound
        (_, (_, want)), _ = expected
        assert want.max_nnz <= stats.max_nnz <= F
        stats = dataclasses.replace(stats, max_nnz=want.max_nnz)
    assert_close(((got[0][0], (got[0][1][0], stats)), got[1]), expected)


def test_metadata_of_the_parameters_alone(x):
    """Without a mesh it changes nothing, and it may stand in front of a layer axis that a scan took away."""
    ffn = SparseFFN(D, F, rngs=nnx.Rngs(0), dtype=jnp.float32, kernel_metadata={"eager_sharding": False})
    want = ffn(x)
    for weight in (ffn.w_gate, ffn.w_up, ffn.w_down):
        weight.set_metadata(out_sharding=("layers", "model", None))
    assert_close(ffn(x), want)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)):
        y, stats = jax.jit(lambda x: ffn(x))(x)
    assert y.sharding.spec[0] == "data"
    assert stats.neuron_hits.sharding.spec == P("model")
    assert_close((y, stats.l1), (want[0], want[1].l1))


def test_metadata_that_names_no_axis_is_refused(x):
    ffn = SparseFFN(
        D, F, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("mlp", None), "eager_sharding": False}
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"metadata of .* which has data; got mlp"):
        ffn(x)


def test_unknown_batch_axes_are_refused(x):
    ffn = SparseFFN(D, F, rngs=nnx.Rngs(0), batch_axes="rows")
    with jax.set_mesh(jax.make_mesh((4,), ("data",))), pytest.raises(ValueError, match="has data; got rows"):
        ffn(x)


def test_arguments_that_do_not_fit_are_refused(ffn):
    with pytest.raises(ValueError, match=r"takes no biases: .* use use_bias=False"):
        SparseFFN(D, F, rngs=nnx.Rngs(0), use_bias=True)
    with pytest.raises(ValueError, match="at least 1; got 32 and 0"):
        SparseFFN(D, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 32\); got \(4, 31\)"):
        ffn(jnp.zeros((4, 31)))
    with pytest.raises(TypeError, match="expected x to be an array; got list"):
        ffn([[0.0] * D])
    with pytest.raises(TypeError, match=r"computes in bfloat16, float16 or float32, .*; got dtype complex64"):
        SparseFFN(D, F, rngs=nnx.Rngs(0), dtype="complex64")
    with pytest.raises(TypeError, match=r"such as FFNOptions\(format='panel'\); got str"):
        SparseFFN(D, F, rngs=nnx.Rngs(0), options="panel")


def test_types_and_layout():
    """Neuron-major f32 master weights; bf16 compute by default, whatever the type of x."""
    ffn = SparseFFN(D, F, rngs=nnx.Rngs(0))
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in nnx.to_pure_dict(nnx.state(ffn)).items()}
    assert shapes == dict.fromkeys(("w_gate", "w_up", "w_down"), ((F, D), jnp.dtype("float32")))
    y, stats = ffn(jnp.ones(D))
    assert (y.shape, y.dtype, stats.l1.dtype) == ((D,), jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(("weight_gradients", "devices"), [("auto", 1), ("auto", 4), ("input", 1)])
def test_gradients_of_f32_parameters(weight_gradients, devices, x):
    """Under bf16 compute they are f32 sums, over tokens and devices, and no bf16 values unless asked for."""
    options = FFNOptions(format="dense", weight_gradients=weight_gradients)
    graphdef, state = nnx.split(SparseFFN(D, F, rngs=nnx.Rngs(0), init_std=0.2, options=options))
    with jax.set_mesh(jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))):
        step = jax.jit(jax.grad(objective, argnums=1, has_aux=True), static_argnums=0)
        gradients = jax.tree.leaves(step(graphdef, state, x)[0])
    assert {leaf.dtype for leaf in gradients} == {jnp.dtype("float32")}
    bf16_values = [np.mean(leaf == leaf.astype(jnp.bfloat16)) for leaf in gradients]
    assert max(bf16_values) < 0.1 if weight_gradients == "auto" else min(bf16_values) == 1
