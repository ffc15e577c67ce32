"""Calls lowered for CUDA on a machine that needs no GPU, through an abstract H200 or B200."""

import re

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
B200 = AbstractDevice(device_kind="NVIDIA B200", num_cores=148, platform="gpu")


def pairs(sizes, dtypes, kinds=("gated", "non-gated")):
    """Cases (sizes, dtype, kind): every size in every type, in one of the two kinds of layer.

    Kinds alternate, so that each also meets every size and every type: what a lowering refuses follows from
    one of the three or from two together.
    """
    return [
        (size, dtype, kinds[(row + column) % 2])
        for row, size in enumerate(sizes)
        for column, dtype in enumerate(dtypes)
    ]


def shapes(tokens, d_model, d_ff, dtype="bfloat16", kind="gated"):
    """Arguments of one call, as shapes: x (M, D) and weights (F, D)."""
    weight = jax.ShapeDtypeStruct((d_ff, d_model), dtype)
    names = ("w_gate", "w_up", "w_down") if kind == "gated" else ("w_up", "w_down")
    return {"x": jax.ShapeDtypeStruct((tokens, d_model), dtype)} | dict.fromkeys(names, weight)


def on_h200(function, *arguments, mesh_shape=(), mesh_axes=()):
    """``function(*arguments)`` under an abstract mesh of H200s."""
    return _on(H200, function, *arguments, mesh_shape=mesh_shape, mesh_axes=mesh_axes)


def _on(gpu, function, *arguments, mesh_shape=(), mesh_axes=()):
    axis_types = (AxisType.Auto,) * len(mesh_axes)
    mesh = AbstractMesh(mesh_shape, mesh_axes, axis_types=axis_types, abstract_device=gpu)
    with use_abstract_mesh(mesh):
        return function(*arguments)


def lowered(function, *arguments, platform="cuda", gpu=H200, **mesh):
    """The StableHLO of a function that an abstract GPU traced, lowered for CUDA or another platform."""

    def lower():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()

    return _on(gpu, lower, **mesh)


def panel_launches(text):
    """The names of PanelELL's kernels in a lowered program, a call each: Triton's, and Mosaic GPU's."""
    on_mosaic = re.findall(r"\\00(panel_\w+)_mosaic_gpu\\", text)
    assert len(on_mosaic) == text.count("custom_call @mosaic_gpu_v2")
    return re.findall(r'"(panel_\w+)"', text), on_mosaic
