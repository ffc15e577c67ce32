"""Where the parameters of a model are, and reading them from there: a published directory or one of ours."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from sparse_lm.config import Dtype, ModelConfig
from sparse_lm.convert.errors import ConversionError
from sparse_lm.convert.families import family_from_hf
from sparse_lm.convert.leaves import Leaf, leaves
from sparse_lm.convert.tensor_files import DTYPES, TensorFiles, read_json
from sparse_lm.model import SparseLM

Index = tuple[slice, ...]
_ROWS_AT_ONCE = 4096  # of two tables that are compared


class Weights(Protocol):
    """The parameters of one model, read tensor by tensor."""

    @property
    def config(self) -> ModelConfig:
        """The model."""

    def nbytes(self, leaf: Leaf, layer: int) -> int:
        """Bytes of the leaf in one layer, in its stored type."""

    def read(self, leaf: Leaf, layer: int, index: Index = ()) -> np.ndarray:
        """The leaf in one layer, our layout, its stored type; or the part of it that ``index`` names."""


class HFWeights:
    """A Hugging Face directory whose tensors have been checked against its ``config.json``.

    Attributes:
      config: the model that ``config.json`` describes.
      fields: the whole of ``config.json``.
      files: its tensors.
    """

    def __init__(self, directory: Path, files: TensorFiles, dtype: Dtype | None = None) -> None:
        """Raises ConversionError: another model, or tensors that are not those of the model."""
        self.fields = read_json(directory / "config.json")
        family = family_from_hf(self.fields)
        self.config = family.config(self.fields)
        if dtype is not None:
            self.config = dataclasses.replace(self.config, dtype=dtype)
        self.files = files
        expected = {
            leaf.hf(layer): leaf.hf_shape
            for leaf in leaves(self.config)
            for layer in leaf.layers(self.config)
        }
        found = {name for name in files.names if not family.is_ignored(name)}
        if self.config.tied_embeddings and "lm_head.weight" in found:
            _check_tied(files)
            found.remove("lm_head.weight")
        _check(files, expected, found)

    def nbytes(self, leaf: Leaf, layer: int) -> int:
        return self.files.nbytes(leaf.hf(layer))

    def read(self, leaf: Leaf, layer: int, index: Index = ()) -> np.ndarray:
        return leaf.flip(self.files.read(leaf.hf(layer), index[::-1] if leaf.transposed else index))


class OwnWeights:
    """Parameters that `write_own` has written."""

    def __init__(self, config: ModelConfig, files: TensorFiles) -> None:
        """Raises ConversionError: the tensors are not those of the model."""
        self.config = config
        self.files = files
        expected = {leaf.name(layer): leaf.shape for leaf in leaves(config) for layer in leaf.layers(config)}
        _check(files, expected, files.names)

    def nbytes(self, leaf: Leaf, layer: int) -> int:
        return self.files.nbytes(leaf.name(layer))

    def read(self, leaf: Leaf, layer: int, index: Index = ()) -> np.ndarray:
        return self.files.read(leaf.name(layer), index)


@contextlib.contextmanager
def open_hf(directory: str | Path, *, dtype: Dtype | None = None) -> Iterator[HFWeights]:
    """A Hugging Face directory: safetensors in one file or sharded, and ``config.json``.

    Args:
      directory: its path.
      dtype: the model's compute type; ``None`` takes that of ``config.json``.

    Raises:
      ConversionError: it is no such directory, its model is none that can be converted, or its tensors are
        not those that its configuration asks for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        found = f"{directory} is a file" if directory.exists() else f"there is none at {directory}"
        raise ConversionError(f"a Hugging Face model must be a directory; {found}")
    with TensorFiles(directory) as files:
        yield HFWeights(directory, files, dtype)


