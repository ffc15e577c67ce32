"""The decoder against a dense Llama written out in plain jnp, and the properties that training relies on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import FFNOptions, device
from sparse_lm import ModelConfig, SparseLM
from sparse_lm.attention import _implementation, attend
from sparse_lm.layers import RMSNorm, rms_norm
from sparse_lm.model import flops_per_token, num_parameters


def _norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def _rotate(x, theta):
    """Each (first half, second half) pair is a complex number, turned by position times its frequency."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / theta ** (2 * jnp.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)[:, None, :]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def _linear(x, weights):
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def _attention(x, weights, config):
    batch, steps, _ = x.shape
    shape = (batch, steps, -1, config.head_dim)
    query = _rotate(_linear(x, weights["query"]).reshape(shape), config.rope_theta)
    key = _rotate(_linear(x, weights["key"]).reshape(shape), config.rope_theta)
    value = _linear(x, weights["value"]).reshape(shape)
    groups = config.num_heads // config.num_kv_heads
    key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum("bsnh,btnh->bnst", query, key) / config.head_dim**0.5
    scores = jnp.where(jnp.tril(jnp.ones((steps, steps), bool)), scores, -jnp.inf)
    mixed = jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(scores, axis=-1), value)
    return _linear(mixed.reshape(batch, steps, -1), weights["output"])


def _ffn(x, weights):
    up = x @ weights["w_up"].T
    hidden = jax.nn.relu(x @ weights["w_gate"].T) * up if "w_gate" in weights else jax.nn.relu(up)
    return hidden @ weights["w_down"]


def dense_logits(params, tokens, config):
    """(B, S) tokens to (B, S, V) f32, layer by layer in a Python loop over the stacked parameters."""
    x = params["embedding"][tokens]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        normed = _norm(x, block["attention_norm"]["scale"], config.norm_eps)
        x = x + _attention(normed, block["attention"], config)
        x = x + _ffn(_norm(x, block["ffn_norm"]["scale"], config.norm_eps), block["ffn"])
    x = _norm(x, params["final_norm"]["scale"], config.norm_eps)
    return x @ params.get("head", params["embedding"]).T


def dense_cross_entropy(params, inputs, targets, config):
    log_probabilities = jax.nn.log_softmax(dense_logits(params, inputs, config), axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1))


def assert_close(got, want, *, of_largest: float = 1e-5) -> None:
    """Leaf by leaf, each named in the message; the bound is a share of the leaf's largest
    value (f32 sums)."""
    want_leaves = jax.tree_util.tree_leaves_with_path(want)
    got_leaves = jax.tree.leaves(got)
    assert len(got_leaves) == len(want_leaves)
    for (path, expected), actual in zip(want_leaves, got_leaves, strict=True):
        bound = of_largest * max(float(np.max(np.abs(expected))), 1e-6)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=name)


def loss_and_stats(graphdef, state, tokens, coefficient):
    model = nnx.merge(graphdef, state)
    hidden, stats = model.hidden_states(tokens[:, :-1])
    ce, _ = model.cross_entropy(hidden, tokens[:, 1:])
    return ce + coefficient * jnp.mean(stats.l1), stats


gradients = jax.jit(jax.value_and_grad(loss_and_stats, argnums=1, has_aux=True), static_argnums=0)


@pytest.mark.parametrize("which", ["model", "tied_model"])
def test_equals_a_dense_llama_without_l1(which, forward, tokens, request):
    """Values, and every parameter's gradient by name."""
    model = request.getfixturevalue(which)
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    got, _ = forward(graphdef, state, tokens)
    want = jax.jit(dense_logits, static_argnums=2)(params, tokens, model.config)
    assert got.dtype == jnp.float32
    assert_close(got, want)

    (loss, _), got_gradients = gradients(graphdef, state, tokens, 0.0)
    dense = jax.jit(jax.value_and_grad(dense_cross_entropy), static_argnums=3)
    want_loss, want_gradients = dense(params, tokens[:, :-1], tokens[:, 1:], model.config)
    assert_close(loss, want_loss)
    assert_close(nnx.to_pure_dict(got_gradients), want_gradients)


def test_l1_reaches_the_gradients(model, tokens):
    graphdef, state = nnx.split(model)
    (without, stats), _ = gradients(graphdef, state, tokens, 0.0)
    (with_l1, _), pulled = gradients(graphdef, state, tokens, 0.5)
    _, free = gradients(graphdef, state, tokens, 0.0)
    assert_close(with_l1, without + 0.5 * jnp.mean(stats.l1))
    assert not np.allclose(pulled["blocks"]["ffn"]["w_up"][...], free["blocks"]["ffn"]["w_up"][...])
    np.testing.assert_array_equal(pulled["head"][...], free["head"][...])


def test_causality(model, forward, tokens):
    """Row t differs from row 0 in token t alone: its logits before t are the same bits,
    those at t are not."""
    base = jnp.tile(tokens[:1], (tokens.shape[1], 1))
    changed = base.at[jnp.arange(1, 16), jnp.arange(1, 16)].add(1) % model.config.vocab_size
    logits, _ = forward(*nnx.split(model), changed)
    for t in range(1, 16):
        np.testing.assert_array_equal(logits[t, :t], logits[0, :t])
        assert np.any(logits[t, t] != logits[0, t])


