"""MiniCPM-S (arXiv 2404.06395, 2402.13516): FATReLU, tied embeddings and three scalings."""

import math
from typing import Any

from sparse_lm.config import ModelConfig
from sparse_lm.convert.errors import ConversionError
from sparse_lm.convert.family import Family, Fields, required, whole_number


def _scalings(fields: Fields) -> dict[str, Any]:
    """Required, because the defaults of the publisher's code (1) are those of no published model."""
    base = required(fields, "dim_model_base", float)
    if base <= 0:
        raise ConversionError(f"config.json must have a positive dim_model_base; found {base!r}")
    layers = whole_number(fields, "num_hidden_layers")
    return {
        "embedding_scale": float(required(fields, "scale_emb", float)),
        "residual_scale": required(fields, "scale_depth", float) / math.sqrt(max(layers, 1)),
        "logit_divisor": whole_number(fields, "hidden_size") / base,
    }


def scalings_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The three fields from which `_scalings` gives those of ``config``."""
    root = math.sqrt(config.num_layers)
    depth = config.residual_scale * root
    tidy = round(depth, 9)  # 1.4 / sqrt(40) * sqrt(40) is not 1.4 to the last bit
    base = config.d_model / config.logit_divisor
    return {
        "scale_emb": config.embedding_scale,
        "scale_depth": tidy if tidy / root == config.residual_scale else depth,
        "dim_model_base": int(base) if base == int(base) else base,
    }


MINICPM = Family(
    "minicpm",
    "MiniCPMForCausalLM",
    tied_by_default=True,
    scalings=_scalings,
    unsupported={"num_experts": (0,)},
)
