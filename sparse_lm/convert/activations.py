"""Which activation a published model has, by ``model_type`` and ``hidden_act``; no other is converted.

``hidden_act`` alone does not tell: SparseLM's checkpoints say ``silu`` and rectify, and Bamboo's ``relu``
rectifies both sides of the gate.
"""

import math
from collections.abc import Mapping
from typing import Any

from pallas_kernels import Threshold, activations
from sparse_lm.convert.errors import ConversionError

ANY = "any"
"""Stands for whatever ``hidden_act`` a model type has: its modelling code does not read it."""


THRESHOLD_FIELD = "hidden_act_param"
"""The field of ``config.json`` with FATReLU's threshold."""
_FATRELU = "threshold"

ACTIVATIONS: Mapping[str, Mapping[str, str]] = {
    "llama": {"relu": "relu", "relu2": "relu2"},
    "qwen2": {"relu": "relu", "relu2": "relu2"},
    "llama_sparse_relu": {ANY: "relu"},
    "qwen2_sparse_relu": {ANY: "relu"},
    "sparsellama": {"relu": "relu", "fatrelu": _FATRELU},
    "minicpm": {"relu": "relu", "fatrelu": _FATRELU},
    "arcee": {"relu2": "relu2", "relu": "relu"},
    "bamboo": {"relu": "drelu", "drelu": "drelu"},
}
"""``model_type`` to ``hidden_act`` to ``ModelConfig.activation``; FATReLU's has its threshold behind it."""


def activation_from_hf(model_type: str, hidden_act: str, fields: Mapping[str, Any]) -> str:
    """``ModelConfig.activation`` of a published model.

    Args:
      model_type: as in ``config.json``, a key of ``ACTIVATIONS``.
      hidden_act: as in ``config.json``.
      fields: all of ``config.json``, for the threshold.

    Raises:
      ConversionError: the table has no such activation, or its threshold is missing or negative.
    """
    table = ACTIVATIONS[model_type]
    name = table.get(ANY) or table.get(hidden_act)
    if name is None:
        raise ConversionError(
            "config.json must have a hidden_act that is exactly zero where a neuron is silent, for "
            f"{model_type} one of {', '.join(table)}; found {hidden_act!r}: only such models can be converted"
        )
    if name != _FATRELU:
        return name
    value = fields.get(THRESHOLD_FIELD)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConversionError(
            f"config.json must have a finite {THRESHOLD_FIELD} of at least 0, the threshold of hidden_act="
            f"{hidden_act!r}; found {value!r}: take the value from the model's publisher"
        )
    return str(Threshold(float(value)))


def activation_to_hf(model_type: str, activation: str) -> dict[str, Any] | None:
    """The fields that give ``ModelConfig.activation`` to a model type, or None if none do."""
    parsed = activations.parse(activation)
    wanted = _FATRELU if isinstance(parsed, Threshold) else activation
    names = [name for name, ours in ACTIVATIONS[model_type].items() if ours == wanted]
    if not names:
        return None
    extra = {THRESHOLD_FIELD: parsed.value} if isinstance(parsed, Threshold) else {}
    return {"hidden_act": names[0], **extra}
