"""A checkpoint's tokenizer as the files that transformers reads."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as _Rust

from train.data.tokenizer import FILE_NAME, ByteTokenizer, HFTokenizer, load_tokenizer
from train.errors import UserError

_BYTE_EOS = "<|endoftext|>"


def published_tokenizer(source: Path, context_length: int, out: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``out``.

    Args:
      source: a checkpoint's directory of the tokenizer.
      context_length: of the model, for ``model_max_length``.
      out: an existing directory.

    Raises:
      UserError: ``source`` holds no tokenizer.
    """
    if isinstance(load_tokenizer(source), ByteTokenizer):
        content, eos_token = json.loads(_bytes().to_str()), _BYTE_EOS
    else:
        content = json.loads((source / FILE_NAME).read_bytes())
        eos_token = content.pop("eos_token")
        content.pop("prefix_ids", None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    (out / FILE_NAME).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_published(directory: Path) -> HFTokenizer:
    """A published directory's tokenizer, which knows what its publisher puts before every text.

    Most Llamas begin a text with ``<s>``: their tokenizer adds it, and the model is at a loss without it.

    Raises:
      UserError: there is no ``tokenizer.json``, or it is no tokenizer that can be used.
    """
    tokenizer = load_tokenizer(directory)
    if not isinstance(tokenizer, HFTokenizer):
        raise UserError(f"{directory / FILE_NAME} must be a Hugging Face tokenizer.json; found one of bytes")
    content = json.loads((directory / FILE_NAME).read_bytes())
    rust = _Rust.from_str(json.dumps(content))
    plain = rust.encode("a", add_special_tokens=False).ids
    dressed = rust.encode("a", add_special_tokens=True).ids
    before = next((at for at in range(len(dressed)) if dressed[at : at + len(plain)] == plain), 0)
    if not before:
        return tokenizer
    with_prefix = content | {"eos_token": tokenizer.eos_token, "prefix_ids": dressed[:before]}
    return HFTokenizer(with_prefix, source=str(directory / FILE_NAME))


def _bytes() -> _Rust:
    """The byte tokenizer as a byte-level BPE without merges: ids 0 to 255 are the bytes, 256 ends a text."""
    # Byte-level BPE shows bytes that print as themselves and numbers the others from U+0100 on.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(0x100 + number) for number, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte for byte in range(256)} | {_BYTE_EOS: ByteTokenizer.eos_id}
    rust = _Rust(models.BPE(vocab=vocabulary, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(_BYTE_EOS, special=True)])
    return rust
