"""docs/support.md and docs/formats.md say what `dispatch` and `auto` do: each cell is compared with them."""

import re
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import FFNOptions, Threshold, checks, dispatch, sparse_ffn, sparse_mlp
from pallas_kernels.activations import ActivationName
from pallas_kernels.errors import RequestError
from pallas_kernels.options import Backend, Format, parse_layout
from pallas_kernels.panel.config import BreakEven, break_even

DOCS = Path(__file__).parents[1] / "docs"
GPUS = {  # name on the page: JAX's name, compute capability times ten, cores
    "V100": ("NVIDIA V100-SXM2-16GB", 70, 80),
    "A100": ("NVIDIA A100-SXM4-80GB", 80, 108),
    "RTX 4090": ("NVIDIA GeForce RTX 4090", 89, 128),
    "H100": ("NVIDIA H100 80GB HBM3", 90, 132),
    "H200": ("NVIDIA H200", 90, 132),
    "B200": ("NVIDIA B200", 100, 148),
}
OTHERS = {"CPU": "cpu", "TPU": "tpu", "AMD": "gpu"}
SHOWN = {"xla": "XLA", "triton": "Triton", "mosaic_gpu": "Mosaic GPU"}


def table(page: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table under a heading: by the first column, and then by the columns' names."""
    section = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    header, _, *rows = ([cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def on(name: str):
    """A context in which calls are traced for a device of the page."""
    kind, _, cores = GPUS.get(name, (name, 0, 0))
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=OTHERS.get(name, "gpu"))
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def runs(format: str, name: str, dtype: str = "bfloat16", backend: str = "auto") -> str:
    """What a call runs on a device, as the page has it."""
    call = dispatch.Call(1 if format == "decode" else 65536, 2048, 5632, jnp.dtype(dtype))
    with on(name):
        try:
            return SHOWN[dispatch.choose(FFNOptions(format=format, backend=backend), call).backend]
        except RequestError:
            return "an error"


def test_every_format_on_every_device():
    rows = table("support.md", "Format by device")
    assert set(rows) == set(get_args(Format))
    for format, cells in rows.items():
        for names, cell in cells.items():
            for name in names.split(", "):
                assert runs(format, name) == cell.rstrip(" *†"), (format, name)
    listed = {name for names in rows["dense"] for name in names.split(", ")}
    assert listed == {*GPUS, *OTHERS}


def test_mosaic_gpu_by_name_on_every_device():
    rows = table("support.md", "Mosaic GPU by device")
    assert set(rows) == {format for format, names in dispatch._BACKENDS.items() if "mosaic_gpu" in names}
    for format, cells in rows.items():
        listed = {name: cell for names, cell in cells.items() for name in names.split(", ")}
        for name in (*GPUS, *OTHERS):
            found = runs(format, name, backend="mosaic_gpu")
            assert found == listed.get(name, "an error").rstrip(" *"), (format, name)


@pytest.mark.parametrize("heading", ["Format by device", "Mosaic GPU by device"])
def test_only_hopper_is_named_as_tested(heading):
    """Marks of GPUs that no kernel has run on stand at every other GPU that runs one, and nowhere else."""
    for cells in table("support.md", heading).values():
        for names, cell in cells.items():
            runs_kernels = cell.startswith(("Triton", "Mosaic GPU"))
            assert (cell[-1] in "*†") == (runs_kernels and names != "H100, H200"), (names, cell)


def test_every_format_in_every_type():
    rows = table("support.md", "Format by type")
    assert set(rows) == set(get_args(Format))
    for format, cells in rows.items():
        assert set(cells) == {jnp.dtype(dtype).name for dtype in checks._DTYPES}
        for dtype, cell in cells.items():
            assert runs(format, "H100", dtype) == cell, (format, dtype)


def test_every_format_on_every_backend():
    rows = table("support.md", "Format by backend")
    assert set(rows) == set(get_args(Format))
    for format, cells in rows.items():
        assert set(cells) == set(get_args(Backend)) - {"auto"}
        call = dispatch.Call(1 if format == "decode" else 65536, 2048, 5632, jnp.dtype("bfloat16"))
        for backend, cell in cells.items():
            with on("H100"):
                considered = dispatch._consider(FFNOptions(format=format, backend=backend), call)
            assert any(reason is None for _, reason in considered) == (cell == "yes"), (format, backend)


@pytest.mark.parametrize(
    ("layout", "backend", "fits", "does_not"),
    [
        ("twell", "triton", {"d_ff": 65536}, {"d_ff": 65537}),
        ("twell", "mosaic_gpu", {"d_ff": 5640}, {"d_ff": 5636}),
        ("panel", "mosaic_gpu", {"tokens": 128}, {"tokens": 127}),
        ("panel", "mosaic_gpu", {"d_model": 2112}, {"d_model": 2080}),
        ("panel", "mosaic_gpu", {"dtype": jnp.dtype("float16")}, {"dtype": jnp.dtype("float32")}),
        ("auto", "mosaic_gpu", {"tokens": 1024}, {"tokens": 1023}),
        ("auto", "triton", {"tokens": 2048}, {"tokens": 2047}),
    ],
)
def test_limits_of_shapes(layout, backend, fits, does_not):
    """Those that the page names, on both of their sides."""
    plain = dispatch.Call(65536, 2048, 5632, jnp.dtype("bfloat16"))
    with on("H100"):
        found = dispatch.device_lib.current()
    asked = parse_layout(layout), backend
    assert dispatch.unsupported_reason(*asked, plain._replace(**fits), found) is None
    assert dispatch.unsupported_reason(*asked, plain._replace(**does_not), found) is not None


def test_activations():
    rows = table("support.md", "Activations")
    known = {f'"{name}"': name for name in get_args(ActivationName)} | {"Threshold(value)": Threshold(0.01)}
    assert set(rows) == set(known)
    x, weight = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)
    for name, cells in rows.items():
        options = FFNOptions(format="dense", activation=known[name])
        for column, layer, weights in (
            ("gated (sparse_ffn)", sparse_ffn, 3),
            ("not gated (sparse_mlp)", sparse_mlp, 2),
        ):
            if cells[column] == "yes":
                jax.eval_shape(
                    lambda *a, layer=layer, o=options: layer(*a, options=o), x, *[weight] * weights
                )
            else:
                with pytest.raises(ValueError, match="no gate"):
                    layer(jnp.ones((4, 8)), *[jnp.ones((16, 8))] * weights, options=options)


def test_break_even_shares():
    lines = (DOCS / "formats.md").read_text().split("\n## What `auto` does\n")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in re.findall(r"^\|.*\|$", lines, re.M)[2:]]
    assert len(rows) == 5
    for gpu, stage, gated, *listed in rows:
        for name in ("H100", "H200") if gpu == "Hopper" else ("A100", "RTX 4090", "B200"):
            with on(name):
                device = dispatch.device_lib.current()
            for is_gated in {"yes": [True], "no": [False], "both": [True, False]}[gated]:
                shares = break_even(device, stage.strip("`"), gated=is_gated)
                assert shares == BreakEven(*map(float, listed)), (gpu, stage, gated)
