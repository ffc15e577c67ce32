"""Small corpora for tests."""

import json
from collections.abc import Iterable
from pathlib import Path

from train.config import DataConfig

TEXTS = [f"{n:02d}" + "abcdefghij "[: n % 11] * (n % 13) for n in range(40)]


def write_jsonl(path: Path, texts: Iterable[str] = TEXTS) -> Path:
    """A file of documents, by default forty of 2 to 121 bytes, each told apart by its number."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def of_files(*paths: Path, **options: object) -> DataConfig:
    """The configuration of a corpus; ``options`` are fields of DataConfig."""
    return DataConfig(paths=tuple(map(str, paths)), **options)  # type: ignore[arg-type]
