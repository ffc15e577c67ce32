"""The import rule between the packages, read from the source: never backwards."""

import ast
import sys
from pathlib import Path

import pytest

import pallas_kernels

ROOT = Path(__file__).parents[1]
OURS = {"pallas_kernels", "sparse_lm", "train", "configs"}
THEIRS = {
    "grain", "tokenizers", "optax", "orbax", "flax", "tyro", "rich", "zstandard",
    "safetensors", "huggingface_hub", "jinja2", "lm_eval", "tensorboardX", "wandb", "matplotlib", "pyarrow",
    "pynvml", "absl",
}  # fmt: skip
ALLOWED = {
    "pallas_kernels": {"pallas_kernels", "jax", "jaxlib", "jaxtyping", "numpy"},
    "sparse_lm": {"sparse_lm", "pallas_kernels", "jax", "numpy", "flax", "safetensors", "lm_eval"},
    "train": {"train", "sparse_lm", "pallas_kernels", "configs", "jax", "numpy"} | THEIRS,
    "configs": {"configs", "train", "sparse_lm", "pallas_kernels"},
}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path):
    """(line, imported module) of every import in a file, those inside functions too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_what_it_may(package):
    allowed = ALLOWED[package] | set(sys.stdlib_module_names)
    files = modules(package)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in imports(path)
        if module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_private_modules_of_jax_are_left_alone():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for package in OURS
        for path in modules(package)
        for line, module in imports(path)
        if module.startswith("jax._src")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_specification_is_short():
    assert len((ROOT / "pallas_kernels" / "reference.py").read_text().splitlines()) <= 100


def test_the_public_surface_of_the_kernels():
    expected = [
        "Auto", "Decode", "Dense", "FFNOptions", "FFNStats", "Hybrid", "HybridELL", "Panel", "PanelELL",
        "Threshold", "TwELL", "Twell", "sparse_ffn", "sparse_mlp",
    ]  # fmt: skip
    assert sorted(pallas_kernels.__all__) == expected
    for name in expected:
        assert getattr(pallas_kernels, name).__doc__
