"""Rotary scaling as Hugging Face's ``config.json`` writes it, and back."""

import math
from collections.abc import Mapping
from typing import Any

from sparse_lm.convert.errors import ConversionError
from sparse_lm.rope import RopeScaling

# What each kind reads; a field that is not here could change the frequencies in a way that nobody checked.
_FIELDS = {
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
        "attention_factor", "mscale", "mscale_all_dim",
    },
}  # fmt: skip
_ALWAYS = {"rope_type", "type", "rope_theta", "finetuned"}


def rope_from_hf(fields: Mapping[str, Any], context_length: int) -> tuple[float, RopeScaling]:
    """``ModelConfig.rope_theta`` and ``.rope_scaling`` of a ``config.json``.

    Reads ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (before).

    Args:
      fields: all of ``config.json``.
      context_length: ``max_position_embeddings``.

    Raises:
      ConversionError: a scaling, or a field of one, that is not known, or a value of a wrong type.
    """
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConversionError(f"config.json must have a table of fields as rope_scaling; found {rope!r}")
    theta = _number(rope, "rope_theta", fields.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        kind, known = "none", set()
    elif isinstance(kind, str) and kind in _FIELDS:
        known = _FIELDS[kind]
    else:
        raise ConversionError(
            f"config.json must have a rope_scaling of kind default, {', '.join(_FIELDS)}; found {kind!r}, "
            "which this library cannot compute"
        )
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1):
        raise ConversionError(
            f"config.json must rotate whole heads; found partial_rotary_factor={partial!r}, which this "
            "library cannot compute"
        )
    strange = set(rope) - known - _ALWAYS - {"partial_rotary_factor"}
    if strange and kind != "none":
        raise ConversionError(
            f"config.json's rope_scaling of kind {kind} may have {', '.join(sorted(known))}; found "
            f"{', '.join(sorted(strange))}, which this library would not heed"
        )
    try:
        return theta, _scaling(kind, rope, fields, context_length)
    except ValueError as error:
        raise ConversionError(f"config.json has a rope_scaling that cannot be: {error}") from error


def _scaling(
    kind: str, rope: Mapping[str, Any], fields: Mapping[str, Any], context_length: int
) -> RopeScaling:
    if kind == "none":
        return RopeScaling()
    factor = _number(rope, "factor")
    original = context_length
    if kind in ("llama3", "yarn"):
        original = fields.get("original_max_position_embeddings") or rope.get(
            "original_max_position_embeddings", context_length
        )
        if isinstance(original, bool) or not isinstance(original, int):
            raise ConversionError(
                "config.json must have a whole number as original_max_position_embeddings of rope_scaling; "
                f"found {original!r}"
            )
    match kind:
        case "linear":
            return RopeScaling("linear", factor)
        case "dynamic":
            return RopeScaling("dynamic", factor, original)
        case "llama3":
            low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
            return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
        case _:
            return RopeScaling(
                "yarn",
                factor,
                original,
                beta_fast=_number(rope, "beta_fast", 32.0),
                beta_slow=_number(rope, "beta_slow", 1.0),
                truncate=bool(rope.get("truncate", True)),
                attention_factor=_attention_factor(rope, factor),
            )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None

    def amplitude(name: str) -> float:
        return 0.1 * _number(rope, name) * math.log(factor) + 1.0

    return amplitude("mscale") / amplitude("mscale_all_dim")


def rope_to_hf(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 4 and 5 both read."""
    extra: dict[str, Any] = {}
    match scaling.kind:
        case "none":
            return {"rope_theta": theta, "rope_scaling": None}
        case "llama3":
            extra |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        case "yarn":
            extra |= {
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
            if scaling.attention_factor is not None:
                extra["attention_factor"] = scaling.attention_factor
    if scaling.kind in ("llama3", "yarn"):
        extra["original_max_position_embeddings"] = scaling.original_context
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": scaling.kind, "factor": scaling.factor, **extra},
    }


def _number(values: Mapping[str, Any], name: str, default: Any = None) -> float:
    value = values.get(name, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConversionError(
            f"config.json must have a number as {name} of its rotary embedding; found {value!r}"
        )
    return float(value)
