"""The documents of a corpus: texts out of JSON lines and plain-text files, compressed or not."""

import glob
import gzip
import importlib.resources
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

import zstandard

from train.config import DataConfig
from train.errors import UserError

DEFAULT_CORPUS = "state_of_the_union.jsonl.gz"
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PLAIN_TEXT = (".txt", ".text", ".md")
_COMPRESSED = (".gz", ".xz", ".zst")
_MAGIC_GZIP, _MAGIC_XZ, _MAGIC_ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"


def read_documents(config: DataConfig) -> Iterator[str]:
    """The texts of the corpus in order: each line of a JSONL file, each plain-text file; empty ones left out.

    Compression is told by content. ``.jsonl``, ``.ndjson`` and ``.json`` are JSON lines, ``.txt``, ``.text``
    and ``.md`` plain text, and any other file is what its first line looks like.

    Raises:
      UserError: names the file, and the line, that cannot be used.
    """
    for file in _files(config.paths):
        name = file.name if not config.paths else str(file)
        text = _decode(_decompress(_read(file, name), name), name)
        if not text.strip():
            raise UserError(f"{name} must hold documents; found it empty: remove it from data.paths")
        if _is_json_lines(file.name, text):
            yield from _json_documents(text, name, config.text_field)
        else:
            yield text


def _files(paths: Sequence[str]) -> Sequence[Traversable]:
    if not paths:
        return [importlib.resources.files("train.data.corpora") / DEFAULT_CORPUS]
    found: dict[Path, None] = {}
    for pattern in paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(
                f"data.paths must name files; {pattern} is a directory: pass {pattern.rstrip('/')}/*"
            )
        if path.exists() or not glob.has_magic(pattern):
            found[path] = None
            continue
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match for match in matches if not match.is_dir()]
        if not files:
            raise UserError(f"data.paths must name files; no file matches {pattern}: check the pattern")
        found.update(dict.fromkeys(files))
    return list(found)


def _read(file: Traversable, name: str) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"data.paths must name files; there is no file {name}: check the path") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error


def _decompress(data: bytes, name: str) -> bytes:
    try:
        if data.startswith(_MAGIC_GZIP):
            return gzip.decompress(data)
        if data.startswith(_MAGIC_XZ):
            return lzma.decompress(data)
        if data.startswith(_MAGIC_ZSTD):
            return _decompress_zstd(data)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(
            f"{name} must be a whole compressed file; found it truncated or damaged: fetch it again"
        ) from error
    if name.endswith(_COMPRESSED) and data:
        raise UserError(
            f"{name} must be compressed as its name says; found other content: rename it or compress it"
        )
    return data


def _decompress_zstd(data: bytes) -> bytes:
    frames = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError
        data = frame.unused_data
    return b"".join(frames)


def _decode(data: bytes, name: str) -> str:
    if b"\0" in data:
        raise UserError(
            f"{name} must be UTF-8 text or JSON lines; found binary data: remove it from data.paths"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line} must be UTF-8; found the byte 0x{data[error.start]:02x}: "
            "convert the file to UTF-8"
        ) from error


def _is_json_lines(name: str, text: str) -> bool:
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith(_JSON_LINES):
        return True
    if name.endswith(_PLAIN_TEXT):
        return False
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _json_documents(text: str, name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = (
                f" ({error.msg}: column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
            )
            raise UserError(
                f"{where} must be one JSON object; found no valid JSON{reason}: mend or remove the line"
            ) from error
        if not isinstance(document, dict):
            raise UserError(
                f"{where} must be one JSON object; found {_json_type(document)}: mend or remove the line"
            )
        if field not in document:
            fields = ", ".join(document) or "none"
            raise UserError(
                f"{where} must have the text field {field!r}; found the fields {fields}: "
                "name one with --data.text-field"
            )
        value = document[field]
        if not isinstance(value, str):
            raise UserError(
                f"{where} must hold a string in {field!r}; found {_json_type(value)}: name another field "
                "with --data.text-field, or mend or remove the line"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} must hold Unicode text in {field!r}; found half of a surrogate pair: "
                "mend or remove the line"
            ) from error
        if value:
            yield value


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