@contextlib.contextmanager
def open_own(directory: str | Path, config: ModelConfig) -> Iterator[OwnWeights]:
    """What `write_own` has written for ``config``.

    Raises:
      ConversionError: there are no such files, or their tensors are not those of the model.
    """
    with TensorFiles(Path(directory)) as files:
        yield OwnWeights(config, files)


def load_params(weights: Weights, sharding: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    """The parameters as ``nnx.merge`` takes them, f32, each device reading only its own part.

    Args:
      weights: where they are.
      sharding: of every parameter; one whose shape it does not fit raises JAX's ValueError. By default all
        lie on the first device.
    """
    return load_sharded(weights, lambda leaf: sharding)


def load_sharded(
    weights: Weights, sharding_of: Callable[[Leaf], jax.sharding.Sharding | None]
) -> dict[str, Any]:
    """``load_params`` with a sharding for each leaf; a leaf of the layers has the layer axis in front."""
    params: dict[str, Any] = {}
    for leaf in leaves(weights.config):
        inner = params
        for key in leaf.path[:-1]:
            inner = inner.setdefault(key, {})
        inner[leaf.path[-1]] = _array(weights, leaf, sharding_of(leaf))
    return params


def load_model(weights: Weights, sharding: jax.sharding.Sharding | None = None) -> SparseLM:
    """The model with the parameters of ``weights``; arguments as for ``load_params``."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: SparseLM(weights.config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, load_params(weights, sharding))


def _array(weights: Weights, leaf: Leaf, sharding: jax.sharding.Sharding | None) -> jax.Array:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    numbers = leaf.layers(weights.config)
    shape = (len(numbers), *leaf.shape) if leaf.layered else leaf.shape

    def part(index: Index | None) -> np.ndarray:
        index = index or ()
        full = index + (slice(None),) * (len(shape) - len(index))
        if not leaf.layered:
            return weights.read(leaf, 0, full).astype(np.float32)
        chosen = numbers[full[0]]
        size = tuple(len(range(*cut.indices(n))) for cut, n in zip(full, shape, strict=True))
        values = np.empty(size, np.float32)
        for row, layer in zip(values, chosen, strict=True):
            row[...] = weights.read(leaf, layer, full[1:])
        return values

    return jax.make_array_from_callback(shape, sharding, part)


def _check(files: TensorFiles, expected: Mapping[str, tuple[int, ...]], found: set[str]) -> None:
    where = files.directory
    missing = next((name for name in expected if name not in found), None)
    if missing is not None:
        raise ConversionError(
            f"{where} must hold the tensor {missing}, which the model's configuration asks for; found none"
        )
    extra = min(found - set(expected), default=None)
    if extra is not None:
        raise ConversionError(
            f"{where} must hold the tensors of the model's configuration only; found {extra} besides: it "
            "belongs to another kind of model"
        )
    for name, shape in expected.items():
        if files.shape(name) != shape:
            raise ConversionError(
                f"{name} in {where} must have the shape {shape} that the model's configuration gives it; "
                f"found {files.shape(name)}"
            )
        if files.dtype(name) not in DTYPES:
            raise ConversionError(
                f"{name} in {where} must be stored as one of {', '.join(DTYPES)}; found {files.dtype(name)}: "
                "quantized weights are not read"
            )


def _check_tied(files: TensorFiles) -> None:
    """A stored head of tied embeddings is a copy of them; transformers would not read another."""
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    if table not in files.names:
        return  # the missing tensor is named by the check that follows
    same = files.shape(table) == files.shape(head) and files.dtype(table) == files.dtype(head)
    rows = files.shape(table)[0] if same else 0
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = (slice(start, min(start + _ROWS_AT_ONCE, rows)), slice(None))
        same = same and files.read(table, part).tobytes() == files.read(head, part).tobytes()
    if not same:
        raise ConversionError(
            f"{files.directory} must hold no {head} beside tied embeddings (tie_word_embeddings) but a copy "
            "of them; found another one: its config.json contradicts its tensors"
        )
