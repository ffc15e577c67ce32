"""SparseFFN saved by orbax on one mesh and restored on another.

On a machine without four accelerators, simulate them:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/orbax_other_mesh.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_lm import SparseFFN

D_MODEL, D_FF = 32, 128


def make(neuron_axis):
    """The layer with its neurons split over an axis of the ambient mesh."""
    metadata = {"out_sharding": (neuron_axis, None)}
    return SparseFFN(D_MODEL, D_FF, rngs=nnx.Rngs(0), dtype=jnp.float32, kernel_metadata=metadata)


def abstract_params(mesh, neuron_axis):
    """Shapes, types and places of the parameters, for orbax to restore into; nothing is computed."""
    graph, params = nnx.split(nnx.eval_shape(lambda: make(neuron_axis)))
    place = NamedSharding(mesh, P(neuron_axis))

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return graph, jax.tree.map(placed, params)


@nnx.jit
def apply(ffn, x):
    return ffn(x)[0]


def main() -> None:
    devices = jax.devices()[:4]
    if len(devices) < 4:
        raise SystemExit(
            f"this example needs four devices, found {len(devices)}: set XLA_FLAGS as its docstring says"
        )
    auto = (AxisType.Auto,) * 2
    tensor_parallel = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto, devices=devices)
    only_data = jax.make_mesh((4,), ("data",), axis_types=auto[:1], devices=devices)
    x = jax.random.normal(jax.random.key(1), (8, 16, D_MODEL))

    with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
        path = Path(directory) / "ffn"
        with jax.set_mesh(tensor_parallel):
            ffn = make("model")
            before = apply(ffn, jax.device_put(x, NamedSharding(tensor_parallel, P("data"))))
            checkpointer.save(path, nnx.state(ffn))
            checkpointer.wait_until_finished()

        with jax.set_mesh(only_data):
            graph, wanted = abstract_params(only_data, "data")
            ffn = nnx.merge(graph, checkpointer.restore(path, wanted))
            after = apply(ffn, jax.device_put(x, NamedSharding(only_data, P("data"))))
    print(f"w_up is {ffn.w_up[...].sharding.spec} on {dict(only_data.shape)}")
    assert ffn.w_up[...].sharding == NamedSharding(only_data, P("data"))
    assert jnp.allclose(jax.device_get(before), jax.device_get(after), atol=1e-5)


if __name__ == "__main__":
    main()
