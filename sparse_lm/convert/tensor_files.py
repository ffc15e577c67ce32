"""Directories of safetensors files: read tensor by tensor, written shard by shard, never pickled.

A directory holds ``model.safetensors``, or shards and ``model.safetensors.index.json``, as Hugging Face lays
them out; converted models of ours are laid out the same way under names of ours.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_lm.convert.errors import ConversionError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""What a parameter may be stored in, by safetensors' name, and the bytes of a number."""
_SHARD_BYTES = 1 << 30


class TensorFiles:
    """The tensors of a directory; opens each file once and reads what is asked for.

    Use it as a context manager: files are closed at its end.

    Args:
      directory: with ``model.safetensors`` or an index and its shards.

    Attributes:
      directory: the same.
      largest_file: bytes of the largest file.

    Raises:
      ConversionError: no such files, an index that is wrong, or a file that is no safetensors file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = _paths(directory)
        self.largest_file = max(path.stat().st_size for path in paths)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._slices: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for path in paths:
                self._open(path, stack)
            self._stack = stack.pop_all()

    def _open(self, path: Path, stack: contextlib.ExitStack) -> None:
        try:
            # pread instead of mmap: a mapped file counts as the program's memory once it is read.
            file = stack.enter_context(safe_open(path, framework="numpy", backend="pread"))
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} must be a whole safetensors file; the library says: {error}: fetch the file again"
            ) from error
        for name in names:
            if name in self._files:
                raise ConversionError(
                    f"{self.directory} must hold each tensor once; found {name} in two files: move the "
                    "copy that does not belong to the model elsewhere"
                )
            self._files[name] = file
            self._slices[name] = file.get_slice(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def nbytes(self, name: str) -> int:
        """Of a tensor in one of the types that a parameter may have."""
        return math.prod(self.shape(name)) * DTYPES[self.dtype(name)]

    def dtype(self, name: str) -> str:
        """In safetensors' words: ``"BF16"``, ``"I64"``."""
        return self._slices[name].get_dtype()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that ``index`` names.

        Raises:
          ConversionError: the file cannot be read any more.
        """
        try:
            return self._slices[name][index] if index else self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{name} in {self.directory} cannot be read; the library says: {error}: fetch the files again"
            ) from error


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor that is read only when there is room for it.

    Attributes:
      name: under which it is written.
      nbytes: how much room.
      read: the tensor.
    """

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]


def write_tensors(directory: Path, tensors: Iterable[Pending], *, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes files of at most ``shard_bytes``, or of one larger tensor; holds the tensors of one file."""
    places: dict[str, int] = {}
    total = count = 0
    for shard in _shards(tensors, shard_bytes):
        places |= dict.fromkeys(shard, count)
        total += sum(values.nbytes for values in shard.values())
        path = directory / _temporary(count)
        save_file(shard, path, metadata={"format": "pt"})
        # The library closes its files to all other users; they are as open as their directory.
        path.chmod(directory.stat().st_mode & 0o666)
        count += 1
    if count == 1:
        (directory / _temporary(0)).rename(directory / SINGLE)
        return
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        (directory / _temporary(number)).rename(directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[number] for name, number in sorted(places.items())},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _temporary(number: int) -> str:
    return f"shard-{number:05}.partial"


def _shards(tensors: Iterable[Pending], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard.clear()
            size = 0
        # The library writes the bytes behind the pointer, whatever the strides are.
        shard[tensor.name] = np.ascontiguousarray(tensor.read())
        size += tensor.nbytes
    yield shard


def _paths(directory: Path) -> list[Path]:
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        return _indexed(index)
    if single.is_file():
        return [single]
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise ConversionError(
            f"{directory} must hold {SINGLE} or {INDEX}; found {pickles[0]}, a pickle, which can run any "
            "code and is not read: save the model as safetensors, as transformers' save_pretrained does"
        )
    raise ConversionError(f"{directory} must hold {SINGLE} or {INDEX}; found neither")


def _indexed(index: Path) -> list[Path]:
    content = read_json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConversionError(f"{index} must have a weight_map from tensors to files; found {places!r}")
    paths = []
    for name in sorted({str(place) for place in places.values()}):
        # Only the name is checked: the hub's own cache keeps the files themselves behind symbolic links.
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise ConversionError(f"{index} must name files of its own directory; found {name!r}")
        path = index.with_name(name)
        if not path.is_file():
            raise ConversionError(
                f"{index} names the file {name}, and {index.parent} must hold it; found none: fetch it"
            )
        paths.append(path)
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it.

    Raises:
      ConversionError: there is no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConversionError(f"{path.parent} must hold {path.name}; found none") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} must be a JSON file; {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object; found a {type(content).__name__}")
    return content
