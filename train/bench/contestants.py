"""What whole-model benchmarks put side by side: the same model with other feed-forward layers."""

import dataclasses
from typing import Literal

from pallas_kernels import FFNOptions
from sparse_lm import ModelConfig, SparsityConfig
from sparse_lm.config import SILU

Contestant = Literal["dense", "silu", "auto", "panel", "hybrid", "twell"]
"""A format of the layers, ``"dense"`` being the baseline with the model's own activation; or ``"silu"``, the
dense layers with SiLU in place of it that today's Llamas have."""


def model_of(model: ModelConfig, contestant: Contestant) -> ModelConfig:
    """The model with such layers. Dense ones take their tokens as they come."""
    if contestant == "silu":
        return dataclasses.replace(
            model,
            activation=SILU,
            ffn=FFNOptions("dense"),
            sparsity=SparsityConfig(l1=0.0),
            token_order="text",
        )
    backend = "auto" if contestant == "dense" else model.ffn.backend
    order = "text" if contestant == "dense" else model.token_order
    return dataclasses.replace(model, ffn=model.ffn.with_format(contestant, backend), token_order=order)
