"""The chunked cross-entropy is the plain one, in values and gradients, and never holds all logits."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.bench.collectives import collectives
from sparse_lm import cross_entropy as module
from sparse_lm.cross_entropy import cross_entropy, log_likelihoods

VOCAB, WIDTH = 96, 8
BY_16 = 4 * VOCAB * 16  # bytes of logits that make chunks of 16 tokens


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", BY_16)


def inputs(batch: int, steps: int, dtype: str = "float32"):
    rng = np.random.default_rng(batch * steps)
    hidden = jnp.asarray(rng.standard_normal((batch, steps, WIDTH)), dtype)
    weight = jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32)
    return hidden, weight, jnp.asarray(rng.integers(0, VOCAB, (batch, steps)), jnp.int32)


def plain(hidden, weight, targets, *, z_loss=0.0):
    """The formula, with all logits at once, in the compute type of ``hidden``."""
    product = jnp.einsum(
        "bsd,vd->bsv", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    lse = jax.nn.logsumexp(product, axis=-1)
    picked = jnp.take_along_axis(product, targets[..., None], axis=-1)[..., 0]
    ce = jnp.mean(lse - picked)
    return ce + z_loss * jnp.mean(lse * lse), ce


def gradients(function, *arguments, scale=1.0, **options):
    def loss(hidden, weight, targets):
        total, ce = function(hidden, weight, targets, **options)
        return scale * total, ce

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arguments)


@pytest.mark.parametrize(
    ("batch", "steps", "z_loss"),
    [(4, 16, 0.0), (3, 7, 0.1), (1, 5, 0.0)],
    ids=["whole chunks", "an uneven rest, z-loss", "less than a chunk"],
)
def test_values_and_gradients_are_those_of_the_plain_form(batch, steps, z_loss):
    arguments = inputs(batch, steps)
    (loss, ce), found = gradients(cross_entropy, *arguments, z_loss=z_loss)
    (want_loss, want_ce), wanted = gradients(plain, *arguments, z_loss=z_loss)
    np.testing.assert_allclose((loss, ce), (want_loss, want_ce), rtol=1e-6)
    alone = jax.jit(lambda *arrays: cross_entropy(*arrays, z_loss=z_loss))(*arguments)
    np.testing.assert_allclose(alone, (want_loss, want_ce), rtol=1e-6)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()))


def error(found, truth) -> float:
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    return float(np.sqrt(np.mean((found - truth) ** 2)))


def test_bfloat16_rounds_no_worse_than_the_plain_form():
    hidden, weight, targets = inputs(4, 16, "bfloat16")
    rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    (truth, _), wanted = gradients(plain, hidden.astype(jnp.float32), rounded, targets)
    (loss, _), found = gradients(cross_entropy, hidden, weight, targets)
    _, references = gradients(plain, hidden, weight, targets)
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    assert [gradient.dtype for gradient in found] == [jnp.bfloat16, jnp.float32]
    for got, reference, want in zip(found, references, wanted, strict=True):
        assert error(got, want) <= 1.5 * max(error(reference, want), 2**-9 * error(want, 0))


def test_gradients_survive_float16_under_a_loss_scale():
    """2^15 of the loss: the gradient of a hidden state, a share of a mean over tokens, is then far from
    float16's least number, and so must be all that it is made of."""
    hidden, weight, targets = inputs(4, 16, "float16")
    _, (found, _) = gradients(cross_entropy, hidden, weight, targets, scale=2.0**15)
    full = hidden.astype(jnp.float32)
    _, (want, _) = gradients(plain, full, weight.astype(jnp.float16).astype(jnp.float32), targets)
    np.testing.assert_allclose(
        found.astype(jnp.float32) / 2**15, want, atol=2**-9 * float(jnp.abs(want).max())
    )


def test_log_likelihoods_of_an_uneven_number_of_tokens():
    hidden, weight, targets = inputs(3, 7)
    logits = jnp.einsum("bsd,vd->bsv", hidden, weight)
    targets = targets.at[0].set(logits.argmax(-1)[0])
    log_p, most_likely = jax.jit(log_likelihoods)(hidden, weight, targets)
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_p, wanted, rtol=1e-5)
    np.testing.assert_array_equal(most_likely, logits.argmax(-1) == targets)
    assert most_likely[0].all()


def most_logits(program: str) -> int:
    """Rows of the largest array of a compiled program that has an axis of the vocabulary."""
    shapes = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", program)
    sizes = [list(map(int, shape.split(","))) for shape in shapes]
    return max(math.prod(size) // VOCAB for size in sizes if VOCAB in size)


def test_logits_of_all_tokens_never_exist():
    hidden, weight, targets = inputs(4, 64, "bfloat16")

    def compiled(function):
        return jax.jit(jax.grad(lambda *a: function(*a)[0], argnums=(0, 1))).lower(hidden, weight, targets)

    assert most_logits(compiled(plain).compile().as_text()) == 256
    assert most_logits(compiled(cross_entropy).compile().as_text()) == 16
    evaluated = jax.jit(cross_entropy).lower(hidden, weight, targets).compile()
    assert most_logits(evaluated.as_text()) == 16
    # The operands of the backward's products have the compute type.
    products = re.findall(
        r"stablehlo.dot_general .*: \(tensor<[\dx]*(\w+)>", compiled(cross_entropy).as_text()
    )
    assert products == ["bf16"] * 3


def test_over_devices_each_takes_its_own_tokens():
    """Values of the whole batch, and nothing crosses devices but the sums."""
    arguments = inputs(8, 7)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(a, s) for a, s in zip(arguments, (rows, whole, rows), strict=True)]
    differentiated = jax.jit(
        jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True),
        out_shardings=((whole, whole), (rows, whole)),
    )
    with jax.set_mesh(mesh):
        compiled = differentiated.lower(*placed).compile()
        found = compiled(*placed)
    wanted = gradients(plain, *arguments)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()))
    sent = collectives(compiled.as_text())
    assert {(one.kind, one.dtype) for one in sent} == {("all-reduce", "f32")}
    assert sorted(one.elements for one in sent) == [1, VOCAB * WIDTH]


def test_arrays_split_over_explicit_axes_get_gradients_split_like_them():
    """The head by its vocabulary, hidden states by rows and width, targets not at all."""
    arguments = inputs(4, 7)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = PartitionSpec("data", None, "model"), PartitionSpec("model"), PartitionSpec()
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, specs, strict=True)]
    with jax.set_mesh(mesh):
        found = gradients(cross_entropy, *placed)
    assert [jax.typeof(gradient) for gradient in found[1]] == [jax.typeof(array) for array in placed[:2]]
    wanted = gradients(plain, *arguments)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize("rows", [4, 3], ids=["rows split", "rows whole"])
def test_log_likelihoods_of_arrays_split_over_explicit_axes(rows, jit):
    """The head by its vocabulary, hidden states by rows, where they can be, and width."""
    arguments = inputs(rows, 7)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    by_rows = "data" if rows == 4 else None
    specs = PartitionSpec(by_rows, None, "model"), PartitionSpec("model"), PartitionSpec()
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, specs, strict=True)]
    with jax.set_mesh(mesh):
        found = jit(log_likelihoods)(*placed)
    assert [jax.typeof(values).sharding.spec[0] for values in found] == [by_rows] * 2
    for got, want in zip(found, log_likelihoods(*arguments), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, targets = inputs(2, 4)
    with pytest.raises(ValueError, match=r"targets \(B, S\); got \(2, 4, 8\), \(96, 8\) and \(2, 3\)"):
        cross_entropy(hidden, weight, targets[:, 1:])
