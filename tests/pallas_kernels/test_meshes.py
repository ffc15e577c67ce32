"""Four simulated devices that share the arrays of one call give what one device gives, and send what they
must."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from lowering import H200, on_h200, shapes
from on_meshes import P, check_traffic, check_values, inputs, mesh_of, modes, place, program, run

from pallas_kernels import FFNOptions, Panel, sparse_ffn, sparse_mlp
from pallas_kernels.bench.collectives import Collective, collectives
from pallas_kernels.partition.layer import Layer

D, F = 8, 32
MODES = modes(4)
DENSE = FFNOptions(format="dense")
PANEL = FFNOptions(format=Panel(tokens=16, capacity=1.0), backend="interpret")
KINDS = [AxisType.Auto, AxisType.Explicit]


def split_inputs(mode, kind, dtype="float32"):
    """The mesh, the arguments as they are, and on its devices."""
    arguments = inputs(4, 16, D, F, dtype)
    mesh = mesh_of(mode, kind, jax.devices())
    return mesh, arguments, place(mesh, mode, *arguments)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dense(mode, kind):
    run(DENSE, MODES[mode], kind, jax.devices())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_panel(kind):
    run(PANEL, MODES["both"], kind, jax.devices(), directions=(True,))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("format", ["hybrid", "panel", "twell"])
def test_the_programs_of_a_gpu_hold_no_constant_array(format, backend):
    # The partitioner takes none that does.
    layer = Layer(FFNOptions(format=format, backend=backend))

    def call(*arguments):
        (y, stats), kept = layer.forward(arguments)
        return layer.infer(arguments), layer.backward(arguments, kept, y, stats.l1, weights=True)

    traced = on_h200(jax.make_jaxpr(call), *shapes(64, D, F).values())
    assert [constant.shape for constant in traced.consts if constant.ndim] == []


@pytest.mark.parametrize("context", [contextlib.nullcontext, jax.set_mesh, lambda mesh: mesh])
@pytest.mark.filterwarnings("ignore:.with mesh.*deprecated:DeprecationWarning")
def test_a_mesh_around_the_call_changes_nothing(context):
    mode = MODES["both"]
    mesh, arguments, placed = split_inputs(mode, AxisType.Auto)
    with context(mesh):
        compiled = program(DENSE, True).lower(*placed).compile()
        check_traffic(compiled.as_text(), mode, *arguments[:2], differentiated=True)
        y, stats = sparse_ffn(placed[0], *placed[1], options=DENSE)  # outside of jit, too
    expected = program(DENSE, False)(*arguments)
    check_values((y, stats), expected[1], "float32", neurons_split=True)
    assert y.sharding.spec == P("data")
    assert stats.neuron_hits.sharding.spec == P("model")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (P("data", "model"), P(None, "data")),  # no axis left for neurons
        (P("data", None, "model"), P("model")),  # x comes split in D: it is gathered
        (P("data"), P(None, "model")),  # weights stored over an axis that splits nothing
        (P("data"), P(("data", "model"))),  # one axis for storage and one for neurons, in one dimension
        (P(None, None, "data"), P()),
    ],
)
def test_every_placement_gives_the_same(x, weight, kind):
    mesh, arguments, _ = split_inputs(MODES["both"], kind)
    put = [
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, (x, weight, P()), strict=True)
    ]
    found, expected = program(DENSE, True)(*put), program(DENSE, True)(*arguments)
    check_values(found, expected, "float32", neurons_split="model" in str(weight))
    for gradient, argument in zip(jax.tree.leaves(found[1]), jax.tree.leaves(put[:2]), strict=True):
        if kind == AxisType.Explicit:
            assert jax.typeof(gradient) == jax.typeof(argument)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_devices_cannot_share_evenly_they_compute_alike(kind):
    """Three sequences over two devices, and F of 33."""
    x, weights, dy = inputs(3, 5, D, 33, "float32")
    mesh = mesh_of(MODES["both"], kind, jax.devices())
    put = jax.device_put((x, weights, dy), NamedSharding(mesh, P()))

    def loss(x, weights, dy):
        if kind == AxisType.Auto:  # which may split unevenly
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))
            weights = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P("model")))
        y, stats = sparse_ffn(x, *weights, options=DENSE)
        return jnp.sum(dy * y) + 2 * stats.l1, (y, stats)

    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*put)
    check_values(found, program(DENSE, True)(x, weights, dy), "float32")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_a_gate_from_16_bit_weights(kind):
    """Gradients of 16-bit weights are added up over devices in f32, and rounded once."""
    mode = MODES["fsdp-rows"]
    _, (x, weights, _), placed = split_inputs(mode, kind, "bfloat16")

    def loss(x, weights):
        y, stats = sparse_mlp(x, *(weight.astype(x.dtype) for weight in weights[1:]), options=DENSE)
        return jnp.sum(y.astype(jnp.float32)) + stats.l1, stats

    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = differentiate.lower(*placed[:2]).compile()
    check_values(compiled(*placed[:2]), differentiate(x, weights), "bfloat16")
    sent = collectives(compiled.as_text())
    assert sent.count(Collective("reduce-scatter", "f32", F * D // 4)) == 2
    assert sent.count(Collective("all-gather", "u16", F * D)) in (2, 4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("transform", ["vmap", "remat", "scan"])
def test_transformations(transform, kind):
    _, arguments, placed = split_inputs(MODES["both"], kind)

    def layer(x, weights):
        y, stats = sparse_ffn(x, *weights, options=DENSE)
        return y, stats.l1

    def loss(x, weights, dy):
        if transform == "vmap":
            y, l1 = jax.vmap(layer, (1, None), (1, 0))(x, weights)
        elif transform == "remat":
            y, l1 = jax.checkpoint(layer)(x, weights)
        else:
            y, l1 = jax.lax.scan(lambda x, scale: layer(x * scale, weights), x, jnp.array([1.0, 0.5]))
        return jnp.sum(dy * y) + 2 * jnp.mean(l1)

    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    check_values(differentiate(*placed), differentiate(*arguments), "float32")


def test_no_gathered_weight_is_kept_for_the_backward():
    """On Explicit axes: this device's tokens, its pieces of the weights and its projections."""
    _, _, (x, weights, _) = split_inputs(MODES["fsdp-rows"], AxisType.Explicit, "bfloat16")
    _, pull = jax.vjp(lambda x, *weights: sparse_ffn(x, *weights, options=DENSE)[0], x, *weights)
    kept = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(pull) if leaf.ndim)
    tokens = x.size // D // 4
    assert kept == tokens * D + 3 * F * D // 4 + 2 * tokens * F


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gradient_in_x_alone_sends_no_weight(kind):
    mode = MODES["both"]
    _, (x, *_), (placed, weights, _) = split_inputs(mode, kind)
    differentiate = jax.jit(jax.grad(lambda x, weights: sparse_ffn(x, *weights, options=DENSE)[1].l1))
    sent = collectives(differentiate.lower(placed, weights).compile().as_text())
    assert [c for c in sent if c.elements > F] == [Collective("all-reduce", "f32", x.size // 2)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gradient_of_x_alone_takes_none_from_the_gradients_after_it(kind):
    """A call on a mesh is compiled as one, and JAX keeps its trace: the gradient of everything, that of x
    alone, and then within another transformation that of everything again."""
    _, arguments, placed = split_inputs(MODES["both"], kind)
    options = FFNOptions(format="dense", activation="relu2")  # no other test has left a trace of it

    def layer(x, weights):
        return sparse_ffn(x, *weights, options=options)[0]

    def loss(x, weights, dy, function=layer):
        return jnp.sum(dy * function(x, weights))

    of_all = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_all(*placed)
    jax.jit(jax.grad(loss))(*placed)
    again = jax.jit(jax.grad(partial(loss, function=jax.checkpoint(layer)), argnums=(0, 1)))(*placed)
    check_values(again, of_all(*arguments), "float32")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_second_derivative_is_refused(kind):
    _, _, (x, weights, _) = split_inputs(MODES["both"], kind)
    slope = jax.grad(lambda scale: sparse_ffn(x * scale, *weights, options=DENSE)[1].l1)
    with pytest.raises(
        NotImplementedError, match="differentiated once, in reverse mode, on arrays that several"
    ):
        jax.grad(slope)(1.0)


def test_inside_a_shard_map_over_other_axes():
    """The caller has split the tokens; its other axis is the layer's to split the neurons over."""
    mesh, arguments, (x, weights, dy) = split_inputs(MODES["both"], AxisType.Explicit)

    def local(x, weights):
        y, stats = sparse_ffn(x, *weights, options=DENSE)
        return y, stats.all_reduce("data")

    shared = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()), axis_names={"data"}
    )

    def loss(x, weights, dy):
        y, stats = shared(x, weights)
        return jnp.sum(dy * y) + 2 * stats.l1, (y, stats)

    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, weights, dy)
    check_values(found, program(DENSE, True)(*arguments), "float32", neurons_split=True)