@pytest.mark.parametrize("visible", [False, True])
def test_grouped_query_heads_equal_repeated_heads(visible):
    query, key, value = (
        jax.random.normal(jax.random.key(seed), (2, 5, heads, 8)) for seed, heads in ((0, 6), (1, 2), (2, 2))
    )
    mask = jnp.tile(jnp.tril(jnp.ones((5, 5), bool)), (2, 1, 1)) if visible else None
    repeated = attend(query, jnp.repeat(key, 3, axis=2), jnp.repeat(value, 3, axis=2), mask)
    assert_close(attend(query, key, value, mask), repeated)


def test_flash_attention_is_asked_for_where_it_runs(monkeypatch):
    """On an NVIDIA GPU of Ampere or newer, in half precision, for even lengths (JAX refuses
    odd ones' gradient)."""

    def chosen(dtype, steps, head_dim):
        struct = jax.ShapeDtypeStruct((2, steps, 4, head_dim), dtype)
        return _implementation(struct, struct)

    assert chosen(jnp.bfloat16, 16, 64) is None
    gpu = device.Device(platform="gpu", kind="NVIDIA H200", capability=90, cores=132)
    monkeypatch.setattr(device, "current", lambda: gpu)
    assert chosen(jnp.bfloat16, 16, 64) == "cudnn"
    assert chosen(jnp.float16, 16, 128) == "cudnn"
    refused = ((jnp.float32, 16, 64), (jnp.bfloat16, 17, 64), (jnp.bfloat16, 1, 64), (jnp.bfloat16, 16, 192))
    for arguments in refused:
        assert chosen(*arguments) is None


INTERPRETED = {
    "panel": FFNOptions("panel(tokens=16, capacity=1.0)", backend="interpret"),
    "hybrid": FFNOptions("hybrid(tile=32)", backend="interpret"),
    "auto": FFNOptions("auto(tokens=16)", backend="interpret"),
}


@pytest.mark.parametrize(
    ("policy", "ffn"), [("full", FFNOptions()), ("dots", FFNOptions()), ("sparse", INTERPRETED["panel"])]
)
def test_remat_policies_give_the_same_gradients(policy, ffn, model, tokens):
    graphdef, state = nnx.split(model)
    want = gradients(graphdef, state, tokens, 0.1)
    other = abstract(dataclasses.replace(model.config, remat=policy, ffn=ffn))[0]
    got = gradients(other, state, tokens, 0.1)
    assert_close(without_the_path(got), without_the_path(want))


