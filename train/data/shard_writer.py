"""Writes token shards, and takes up a directory of them that was begun.

Every chunk of documents is appended to the shards, and then a line to a log: the digest of the chunk's
documents and the checksums of what was appended. The next start reads from it how far the shards are good,
and whether the documents are still the same. When all documents are in the shards, the index is written and
the log removed.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from train.data.shards import BLOCK, SIDES, Index, blocks, shard_path
from train.data.tokenizer import FILE_NAME, Tokenizer
from train.errors import UserError

LOG = "progress.jsonl"
SHARD_TOKENS = 1 << 28  # a file is closed by the chunk that makes it so long
_FILES = (("train", "tokens"), ("heldout", "tokens"), ("heldout", "sizes"))


class Encoded(NamedTuple):
    """A chunk of documents as tokens.

    Attributes:
      digests: of all documents, concatenated.
      text_bytes: UTF-8 bytes of all documents.
      train: ids of the training documents, each followed by EOS.
      heldout: the same of the held-out documents.
      heldout_sizes: (len(heldout),) uint32, the UTF-8 bytes that each held-out id stands for.
    """

    digests: bytes
    text_bytes: int
    train: np.ndarray
    heldout: np.ndarray
    heldout_sizes: np.ndarray


class ShardWriter:
    """The shards of a directory while they are made.

    Attributes:
      counts: values of each file of each side so far.
      documents, text_bytes: so far.
    """

    def __init__(self, out: Path, settings: dict[str, Any], dtype: type[np.unsignedinteger]) -> None:
        self._out, self._settings = out, settings
        self._dtypes = {"tokens": np.dtype(dtype).newbyteorder("<"), "sizes": np.dtype("<u4")}
        self.counts: dict[str, list[int]] = {side: [] for side in SIDES}
        self.documents = self.text_bytes = 0
        self._log: IO[bytes] | None = None

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.counts.values()))

    def __enter__(self) -> "ShardWriter":
        strangers = {path.name for path in self._out.iterdir()}
        if LOG not in strangers and strangers:
            raise UserError(
                f"{self._out} must be an empty directory, or one of token shards that were begun; found "
                f"{min(strangers)}: choose another"
            )
        self._log = (self._out / LOG).open("a+b")
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._log is not None
        self._log.close()

    def begin(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Takes up what is there: the log's lines of which the shards still have what they say."""
        assert self._log is not None
        self._log.seek(0)
        lines = _json_lines(self._log.read())
        if lines and lines[0] != self._settings:
            raise UserError(
                f"{self._out} was begun with another tokenizer or other options: choose another directory"
            )
        good = []
        for line in lines[1:]:
            if not self._has(line):
                break
            self._count(line)
            good.append(line)
        self._log.truncate(0)
        for line in [self._settings, *good]:
            self._write(line)
        for side, kind in _FILES:
            counts = {
                shard_path(self._out, side, number, kind): count
                for number, count in enumerate(self.counts[side])
            }
            for path in self._out.glob(f"{side}-*.{kind}"):
                if path in counts:
                    os.truncate(path, counts[path] * self._dtypes[kind].itemsize)
                else:
                    path.unlink()
        if not good:
            tokenizer.save(self._out / FILE_NAME)
        return good

    def append(self, encoded: Encoded) -> None:
        """Adds a chunk to the shards, then to the log."""
        values = dict(zip(_FILES, (encoded.train, encoded.heldout, encoded.heldout_sizes), strict=True))
        data = {
            key: found.astype(self._dtypes[key[1]], copy=False).tobytes() for key, found in values.items()
        }
        line = {
            "digest": hashlib.sha256(encoded.digests).hexdigest(),
            "documents": len(encoded.digests) // hashlib.sha256().digest_size,
            "text_bytes": encoded.text_bytes,
            "counts": {side: len(values[side, "tokens"]) for side in SIDES},
            "checksums": [zlib.crc32(data[key]) for key in _FILES],
        }
        numbers = {side: self._number(side) for side in SIDES}
        for (side, kind), content in data.items():
            if content:
                with shard_path(self._out, side, numbers[side], kind).open("ab") as file:
                    file.write(content)
        self._count(line)
        self._write(line)

    def finish(self, index: Index) -> None:
        """Seals all files, writes the index and removes the log."""
        for side, kind in _FILES:
            for number, count in enumerate(self.counts[side]):
                seal(shard_path(self._out, side, number, kind), self._dtypes[kind], count)
        index.save(self._out)
        (self._out / LOG).unlink()

    def _number(self, side: str) -> int:
        """Of the file that the next values of a side go to."""
        counts = self.counts[side]
        return len(counts) if not counts or counts[-1] >= SHARD_TOKENS else len(counts) - 1

    def _count(self, line: dict[str, Any]) -> None:
        self.documents += line["documents"]
        self.text_bytes += line["text_bytes"]
        for side, count in line["counts"].items():
            if count:
                if self._number(side) == len(self.counts[side]):
                    self.counts[side].append(0)
                self.counts[side][-1] += count

    def _has(self, line: dict[str, Any]) -> bool:
        """Whether the shards hold, after what is counted, what this line says was appended."""
        for (side, kind), checksum in zip(_FILES, line["checksums"], strict=True):
            number, count, size = self._number(side), line["counts"][side], self._dtypes[kind].itemsize
            if count:
                before = self.counts[side][number] if number < len(self.counts[side]) else 0
                try:
                    with shard_path(self._out, side, number, kind).open("rb") as file:
                        file.seek(before * size)
                        data = file.read(count * size)
                except FileNotFoundError:
                    return False
                if len(data) != count * size or zlib.crc32(data) != checksum:
                    return False
        return True

    def _write(self, line: dict[str, Any]) -> None:
        assert self._log is not None
        self._log.write(json.dumps(line).encode() + b"\n")
        self._log.flush()


def _json_lines(data: bytes) -> list[dict[str, Any]]:
    """The lines of a log, up to the first that was cut off."""
    lines = []
    for line in data.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def seal(path: Path, dtype: np.dtype, count: int) -> None:
    """Appends the checksums to a file of ``count`` values and puts it on the disk; again changes nothing."""
    size = dtype.itemsize
    with path.open("r+b") as file:
        file.truncate(count * size)
        checksums = [
            zlib.crc32(file.read(min(BLOCK, count - number * BLOCK) * size))
            for number in range(blocks(count))
        ]
        file.write(np.array(checksums, "<u4").tobytes())
        file.flush()
        os.fsync(file.fileno())
