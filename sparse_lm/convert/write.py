"""Writing a model's parameters, ours or Hugging Face's, into a directory that appears when it is whole."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sparse_lm.convert.errors import ConversionError
from sparse_lm.convert.families import config_to_hf
from sparse_lm.convert.leaves import Leaf, leaves
from sparse_lm.convert.tensor_files import Pending, write_tensors
from sparse_lm.convert.weights import HFWeights, Weights

_LARGEST_SHARD = 1 << 30


@contextlib.contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``out`` at the end of the block, or vanishes if that raises.

    Raises:
      ConversionError: there is something at ``out`` already, or no directory can be made there.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() or out.is_symlink():
        raise ConversionError(f"the output must be a new directory; {out} exists already: choose another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        outer = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ConversionError(
            f"the output must be a directory that can be made; {out} cannot ({error.strerror})"
        ) from error
    try:
        inner = outer / out.name  # mkdtemp's own directory is closed to all other users
        inner.mkdir()
        yield inner
        os.rename(inner, out)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def write_own(weights: Weights, directory: Path) -> None:
    """Writes the parameters in our layout, each in its stored type, for `open_own` to read.

    Args:
      weights: the model.
      directory: an existing one.
    """
    # Half of the largest file that is read: what is being gathered and what is being read stay under one.
    limit = _LARGEST_SHARD
    if isinstance(weights, HFWeights):
        limit = min(limit, weights.files.largest_file // 2)
    write_tensors(directory, _pending(weights, Leaf.name, weights.read), shard_bytes=limit)


def write_hf(
    weights: Weights, directory: Path, *, eos_id: int | None = None, shard_bytes: int = _LARGEST_SHARD
) -> None:
    """Writes ``config.json`` and the parameters as Hugging Face's transformers reads them.

    Args:
      weights: the model.
      directory: an existing one.
      eos_id: the token that ends a text, for ``config.json``.
      shard_bytes: most bytes of one safetensors file.

    Raises:
      ConversionError: no published family is like the model.
    """
    fields = config_to_hf(weights.config) | {"eos_token_id": eos_id}

    def published(leaf: Leaf, layer: int) -> np.ndarray:
        return leaf.flip(weights.read(leaf, layer))

    write_tensors(directory, _pending(weights, Leaf.hf, published), shard_bytes=shard_bytes)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _pending(
    weights: Weights, name: Callable[[Leaf, int], str], read: Callable[[Leaf, int], np.ndarray]
) -> Iterator[Pending]:
    """Every tensor of the model, one leaf after the other, each in all its layers."""
    for leaf in leaves(weights.config):
        for layer in leaf.layers(weights.config):
            yield Pending(name(leaf, layer), weights.nbytes(leaf, layer), partial(read, leaf, layer))
