"""Tuned kernel configs: ``<device>/<op>.json``, written by the benchmark's tune mode, read while tracing.

A table maps a bucket of problems to the fields of the fastest config and the time it took:

    {"m65536-d2048-f4096-16bit-t256": {"config": {"tile_m": 128, ...}, "ms": 2.5}}

Sizes are rounded to the nearest power of two, so that a problem finds what was tuned for its neighbours.
Nothing is ever timed while tracing.
"""

import functools
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent

Entry = dict[str, Any]


def bucket(*, tokens: int, d_model: int, d_ff: int, itemsize: int, **others: int) -> str:
    """Key of the problems that share an entry: rounded sizes, bits of a value,
    and what else an op depends on."""
    sizes = (_nearest_power_of_2(size) for size in (tokens, d_model, d_ff))
    rest = [f"{name[0]}{value}" for name, value in others.items()]
    return "-".join([*map("{}{}".format, "mdf", sizes), f"{8 * itemsize}bit", *rest])


def lookup(device: str, op: str, key: str, *, directory: Path | None = None) -> dict[str, int] | None:
    """Fields of the config tuned for a bucket on a device (`Device.table_name`);
    None where nothing was tuned.

    Raises:
      ValueError: the table is not what `save` writes.
    """
    entry = _read((directory or DIRECTORY) / device / f"{op}.json").get(key)
    return None if entry is None else dict(entry["config"])


def save(device: str, op: str, entries: Mapping[str, Entry], *, directory: Path | None = None) -> Path:
    """Adds entries to a table, or replaces them, in one atomic step; returns the table's path."""
    path = (directory or DIRECTORY) / device / f"{op}.json"
    text = json.dumps(dict(sorted((_read(path) | dict(entries)).items())), indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    _read.cache_clear()
    return path


@functools.cache
def _read(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        valid = all(isinstance(entry["config"], dict) for entry in table.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no tuning table ({error!r}): restore it, or move it elsewhere and tune again"
        ) from error
    if not valid:
        raise ValueError(
            f"{path} is no tuning table (a config is no mapping): restore it, or move it elsewhere and tune "
            "again"
        )
    return table


def _nearest_power_of_2(size: int) -> int:
    return 1 << round(math.log2(max(size, 1)))
