"""Documents to shuffled batches of token windows, the same for every number of processes.

All training documents, each followed by EOS, form one ring of N tokens. Window k of context length C holds
the C + 1 tokens from position k·C round the ring, so that each token is the target of exactly one window a
lap, and the tokens that one epoch of ⌊N / C⌋ windows leaves over begin the next. Nothing is lost or repeated.
"""

import glob
import gzip
import hashlib
import importlib.resources
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

import grain
import numpy as np
import zstandard

from train.config import DataConfig
from train.errors import UserError
from train.tokenizer import Tokenizer, check_vocabulary, fit_bpe, load_tokenizer, token_dtype

DEFAULT_CORPUS = "state_of_the_union.jsonl.gz"
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PLAIN_TEXT = (".txt", ".text", ".md")
_COMPRESSED = (".gz", ".xz", ".zst")
_MAGIC_GZIP, _MAGIC_XZ, _MAGIC_ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"

Batch = dict[str, np.ndarray]


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """This process's share of the shuffled training batches, for ever, in a new order each epoch.

    The order depends on the corpus, ``context_length``, ``seed`` and the position alone: the shares of all
    processes together are the batches of a single process, whatever their number.

    Args:
      batch_size: windows of a step over all processes; ``process_count`` must divide it.

    Returns:
      An iterator of ``{"tokens": (batch_size / process_count, context_length + 1) int32}``, whose
      ``get_state()`` is a small dict that ``set_state`` takes up again exactly where it stood.

    Raises:
      UserError: the corpus is missing, broken, or shorter than a window.
    """
    local_batch = _local_batch(batch_size, process_count)
    training, _ = _split(list(read_documents(config)), config.holdout)
    ring = _ring(tokenizer.encode_batch(training), tokenizer)
    _check_length(ring, context_length, "training")

    def window(index: int, _: int) -> Batch:
        return {"tokens": _window(ring, index, context_length)}

    return iter(
        grain.MapDataset.range(len(ring) // context_length)
        # The index counts on from epoch to epoch, and with it the position on the ring.
        .map_with_index(window)
        .seed(seed % 2**32)
        .shuffle()
        .repeat()[process_index::process_count]
        # Without a remainder to round up for, the length of an endless dataset stays within an integer.
        .batch(local_batch, drop_remainder=True)
        # The tokens are in memory: threads would only contend for the interpreter.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def heldout_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    batch_size: int,
    limit: int,
    process_index: int = 0,
    process_count: int = 1,
) -> list[dict[str, np.ndarray | int]]:
    """This process's share of up to ``limit`` whole batches of text that training never sees, in order.

    Held-out text of less than one batch goes round its ring until the batch is full, so that there always is
    one.

    Returns:
      A list of ``{"tokens": (batch_size / process_count, context_length + 1) int32, "bytes": int}``;
      ``bytes`` counts the UTF-8 bytes that the targets ``tokens[:, 1:]`` stand for, over all processes.

    Raises:
      UserError: the corpus is missing, broken, or its held-out text shorter than a window.
    """
    _local_batch(batch_size, process_count)
    _, heldout = _split(list(read_documents(config)), config.holdout)
    measured = [tokenizer.encode_measured(text) for text in heldout]
    ring = _ring([ids for ids, _ in measured], tokenizer)
    _check_length(ring, context_length, "held-out")
    # EOS stands for what its document's tokens leave over, as a tokenizer that trims white space does.
    widths = np.concatenate(
        [
            np.append(added, len(text.encode()) - added.sum())
            for text, (_, added) in zip(heldout, measured, strict=True)
        ]
    )

    def batch(number: int) -> dict[str, np.ndarray | int]:
        rows = range(number * batch_size, (number + 1) * batch_size)
        local_rows = rows[process_index::process_count]
        return {
            "tokens": np.stack([_window(ring, row, context_length) for row in local_rows]),
            "bytes": sum(int(_window(widths, row, context_length)[1:].sum()) for row in rows),
        }

    whole = len(ring) // context_length // batch_size
    return [batch(number) for number in range(min(limit, max(1, whole)))]


def build_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names, for a model of ``vocab_size`` ids.

    ``"bpe"`` fits one of that size on the training documents, the same one each time.

    Raises:
      UserError: there is no such tokenizer, the corpus is bad, or the model's vocabulary is too small.
    """
    if config.tokenizer == "bpe":
        training, _ = _split(list(read_documents(config)), config.holdout)
        return fit_bpe(training, vocab_size)
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


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
        return [importlib.resources.files("train.corpora") / DEFAULT_CORPUS]
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


def _split(documents: list[str], holdout: float) -> tuple[list[str], list[str]]:
    """Training and held-out documents: a document's hash decides, so that copies of one stay on one side."""
    digests = [hashlib.sha256(text.encode()).digest() for text in documents]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise UserError(
            "the corpus must hold at least 2 different documents, one of them to hold out; found "
            f"{len(distinct)}: add files, or cut it into one document a line (JSONL)"
        )
    count = min(max(1, round(holdout * len(distinct))), len(distinct) - 1)
    heldout = set(distinct[:count])
    pairs = list(zip(documents, digests, strict=True))
    return [t for t, digest in pairs if digest not in heldout], [
        t for t, digest in pairs if digest in heldout
    ]


def _ring(documents: Sequence[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """All documents in order, each followed by EOS: (N,) of the smallest unsigned type that holds the ids."""
    dtype = token_dtype(tokenizer.vocab_size)
    ring = np.full(sum(map(len, documents)) + len(documents), tokenizer.eos_id, dtype)
    start = 0
    for ids in documents:
        ring[start : start + len(ids)] = ids
        start += len(ids) + 1
    return ring


def _window(ring: np.ndarray, index: int, context_length: int) -> np.ndarray:
    """Window ``index`` of the ring: (context_length + 1,) int32."""
    start = index * context_length % len(ring)
    positions = np.arange(start, start + context_length + 1)
    return ring.take(positions, mode="wrap").astype(np.int32)


def _check_length(ring: np.ndarray, context_length: int, which: str) -> None:
    if len(ring) <= context_length:
        raise UserError(
            f"the {which} documents must hold at least {context_length + 1} tokens, one window of the "
            f"context; found {len(ring)}: add text or lower --model.context-length"
        )


def _local_batch(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"batch-size must be a multiple of the number of processes, {process_count}; got {batch_size}"
        )
    return batch_size // process_count
