"""Token shards: a tokenized corpus on the disk, in files that are read in place.

A directory of them holds

    index.json            what is in it; written last, so that a directory that has one is complete
    tokenizer.json        the tokenizer that made it
    train-00000.tokens    ids of the training documents, each followed by EOS: uint16 or uint32, little-endian
    heldout-00000.tokens  the same of the held-out documents
    heldout-00000.sizes   uint32: the UTF-8 bytes of the text that each held-out token stands for

Behind its values, each file has a CRC-32 (uint32) of every 4,096 of them, which is checked whenever they are
read. Opening a directory reads the index and the files' sizes alone, whatever the number of tokens. Values
are read with ``pread`` and not through a memory map, because a process whose mapped file is cut short, or
whose disk fails, is killed by SIGBUS, while a read that fails can be told in a sentence.
"""

import bisect
import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.errors import UserError

INDEX = "index.json"
VERSION = 1
SIDES = ("train", "heldout")
BLOCK = 4096  # values under one checksum


class Values(Protocol):
    """A long one-dimensional sequence of integers, wherever it lives."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values from ``start`` to before ``stop``, which lie within the sequence."""


class InMemory:
    """Values in an array."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._values[start:stop]


class Joined:
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Values]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        found = []
        number = bisect.bisect_right(self._ends, start)
        while True:
            part = self._parts[number]
            before = self._ends[number] - len(part)
            found.append(part.read(start - before, min(stop - before, len(part))))
            if stop <= self._ends[number]:
                return found[0] if len(found) == 1 else np.concatenate(found)
            start = self._ends[number]
            number += 1


class ShardFile:
    """One file of values and their checksums.

    Args:
      path: the file.
      dtype: of a value.
      count: of values, as the index says.

    Raises:
      UserError: the file is missing or has another size, here; a part of it cannot be read or is not what was
        written, from ``read``.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int) -> None:
        self._path, self._dtype, self._count = path, dtype, count
        self._checksums: np.ndarray | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise self._error(f"it cannot be read ({error.strerror})") from error
        expected = count * dtype.itemsize + 4 * blocks(count)
        if found != expected:
            raise self._error(f"it has {found:,} bytes where the index says {expected:,}")

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values from ``start`` to before ``stop``."""
        first, last = start // BLOCK, blocks(stop)
        begin, end = first * BLOCK, min(last * BLOCK, self._count)
        size, block = self._dtype.itemsize, BLOCK * self._dtype.itemsize
        data = self._pread(begin * size, (end - begin) * size)
        if self._checksums is None:
            footer = self._pread(self._count * size, 4 * blocks(self._count))
            self._checksums = np.frombuffer(footer, "<u4")
        view = memoryview(data)
        for number in range(first, last):
            at = (number - first) * block
            if zlib.crc32(view[at : at + block]) != self._checksums[number]:
                raise self._error(f"values {number * BLOCK:,} and after are not what was written")
        return np.frombuffer(data, self._dtype)[start - begin : stop - begin]

    def _pread(self, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise self._error(f"it cannot be read ({error.strerror})") from error
        if len(data) != count:
            raise self._error(f"it ends after {offset + len(data):,} bytes")
        return data

    def _error(self, found: str) -> UserError:
        return UserError(
            f"the token shard {self._path} must be whole; found that {found}: {_remedy(self._path.parent)}"
        )

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@dataclasses.dataclass(frozen=True)
class Index:
    """What a directory of token shards holds.

    Attributes:
      fingerprint: SHA-256 over the SHA-256 of every document in order: equal for equal text, whatever the
        files that it came in were called and however they were compressed.
      tokenizer: fingerprint of the tokenizer.
      holdout: share of the documents that was asked to be held out.
      threshold: documents whose hash lies under it are held out (`holdout.is_held_out`).
      documents: of both sides.
      text_bytes: UTF-8 bytes of both sides.
      dtype: of a token, ``"uint16"`` or ``"uint32"``.
      train, heldout: values of each file of that side, in order.
      sources: the files of documents that it was made from, as absolute paths.
    """

    fingerprint: str
    tokenizer: str
    holdout: float
    threshold: int
    documents: int
    text_bytes: int
    dtype: str
    train: tuple[int, ...]
    heldout: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Of the training documents, EOS included."""
        return sum(self.train)

    @property
    def heldout_tokens(self) -> int:
        """Of the held-out documents, EOS included."""
        return sum(self.heldout)

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens to train on and "
            f"{self.heldout_tokens:,} held out"
        )

    def save(self, directory: Path) -> None:
        """Writes ``index.json``, atomically."""
        partial = directory / (INDEX + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"version": VERSION} | dataclasses.asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, directory / INDEX)


def shard_path(directory: Path, side: str, number: int, kind: str = "tokens") -> Path:
    return directory / f"{side}-{number:05d}.{kind}"


def is_shards(directory: str | Path) -> bool:
    """Whether a path is a directory of token shards that is complete."""
    return (Path(directory).expanduser() / INDEX).is_file()


def read_index(directory: Path) -> Index:
    """The index of a directory of token shards.

    Raises:
      UserError: it is missing, damaged, or of another version of the program.
    """
    path = directory / INDEX
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"token shards must have an index; {path} cannot be read ({error.strerror}): {_remedy(directory)}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} must be an index of token shards; found no valid JSON ({error}): {_remedy(directory)}"
        ) from error
    version = values.pop("version", None) if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(
            f"{path} must be an index of token shards of version {VERSION}; found version {version}: "
            + _remedy(directory)
        )
    try:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return Index(**fields)
    except TypeError as error:
        raise UserError(
            f"{path} must be an index of token shards; found other fields ({error}): {_remedy(directory)}"
        ) from error


def _remedy(directory: Path) -> str:
    return (
        f"restore the file, or move {directory} elsewhere: a run makes again what is missing in its cache, "
        "sparse-lm tokenize all else"
    )


class TokenShards:
    """A directory of token shards, open for reading.

    Args:
      directory: made by ``tokenize``.

    Attributes:
      index: what it holds.
      train: ids of the training documents.
      heldout: ids of the held-out documents.
      heldout_sizes: UTF-8 bytes that each held-out id stands for.

    Raises:
      UserError: the index or a file is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser().absolute()
        self.index = read_index(self.directory)
        self.train, self.heldout = self._side("train"), self._side("heldout")
        self.heldout_sizes = self._side("heldout", "sizes")

    def _side(self, side: str, kind: str = "tokens") -> Joined:
        dtype = np.dtype("<u4") if kind == "sizes" else np.dtype(self.index.dtype).newbyteorder("<")
        counts: tuple[int, ...] = getattr(self.index, side)
        return Joined(
            [
                ShardFile(shard_path(self.directory, side, number, kind), dtype, count)
                for number, count in enumerate(counts)
            ]
        )


def blocks(count: int) -> int:
    """How many checksums so many values have."""
    return -(-count // BLOCK)
