"""One call on a mesh: placed as a mode says, compiled, and compared with one device's."""

import dataclasses
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import FFNOptions, sparse_ffn
from pallas_kernels.bench.collectives import collectives

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to split a call.

    Attributes:
      shape: of the mesh, whose axes are "data" and "model".
      x, weight: how x (batch, sequence, D) and each weight (F, D) are stored.
      dtype: of x; weights are f32.
      forward, backward: what crosses devices, as (kind, dtype, share of an array), where the array is
      "tokens"
        (M D) or "weight" (F D, three of them), in units of that array.
    """

    shape: tuple[int, int]
    x: PartitionSpec
    weight: PartitionSpec
    dtype: str
    forward: tuple[tuple[str, str, str, float], ...]
    backward: tuple[tuple[str, str, str, float], ...] = ()


def modes(n: int) -> dict[str, Mode]:
    """On n devices: tensor parallel, both, and FSDP with weights split by rows and by columns."""
    summed = ("all-reduce", "f32", "tokens", 1.0)
    half = ("all-reduce", "f32", "tokens", 0.5)
    gathered = ("all-gather", "u16", "weight", 1.0)
    scattered = ("reduce-scatter", "f32", "weight", 1 / n)
    split = {
        "both": Mode(
            (2, n // 2),
            P("data"),
            P("model"),
            "float32",
            (half,),
            (half, ("all-reduce", "f32", "weight", 2 / n)),
        )
    }
    return (split if n > 2 else {}) | {
        "tensor": Mode((1, n), P(), P("model"), "float32", (summed,), (summed,)),
        "fsdp-rows": Mode((n, 1), P("data"), P("data"), "bfloat16", (gathered,), (scattered,)),
        "fsdp-columns": Mode((n, 1), P("data"), P(None, "data"), "bfloat16", (gathered,), (scattered,)),
    }


def inputs(batch: int, sequence: int, d_model: int, d_ff: int, dtype: str):
    """x, three f32 weights and a cotangent of y; some 40 % of the gates are active."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, sequence, d_model)).astype(dtype)
    weights = [rng.standard_normal((d_ff, d_model)).astype(np.float32) / d_model**0.5 for _ in range(3)]
    return x, weights, rng.standard_normal(x.shape).astype(np.float32)


@cache
def program(options: FFNOptions, differentiated: bool):
    """The compiled-to-be call, or its loss ``sum(dy * y) + 2 l1`` with gradients and the same outputs."""

    def loss(x, weights, dy):
        y, stats = sparse_ffn(x, *weights, options=options)
        return jnp.sum(dy * y.astype(jnp.float32)) + 2 * stats.l1, (y, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True) if differentiated else loss)


def place(mesh: Mesh, mode: Mode, x, weights, dy):
    """The arguments as arrays that the devices of a mesh share."""
    sharded = jax.device_put((x, dy), NamedSharding(mesh, mode.x))
    return sharded[0], jax.device_put(weights, NamedSharding(mesh, mode.weight)), sharded[1]


def run(
    options: FFNOptions, mode: Mode, kind: AxisType, devices, directions=(False, True), *, traffic=True
) -> None:
    """A call, and as the last of ``directions`` its gradient, under plain jit with arrays of a mesh and no
    mesh around it; with ``traffic`` what its program sends between devices is counted."""
    x, weights, dy = inputs(4, 16, 8, 32, mode.dtype)
    placed = place(mesh_of(mode, kind, devices), mode, x, weights, dy)
    for differentiated in directions:
        compiled = program(options, differentiated).lower(*placed).compile()
        if traffic:
            check_traffic(compiled.as_text(), mode, x, weights, differentiated=differentiated)
    expected = program(options, True)(x, weights, dy)
    check_values(compiled(*placed), expected, mode.dtype, neurons_split=mode.weight == P("model"))


def mesh_of(mode: Mode, kind: AxisType, devices) -> Mesh:
    return Mesh(np.array(devices).reshape(mode.shape), ("data", "model"), axis_types=(kind,) * 2)


def check_values(found, expected, dtype: str, *, neurons_split: bool = False) -> None:
    """Loss, y, statistics and gradients, up to the order of sums; counts exactly.

    Where neurons are split, ``max_nnz`` is a bound.
    """
    found, expected = jax.device_get((found, expected))
    for (path, got), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if name.endswith("max_nnz") and neurons_split:
            assert want <= got
        elif np.issubdtype(got.dtype, np.integer):
            np.testing.assert_array_equal(got, want, err_msg=name)
        else:
            got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
            ulps = 64 if dtype == "float32" else 2
            atol = ulps * float(jnp.finfo(dtype).eps) * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


def check_traffic(text: str, mode: Mode, x, weights, *, differentiated: bool) -> None:
    """Whatever crosses devices and has more than F elements is what the mode names, and no more of it."""
    sizes, count = {"tokens": x.size, "weight": weights[0].size}, {"tokens": 1, "weight": 3}
    wanted: Counter = Counter()
    for kind, dtype, array, share in (*mode.forward, *(mode.backward if differentiated else ())):
        wanted[(kind, dtype, int(sizes[array] * share))] += count[array]
    found = Counter(c for c in collectives(text) if c.elements > weights[0].shape[0])
    assert found.keys() == wanted.keys()
    for collective, times in found.items():
        # A backward gathers weights again, unless the compiler finds that the forward's are still there.
        again = differentiated and collective.kind == "all-gather"
        assert times in ((wanted[collective], 2 * wanted[collective]) if again else (wanted[collective],)), (
            collective
        )
