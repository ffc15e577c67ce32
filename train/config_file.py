"""A run's configuration as a JSON file, as a run writes it and ``--config`` takes it."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from train.cli.options import did_you_mean
from train.config import TrainConfig
from train.config_json import from_dict, to_dict
from train.errors import UserError, short_reason


def write_config(config: TrainConfig, path: Path) -> None:
    """Writes every field of ``config``."""
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: TrainConfig) -> str:
    """What `write_config` writes."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def read_config(path: str | Path) -> TrainConfig:
    """The configuration in a file; what the file leaves out has its default.

    Raises:
      UserError: there is no such file, or it is no JSON, or a field is unknown, of a wrong type or out of
      range.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config must be a preset or a JSON file; {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"config must be a preset or a JSON file; {path}: {short_reason(error)}") from error
    _check(values, TrainConfig, str(path), "")
    try:
        return from_dict(TrainConfig, values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _check(value: Any, kind: Any, path: str, name: str) -> None:
    """Raises UserError unless ``value``, as JSON has it, can be a ``kind``."""
    if not dataclasses.is_dataclass(kind):
        if not _fits(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise UserError(f"{path}: {name} must be {wanted}; got {json.dumps(value)}")
        return
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name or 'the whole'} must be an object of fields; got {json.dumps(value)}")
    kinds = typing.get_type_hints(kind)
    for key, item in value.items():
        if key not in kinds:
            hint = did_you_mean(key, kinds) or f": it has {', '.join(kinds)}"
            raise UserError(f"{path}: {name or 'a run'} has no field {key}{hint}")
        _check(item, kinds[key], path, f"{name}.{key}" if name else key)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type; what is neither a plain type nor made of plain types fits."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (str, bool, types.NoneType) else True