@pytest.mark.parametrize("format", ["auto", "hybrid", "twell"])
def test_kernels_pass_the_check_of_shard_map(format):
    """On Explicit axes that check is on. For four abstract H200s: forward, and forward with backward."""
    mesh = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, abstract_device=H200)
    x = jax.ShapeDtypeStruct((8, 1024, 256), "bfloat16", sharding=NamedSharding(mesh, P("data")))
    weight = jax.ShapeDtypeStruct((1024, 256), "float32", sharding=NamedSharding(mesh, P("model", "data")))

    def loss(x, weights):
        y, stats = sparse_ffn(x, *weights, options=FFNOptions(format=format))
        return jnp.sum(y.astype(jnp.float32)) + stats.l1

    sent = []
    with use_abstract_mesh(mesh):
        for function in (loss, jax.value_and_grad(loss, argnums=(0, 1))):
            traced = jax.jit(function).trace(x, [weight] * 3)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "triton" in text
            sent.append([text.count(f'"stablehlo.{name}"') for name in ("all_gather", "reduce_scatter")])
    assert sent[0] == [3, 0]
    assert sent[1][1] == 3


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_one_device(kind):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:1])
    x, weights, dy = inputs(4, 16, D, F, "float32")
    x_placed, dy_placed = jax.device_put((x, dy), NamedSharding(mesh, P("data")))
    placed = x_placed, jax.device_put(weights, NamedSharding(mesh, P("model"))), dy_placed
    check_values(program(DENSE, True)(*placed), program(DENSE, True)(x, weights, dy), "float32")
