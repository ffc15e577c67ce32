"""The documents of a corpus, one after the other: lines of JSON, plain text, rows of Parquet.

Files are read as streams, so that memory holds one document at a time (a plain-text file is one document).
"""

import glob
import importlib.resources
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, NamedTuple

from train.data.compression import DAMAGE, SUFFIXES, decompressed
from train.errors import UserError

DEFAULT_CORPUS = "state_of_the_union.jsonl.gz"
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PLAIN_TEXT = (".txt", ".text", ".md")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_ROWS = 256  # of a Parquet file, decoded at a time


class Document(NamedTuple):
    """One text, and the file and line or row that it is from."""

    text: str
    where: str


class Source(NamedTuple):
    """One file of documents, and what messages call it."""

    file: Traversable
    name: str

    @property
    def path(self) -> str:
        """Where it is, whatever the current directory."""
        return os.path.abspath(str(self.file))


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The files that paths and globs name, each once; the corpus that ships with the package for none.

    Raises:
      UserError: a path is a directory, or no file matches a pattern.
    """
    if not paths:
        shipped = importlib.resources.files("train.data.corpora") / DEFAULT_CORPUS
        return [Source(shipped, shipped.name)]
    found: dict[Path, None] = {}
    for pattern in paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(
                f"data.paths must name files of documents or a directory of token shards; {pattern} is a "
                f"directory without token shards: pass {pattern.rstrip('/')}/* for the files in it"
            )
        if path.exists() or not glob.has_magic(pattern):
            found[path] = None
            continue
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match for match in matches if not match.is_dir()]
        if not files:
            raise UserError(f"data.paths must name files; no file matches {pattern}: check the pattern")
        found.update(dict.fromkeys(files))
    return [Source(path, str(path)) for path in found]


def read_documents(
    sources: Sequence[Source], text_field: str = "text", *, on_file_read: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """The documents of files in order; empty ones are left out.

    ``.jsonl``, ``.ndjson`` and ``.json`` are JSON lines, ``.txt``, ``.text`` and ``.md`` plain text, one
    document a file. Parquet is told by its content, and any other file is what its first line looks like.
    Compression is told by content too.

    Args:
      sources: from ``find_sources``.
      text_field: field of a JSON line, or column of a Parquet file, that holds the text.
      on_file_read: told after each document how many bytes of the files, as they are on the disk, are read.

    Raises:
      UserError: names the file, and the line, that cannot be used.
    """
    before = 0
    for source in sources:
        with _open(source) as file:
            for document in _documents_of(file, source, text_field):
                if document.text:
                    if on_file_read is not None:
                        on_file_read(before + file.tell())
                    yield document
            before += file.seek(0, 2)
            if on_file_read is not None:
                on_file_read(before)


def size_of(sources: Sequence[Source]) -> int:
    """Bytes of the files as they are on the disk."""
    total = 0
    for source in sources:
        with _open(source) as file:
            total += file.seek(0, 2)
    return total


def _open(source: Source) -> IO[bytes]:
    try:
        return source.file.open("rb")
    except FileNotFoundError as error:
        raise UserError(
            f"data.paths must name files; there is no file {source.name}: check the path"
        ) from error
    except OSError as error:
        raise UserError(f"{source.name} cannot be read: {error.strerror}") from error


def _documents_of(file: IO[bytes], source: Source, text_field: str) -> Iterator[Document]:
    name = source.name
    try:
        if file.read(len(_PARQUET)) == _PARQUET:
            yield from _parquet_rows(file, name, text_field)
            return
        file.seek(0)
        plain = decompressed(file, name)
        # The first line that is not blank tells what the file is, and is read again with those before it.
        head = []
        for line in plain:
            head.append(line)
            if line.strip():
                break
        else:
            raise UserError(f"{name} must hold documents; found it empty: remove it from data.paths")
        head[0] = head[0].removeprefix(_BYTE_ORDER_MARK)
        if _is_json_lines(source.file.name, head[-1]):
            yield from _json_lines(itertools.chain(head, plain), name, text_field)
        else:
            yield Document(_decode(b"".join(head) + plain.read(), name), name)
    except DAMAGE as error:
        raise UserError(
            f"{name} must be a whole compressed file; found it truncated or damaged: fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, name: str, line: int = 1) -> str:
    """The text of ``data``, which begins at ``line`` of a file."""
    if b"\0" in data:
        raise UserError(
            f"{name} must be UTF-8 text, JSON lines or Parquet; found binary data: remove it from data.paths"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(
            f"{name}, line {line} must be UTF-8; found the byte 0x{data[error.start]:02x}: "
            "convert the file to UTF-8"
        ) from error


def _is_json_lines(file_name: str, first_line: bytes) -> bool:
    for suffix in SUFFIXES:
        file_name = file_name.removesuffix(suffix)
    if file_name.endswith(_JSON_LINES):
        return True
    if file_name.endswith(_PLAIN_TEXT):
        return False
    try:
        return isinstance(json.loads(first_line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(lines: Iterable[bytes], name: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            document = json.loads(_decode(line, name, number))
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
            raise _no_field(f"{where} must have the text field", field, document)
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
        yield Document(value, where)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _no_field(what: str, field: str, fields: Iterable[str]) -> UserError:
    return UserError(
        f"{what} {field!r}; found the fields {', '.join(fields) or 'none'}: name one with --data.text-field"
    )


def _parquet_rows(file: IO[bytes], name: str, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} is a Parquet file, which needs the package pyarrow, which is not installed: "
            "pip install 'sparse-lm[parquet]'"
        ) from error
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        schema = table.schema_arrow
        if field not in schema.names:
            raise _no_field(f"{name} must have the text column", field, schema.names)
        kind = schema.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(
                f"{name} must hold strings in the column {field!r}; found {kind}: name another column with "
                "--data.text-field"
            )
        for batch in table.iter_batches(_ROWS, columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if value is None:
                    raise UserError(
                        f"{name}, row {row} must hold a string in {field!r}; found null: remove the row"
                    )
                yield Document(value, f"{name}, row {row}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{name} must be a whole Parquet file; found it truncated or damaged: fetch it again"
        ) from error
