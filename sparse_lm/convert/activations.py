"""Which activation a published model has, by ``model_type`` and ``hidden_act``; no other is converted.

``hidden_act`` alone does not tell: SparseLM's checkpoints say ``silu`` and rectify, and Bamboo's ``relu``
rectifies both sides of the gate.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparse_lm.config import Activation
from sparse_lm.convert.errors import ConversionError

ANY = "any"
"""Stands for whatever ``hidden_act`` a model type has: its modelling code does not read it."""


@dataclasses.dataclass(frozen=True)
class Act:
    """An activation of `ModelConfig`.

    Attributes:
      name: ``ModelConfig.activation``.
      threshold_field: field of ``config.json`` with the threshold of ``"threshold"``.
    """

    name: Activation
    threshold_field: str | None = None


_RELU, _RELU2, _DRELU = Act("relu"), Act("relu2"), Act("drelu")
_FATRELU = Act("threshold", "hidden_act_param")

ACTIVATIONS: Mapping[str, Mapping[str, Act]] = {
    "llama": {"relu": _RELU, "relu2": _RELU2},
    "qwen2": {"relu": _RELU, "relu2": _RELU2},
    "llama_sparse_relu": {ANY: _RELU},
    "qwen2_sparse_relu": {ANY: _RELU},
    "sparsellama": {"relu": _RELU, "fatrelu": _FATRELU},
    "minicpm": {"relu": _RELU, "fatrelu": _FATRELU},
    "arcee": {"relu2": _RELU2, "relu": _RELU},
    "bamboo": {"relu": _DRELU, "drelu": _DRELU},
}
"""``model_type`` to ``hidden_act`` to activation."""


def activation_of(model_type: str, hidden_act: str, fields: Mapping[str, Any]) -> tuple[Activation, float]:
    """``ModelConfig.activation`` and ``.threshold`` of a published model.

    Args:
      model_type: as in ``config.json``, a key of ``ACTIVATIONS``.
      hidden_act: as in ``config.json``.
      fields: all of ``config.json``, for the threshold.

    Raises:
      ConversionError: the table has no such activation, or its threshold is missing or negative.
    """
    table = ACTIVATIONS[model_type]
    act = table.get(ANY) or table.get(hidden_act)
    if act is None:
        raise ConversionError(
            "config.json must have a hidden_act that is exactly zero where a neuron is silent, for "
            f"{model_type} one of {', '.join(table)}; found {hidden_act!r}: only such models can be converted"
        )
    if act.threshold_field is None:
        return act.name, 0.0
    threshold = fields.get(act.threshold_field)
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, int | float)
        or not 0 <= threshold < float("inf")
    ):
        raise ConversionError(
            f"config.json must have a finite {act.threshold_field} of at least 0, the threshold of "
            f"hidden_act={hidden_act!r}; found {threshold!r}: take the value from the model's publisher"
        )
    return act.name, float(threshold)


def hidden_act_of(model_type: str, activation: Activation) -> str | None:
    """The ``hidden_act`` that gives ``activation`` to a model type, or None if none does."""
    return next((name for name, act in ACTIVATIONS[model_type].items() if act.name == activation), None)