def without_the_path(tree):
    """The same but for the statistics that tell which path computed a layer."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in found if not str(path[-1]).endswith(("pairs", "dense_tokens"))]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_layers_give_the_same_gradients_and_put_them_together_once(remat, model, tokens):
    graphdef, state = nnx.split(model)
    want = gradients(graphdef, state, tokens, 0.1)
    unrolled = abstract(dataclasses.replace(model.config, remat=remat, layer_loop="unrolled"))[0]
    got = gradients(unrolled, state, tokens, 0.1)
    assert_close(got, want)
    program = gradients.lower(unrolled, state, tokens, 0.1).as_text()
    assert program.count("stablehlo.while") == 1  # the loss's, over chunks of tokens
    assert "stablehlo.pad" not in program  # a slice's own gradient is the whole stack, mostly zeros
    # Without the barrier a compiler finds that it has computed all this before.
    assert ("optimization_barrier" in program) == (remat == "full")


@pytest.mark.parametrize("ffn", INTERPRETED.values(), ids=INTERPRETED)
def test_the_sparse_remat_policy_runs_no_kernel_twice(ffn, config, tokens):
    def kernels(remat):
        graphdef, state = abstract(dataclasses.replace(config, remat=remat, ffn=ffn))
        return live_kernels(jax.make_jaxpr(gradients, static_argnums=0)(graphdef, state, tokens, 0.1).jaxpr)

    assert kernels("sparse") == kernels("none") < kernels("full")


def abstract(config):
    return nnx.split(nnx.eval_shape(lambda: SparseLM(config, rngs=nnx.Rngs(0))))


def live_kernels(jaxpr) -> int:
    """Pallas calls, in inner programs too, but for those whose results nobody reads: compilers drop them."""
    live, count = set(map(id, jaxpr.outvars)), 0
    for equation in reversed(jaxpr.eqns):
        if not live & set(map(id, equation.outvars)):
            continue
        live |= set(map(id, equation.invars))
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(list(equation.params.values()))]
        is_kernel = equation.primitive.name == "pallas_call"
        count += is_kernel or sum(live_kernels(program) for program in inner if hasattr(program, "eqns"))
    return count


def test_a_model_and_its_gradients_where_rank_promotion_is_an_error(model, tokens):
    with jax.numpy_rank_promotion("raise"):
        jax.make_jaxpr(gradients, static_argnums=0)(*nnx.split(model), tokens, 0.1)


def test_scan_equals_a_python_loop(model, forward, tokens):
    graphdef, layers = nnx.split(model.blocks)
    x, stats = model.embedding[...][tokens], []
    for layer in range(model.config.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers))
        x, layer_stats = block(x)
        stats.append(layer_stats)
    got_logits, got_stats = forward(*nnx.split(model), tokens)
    assert_close(got_logits, model.logits(model.final_norm(x)))
    assert_close(got_stats, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats))
    assert got_stats.neuron_hits.shape == (2, 64)


def test_a_mesh_gives_the_single_device_result(model, tokens):
    """The batch split over four devices: loss, statistics and gradients."""
    graphdef, state = nnx.split(model)
    want = gradients(graphdef, state, tokens, 0.1)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        split = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
        assert_close(gradients(graphdef, state, split, 0.1), want)


def test_master_weights_are_f32_and_compute_is_in_the_config_dtype(config):
    model = SparseLM(dataclasses.replace(config, dtype="bfloat16"), rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    hidden, stats = model.hidden_states(jnp.zeros((1, 3), jnp.int32))
    assert (hidden.dtype, stats.l1.dtype) == (jnp.bfloat16, jnp.float32)
    assert model.logits(hidden).dtype == jnp.float32


def test_initial_weights():
    """Normal with the configured deviation, every layer and projection drawn apart, norms 1 and biases 0."""
    config = ModelConfig(
        vocab_size=256, d_model=64, d_ff=128, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True
    )
    state = nnx.to_pure_dict(nnx.state(SparseLM(config, rngs=nnx.Rngs(3))))
    drawn = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if "scale" in name or "bias" in name:
            np.testing.assert_array_equal(leaf, 1.0 if "scale" in name else 0.0)
        else:
            assert float(jnp.std(leaf)) == pytest.approx(0.02, rel=0.05), name
            drawn += [float(row[0, 0]) for row in (leaf if "blocks" in name else leaf[None])]
    assert len(set(drawn)) == len(drawn) == 1 + 2 * 7


def test_rms_norm_keeps_its_statistics_in_f32():
    """In float16 the mean square of 300 overflows; in f32 it does not."""
    norm = RMSNorm(4, eps=1e-5, dtype=jnp.float16)
    got = norm(jnp.full((2, 4), 300.0, jnp.float16))
    assert got.dtype == jnp.float16
    np.testing.assert_array_equal(got, 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_keeps_for_its_backward_what_it_was_given(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 8)), dtype)
    scale, dy = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in (8, (2, 3, 8)))
    plain = jax.vjp(lambda x, scale: _norm(x.astype(jnp.float32), scale, 1e-5).astype(dtype), x, scale)
    kept = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=1e-5, dtype=dtype), x, scale)
    results = [(value, *pullback(dy.astype(dtype))) for value, pullback in (kept, plain)]
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert _relative(found, expected) < (1e-6 if dtype == jnp.float32 else 4e-3)
    sizes = sorted((leaf.dtype.name, leaf.size) for leaf in jax.tree.leaves(kept[1]))
    assert sizes == sorted([(x.dtype.name, 48), ("float32", 6), ("float32", 8)])


@pytest.mark.parametrize(
    "specs",
    [(PartitionSpec(None, None, "data"), PartitionSpec()), (PartitionSpec(), PartitionSpec("data"))],
    ids=["of x", "of the scale"],
)
def test_rms_norm_takes_a_width_that_is_split_over_explicit_axes(specs):
    """Where only one of the two is split, each gradient is still split as what it is of."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8), 8)]

    def differentiated(norm):
        return jax.jit(jax.grad(lambda x, scale: jnp.sum(jnp.sin(norm(x, scale))), argnums=(0, 1)))

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    placed = jax.device_put(arrays, shardings)
    with jax.set_mesh(mesh):
        found = differentiated(lambda x, scale: rms_norm(x, scale, eps=1e-5, dtype=jnp.float32))(*placed)
    wanted = differentiated(lambda x, scale: _norm(x, scale, 1e-5))(*arrays)
    for got, want, array in zip(found, wanted, placed, strict=True):
        assert jax.typeof(got) == jax.typeof(array)
        assert _relative(jax.device_get(got), want) < 1e-6


def _relative(found, expected) -> float:
    found, expected = (jnp.asarray(array, jnp.float32) for array in (found, expected))
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("which", ["model", "tied_model"])
def test_num_parameters(which, request):
    model = request.getfixturevalue(which)
    assert num_parameters(model.config) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def test_flops_per_token_of_the_papers_1p5b():
    """Per layer 4 D^2 of attention and 3 D F of feed-forward; the tied head once; half the scores."""
    d, f, layers, vocab, context = 2048, 5632, 28, 49_152, 2048
    weights = layers * (4 * d * d + 3 * d * f) + vocab * d
    assert flops_per_token(ModelConfig(), context) == 6 * weights + 6 * layers * d * context


def test_shapes_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=r"at most 16 positions.*got \(1, 17\)"):
        model(jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        model(jnp.zeros(3, jnp.int32))
