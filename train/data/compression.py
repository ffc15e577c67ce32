"""Files as a stream of their plain bytes, whatever tool compressed them: gzip, xz, lzma, zstd, or none.

The first bytes tell the compression, not the name. A file may hold several compressed parts one after the
other, with the padding and the empty or skippable parts that the tools' parallel versions write between them.
"""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import IO

import zstandard

from train.errors import UserError

SUFFIXES = (".gz", ".xz", ".lzma", ".zst")
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile)
_GZIP, _XZ, _LZMA, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x5d\x00\x00", b"\x28\xb5\x2f\xfd"
_BLOCK = 1 << 18
# zstd --long=31 asks for a window of 2 GiB, and readers refuse more than 128 MiB unless told.
_LARGEST_WINDOW = 1 << 31


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """The plain bytes of an open file. Reading raises one of ``DAMAGE`` where a part is cut off or broken.

    Args:
      file: at its beginning.
      name: of the file, for messages.

    Raises:
      UserError: the name says that the file is compressed, and it is not.
    """
    start = file.read(len(_XZ))
    file.seek(0)
    if start.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BLOCK)
    if start.startswith((_XZ, _LZMA)):
        return io.BufferedReader(lzma.LZMAFile(file), _BLOCK)
    if start.startswith(_ZSTD) or _is_skippable(start):
        return io.BufferedReader(_Blocks(_zstd(file)), _BLOCK)
    if name.endswith(SUFFIXES) and start:
        raise UserError(
            f"{name} must be compressed as its name says; found other content: rename it or compress it"
        )
    return file


def _is_skippable(start: bytes) -> bool:
    """Whether a zstd frame that holds no data comes first, as pzstd writes them."""
    return len(start) >= 4 and 0x50 <= start[0] <= 0x5F and start[1:4] == b"\x2a\x4d\x18"


def _zstd(file: IO[bytes]) -> Iterator[bytes]:
    frame = None
    data = file.read(_BLOCK)
    while data:
        if frame is None:
            frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        yield frame.decompress(data)
        data = b""
        if frame.eof:
            data, frame = frame.unused_data, None
        data = data or file.read(_BLOCK)
    if frame is not None:
        raise EOFError


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
