"""Configurations as the values that JSON has, to it and from it, those of earlier versions too; and what
differs between two."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pallas_kernels import FFNOptions, activations
from pallas_kernels.options import parse_layout
from train.config import TrainConfig

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass of configurations, ready for JSON; `from_dict` is the inverse.

    As ``dataclasses.asdict``, but a feed-forward layer's format and activation are texts.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, FFNOptions):
        values |= {"format": str(config.layout), "activation": str(config.activation)}
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()
    }


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict` for a configuration that went through JSON.

    Fields that an earlier version had are translated.

    Raises:
      TypeError: a field is unknown to ``cls``.
      ValueError: a value is out of range.
      KeyError: a configuration of an earlier version lacks a field that it had.
    """
    types = typing.get_type_hints(cls)

    def field(name: str, value: Any) -> Any:
        kind = types.get(name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return from_dict(kind, value)
        return tuple(value) if isinstance(value, list) else value

    if cls is FFNOptions:
        values = _current_ffn(values)
    elif cls is TrainConfig:
        values = _current_report(values)
    return cls(**{name: field(name, value) for name, value in values.items()})


def _current_ffn(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `FFNOptions`; earlier versions had the options of every format beside ``format``."""
    flat_names = ("tile", "compression", "width", "backup_rows", "panel", "capacity")
    current = {name: value for name, value in values.items() if name not in flat_names}
    if len(current) < len(values):
        layout = parse_layout(current.get("format", "auto"))
        # A panel's tokens were called panel, and all others as they are.
        names = {
            field.name: "panel" if field.name == "tokens" else field.name
            for field in dataclasses.fields(layout)
            if layout.name != "dense"  # whose tokens are newer
        }
        flat = {new: values[old] for new, old in names.items() if old in values}
        current["format"] = str(dataclasses.replace(layout, **flat))
    if isinstance(current.get("activation"), str):
        current["activation"] = activations.parse(current["activation"])
    return current


def _current_report(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TrainConfig`; earlier versions counted held-out text in micro-batches, not in tokens."""
    report = dict(values.get("report", {}))
    if "evaluate_batches" not in report:
        return dict(values)
    sequences = report.pop("evaluate_batches") * values["batch_size"] // values["optimizer"]["accumulation"]
    report["evaluate_tokens"] = sequences * values["model"]["context_length"]
    return {**values, "report": report}


def changed_fields(before: TrainConfig, now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Each field that differs, under its dotted name, with its values before and now."""
    old, new = _flatten(to_dict(before)), _flatten(to_dict(now))
    return {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
