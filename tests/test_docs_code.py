"""Python in the README and in docs/ runs as it stands: the blocks of a page in their order, in one namespace.

What a page takes as given (arrays, a model) is made here. The blocks of docs/your-own-loop.md are excerpts of
the examples, which ``test_examples.py`` runs.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from sparse_lm import ModelConfig, SparseFFN, SparseLM
from sparse_lm.layers import rms_norm

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "sparse_lm" / "convert" / "goldens" / "llama"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Names = dict[str, Any]


def blocks(path: Path) -> list[str]:
    return _BLOCK.findall(path.read_text())


def run(page: str, given: Names) -> Names:
    """The names after the page's blocks have run."""
    names = dict(given)
    for text in blocks(ROOT / page):
        exec(compile(text, page, "exec"), names)
    return names


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def layer(d_model: int = 16, d_ff: int = 32) -> Names:
    return {name: normal(nth, d_ff, d_model) for nth, name in enumerate(("w_gate", "w_up", "w_down"))}


def test_readme() -> None:
    gradients = jax.tree.leaves(run("README.md", {})["gradients"])
    assert len(gradients) == 3
    assert all(np.any(gradient != 0) and np.all(np.isfinite(gradient)) for gradient in gradients)


def test_formats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the kernels interpreted."""
    for name in ("sparse_ffn", "sparse_mlp"):
        monkeypatch.setattr(pallas_kernels, name, interpreted(getattr(pallas_kernels, name)))
    x, weights = normal(3, 20, 16), layer()
    names = run("docs/formats.md", {"x": x, **weights})
    assert "format='auto'" in capsys.readouterr().out
    active = names["options"].rule.active(x @ weights["w_up"].T)
    assert names["stats"].neuron_hits.tolist() == jnp.sum(active, axis=0).tolist()


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments, options):
        return jax.jit(function, static_argnames="options")(
            *arguments, options=dataclasses.replace(options, backend="interpret")
        )

    return call


def test_panel_ell() -> None:
    packed = run("docs/panel-ell.md", {})["packed"]
    assert packed.counts.tolist() == [2]
    assert packed.neurons[:2].tolist() == [1, 4]
    assert packed.values[:2].tolist() == [[2, 3], [1, 0]]


def test_neurons(capsys: pytest.CaptureFixture[str]) -> None:
    weights = layer()
    weights["w_gate"] = weights["w_gate"].at[::2].set(0)  # silent for any input
    names = run(
        "docs/neurons.md", {"weights": weights, "calibration": normal(4, 40, 16), "x": normal(5, 8, 16)}
    )
    np.testing.assert_allclose(
        names["y"], pallas_kernels.sparse_ffn(names["x"], **weights)[0], rtol=1e-5, atol=1e-4
    )
    assert capsys.readouterr().out == "0 missed activations in 0 of 8 tokens\n"


def test_alike_tokens() -> None:
    weights, tokens = layer(), jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 5
    ffn = SparseFFN(16, 32, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = normal(6, 2, 6, 16)
    given = {"tokens": tokens, "ffn": ffn, "x": x, "weights": weights, "scale": jnp.ones(16)}
    names = run("docs/alike-tokens.md", given)
    np.testing.assert_allclose(names["y"], pallas_kernels.sparse_ffn(x, **weights)[0], rtol=1e-5, atol=1e-4)
    want = x + ffn(rms_norm(x, jnp.ones(16), eps=1e-6, dtype=x.dtype))[0]
    np.testing.assert_allclose(names["x"], want, rtol=1e-5, atol=1e-4)


def test_meshes() -> None:
    x = normal(7, 4, 2, 512)
    weights = tuple(normal(nth, 2048, 512) for nth in range(3))
    names = run("docs/meshes.md", {"x": x, "weights": weights})
    assert names["y"].shape == x.shape
    assert names["ffn"].w_up.sharding.spec[0] == "data"


def test_generation(capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(
        vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2, num_kv_heads=1, context_length=80,
        dtype="float32",
    )  # fmt: skip
    given = {
        "model": SparseLM(config, rngs=nnx.Rngs(0)),
        "prompts": [[1, 2, 3], [4]],
        "ids": [5, 6],
        "tokenizer": SimpleNamespace(eos_id=0),
    }
    names = run("docs/generation.md", given)
    assert [len(row) for row in names["rows"]] == [64, 64]
    assert len(capsys.readouterr().out.splitlines()) > 64


def test_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-hf").symlink_to(GOLDEN)
    monkeypatch.chdir(tmp_path)
    assert isinstance(run("docs/convert.md", {})["model"], SparseLM)


def test_no_page_is_left_out() -> None:
    shown = {path.stem for path in PAGES if blocks(path)} - {"your-own-loop"}
    assert shown == {
        name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")
    } - {"no-page-is-left-out"} - {"readme"} | {"README"}
