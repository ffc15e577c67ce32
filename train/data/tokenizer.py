"""Text to token ids and back: bytes, or any Hugging Face ``tokenizer.json``.

A tokenizer is one JSON file (``save``, ``load_tokenizer``) whose SHA-256 is its fingerprint, so that a
checkpoint knows its tokenizer whatever version of the library wrote it.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as _Rust
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.errors import UserError

FILE_NAME = "tokenizer.json"
_BYTES = {"version": "1.0", "model": {"type": "bytes"}}
_FITTED_EOS = "<|endoftext|>"
_USUAL_EOS = (
    _FITTED_EOS,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)
_OUR_KEYS = ("eos_token", "prefix_ids")  # which a published tokenizer.json does not have
# Characters sent to the Rust encoder at once: bounds the memory of its per-token objects.
_CHUNK_CHARACTERS = 1 << 23


class EncodingError(UserError):
    """A text that a tokenizer has no tokens for."""


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Attributes:
      notes: a sentence for each setting of its file that was not taken over.
    """

    notes: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that a published model was trained to see before every text; none for models trained here."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's content."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as plain text: neither EOS nor any other control token is ever added or read.

        Raises:
          EncodingError: the vocabulary lacks a part of the text, and has no token for what is unknown. So do
            the other ways to encode.
        """

    def encode_with_control_tokens(self, text: str) -> list[int]:
        """Ids of ``text``, in which control tokens are spelled out as a chat template spells them."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text, as 1-d integer arrays."""

    def encode_measured(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """``encode`` of one text, and for each token the UTF-8 bytes of the text that it adds."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; control tokens say nothing, broken UTF-8 becomes U+FFFD."""

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the tokenizer as one JSON file, atomically, and returns the file."""


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest NumPy type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class ByteTokenizer:
    """UTF-8 bytes 0–255 and EOS = 256. Needs no file and loses nothing."""

    vocab_size = 257
    eos_id = 256
    prefix_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        return _fingerprint(_BYTES)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_control_tokens(self, text: str) -> list[int]:
        return self.encode(text)  # EOS, the only one, has no spelling

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_measured(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.frombuffer(text.encode(), np.uint8)
        return ids, np.ones(len(ids), np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < self.eos_id).decode(errors="replace")

    def save(self, path: str | os.PathLike) -> Path:
        return _write(_BYTES, path)


class HFTokenizer:
    """A Hugging Face ``tokenizer.json``, read by the ``tokenizers`` library.

    Args:
      content: the parsed file; an ``"eos_token"`` of its own (as ``save`` writes) names EOS outright, and
        ``"prefix_ids"`` are ids that stand before a prompt.
      source: what messages call it.
      eos_token: EOS as its publisher names it, tried before the usual names.

    Raises:
      UserError: the content is no tokenizer, or it has no EOS.
    """

    def __init__(self, content: dict[str, Any], *, source: str, eos_token: str | None = None) -> None:
        rust_content = {key: value for key, value in content.items() if key not in _OUR_KEYS}
        rust_content, self.notes = _deterministic(rust_content, source)
        try:
            self._rust = _Rust.from_str(json.dumps(rust_content))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{source} must be a Hugging Face tokenizer.json; the tokenizers library says: {error}"
            ) from error
        self._rust.no_truncation()
        self._rust.no_padding()
        # A document that spells "<|endoftext|>" is text, not the end of a document.
        self._rust.encode_special_tokens = True
        self._source = source
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        wanted = content.get("eos_token") or eos_token
        name = next((name for name in (wanted, *_USUAL_EOS) if name in vocabulary), None)
        if name is None:
            raise UserError(
                f"{source} must have an end-of-text token, one of {', '.join(_USUAL_EOS)}; found none: add "
                'one, or name it as "eos_token" in a tokenizer_config.json beside it'
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_token = name
        self.eos_id = vocabulary[name]
        self.prefix_ids = tuple(content.get("prefix_ids", ()))
        self._content = {**rust_content, "eos_token": name}
        if self.prefix_ids:
            self._content["prefix_ids"] = list(self.prefix_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickle forgets settings that are not in the file, such as encode_special_tokens.
        return functools.partial(HFTokenizer, source=self._source), (self._content,)

    @functools.cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self._content)

    def encode(self, text: str) -> list[int]:
        return self._encode(text).ids

    def encode_with_control_tokens(self, text: str) -> list[int]:
        self._rust.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._rust.encode_special_tokens = True

    def _encode(self, text: str) -> Any:
        try:
            return self._rust.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise EncodingError(
                f"the tokenizer {self._source} has no tokens for some of the text and none for the unknown "
                f"(the tokenizers library says: {error}): choose one with an unknown token or with bytes"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        dtype = token_dtype(self.vocab_size)
        ids = []
        for chunk in _chunks(texts):
            try:
                encodings = self._rust.encode_batch_fast(chunk, add_special_tokens=False)
            except Exception:  # the library does not say which text it was, and `encode` has a sentence
                encodings = [self._encode(text) for text in chunk]
            ids += [np.array(encoding.ids, dtype) for encoding in encodings]
        return ids

    def encode_measured(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._encode(text)
        # Offsets count characters, and the tokens of one split character all span the whole of it.
        character_ends = np.array([end for _, end in encoding.offsets], np.int64)
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (code_points[:, None] >= [0x80, 0x800, 0x10000]).sum(axis=1)
        bytes_before = np.concatenate([[0], np.cumsum(widths)])
        byte_ends = np.maximum.accumulate(bytes_before[character_ends])
        return np.array(encoding.ids, token_dtype(self.vocab_size)), np.diff(byte_ends, prepend=0)

    def decode(self, ids: Iterable[int]) -> str:
        return self._rust.decode([i for i in map(int, ids) if i < self.vocab_size], skip_special_tokens=True)

    def save(self, path: str | os.PathLike) -> Path:
        return _write(self._content, path)


class TextStream:
    """Decodes what follows a prompt id by id for display; a character is shown once all its bytes have come.

    Prompt and continuation are decoded as one text, because the text of an id depends on what stands before
    it: a tokenizer that marks the beginnings of words drops the space before a text's first word.

    Args:
      tokenizer: of the ids.
      prompt: ids that stand before those that are fed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = tokenizer.decode(self._ids).rstrip("\ufffd")

    def feed(self, token: int) -> str:
        """The text that ``token`` completes, often one word, sometimes nothing."""
        self._ids.append(int(token))
        whole = self._tokenizer.decode(self._ids).rstrip("\ufffd")
        new = whole[len(self._shown) :]
        self._shown += new
        return new


def decode_continuation(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ``ids`` add to that of ``prompt``."""
    before = tokenizer.decode(prompt).rstrip("\ufffd")
    return tokenizer.decode([*prompt, *ids])[len(before) :]


def check_fitted_size(vocab_size: int) -> None:
    """Raises UserError unless a byte-level BPE can have so few ids."""
    if vocab_size < 257:
        raise UserError(
            "a byte-level BPE needs a vocabulary of at least 257 (256 bytes and the end of text); got "
            f"{vocab_size}: raise the vocabulary's size"
        )


def fit_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Fits a byte-level BPE of at most ``vocab_size`` ids: EOS, the 256 bytes, then merges.

    Deterministic in the texts. A corpus too small for that many merges gives fewer ids.

    Raises:
      UserError: fewer than 257 ids were asked for.
    """
    check_fitted_size(vocab_size)
    rust = _Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_FITTED_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)
    return HFTokenizer(json.loads(rust.to_str()), source="the fitted tokenizer")


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
    """The byte tokenizer for ``"byte"``, else the one saved in a file,
    or in a directory's ``tokenizer.json``.

    Raises:
      UserError: the file is missing, unreadable, or no tokenizer.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    content = _read(path)
    if content == _BYTES:
        return ByteTokenizer()
    return HFTokenizer(content, source=str(path), eos_token=_published_eos(path))


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises UserError if the model has no embedding for some of the tokenizer's ids."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab-size is {model_vocab_size}: "
            f"pass --model.vocab-size {tokenizer.vocab_size} or more, or choose a smaller tokenizer"
        )


def _chunks(texts: Sequence[str]) -> Iterable[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def _deterministic(content: dict[str, Any], source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The content without a setting that makes encoding a matter of chance, and a note of what it was."""
    model = content.get("model")
    if not isinstance(model, dict) or not model.get("dropout"):
        return content, ()
    note = (
        f"the tokenizer {source} has a BPE dropout of {model['dropout']}: it is switched off, so that a text "
        "always has the same tokens"
    )
    return content | {"model": {**model, "dropout": None}}, (note,)


def _read(path: Path, kind: str = "tokenizer.json") -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"data.tokenizer must be byte, bpe or the path of a tokenizer.json; found no file {path}"
        ) from error
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be a Hugging Face {kind}; found no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a Hugging Face {kind}; found a JSON {type(content).__name__}")
    return content


def _published_eos(path: Path) -> str | None:
    """The EOS that ``tokenizer_config.json`` beside the tokenizer names, as published models have it."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    eos = _read(config, config.name).get("eos_token")
    return eos.get("content") if isinstance(eos, dict) else eos


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _write(content: dict[str, Any], path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(_canonical(content))
    os.replace(partial, path)
    return path
