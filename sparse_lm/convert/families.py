"""All families, by ``model_type``, and which of them a model of ours is published as."""

from typing import Any

from pallas_kernels import Threshold
from sparse_lm.config import SILU, ModelConfig
from sparse_lm.convert.activations import activation_to_hf
from sparse_lm.convert.arcee import ARCEE
from sparse_lm.convert.bamboo import BAMBOO
from sparse_lm.convert.errors import ConversionError
from sparse_lm.convert.family import Family
from sparse_lm.convert.llama import LLAMA
from sparse_lm.convert.minicpm import MINICPM, scalings_to_hf
from sparse_lm.convert.qwen2 import QWEN2
from sparse_lm.convert.rope import rope_to_hf
from sparse_lm.convert.sparse_relu import LLAMA_SPARSE_RELU, QWEN2_SPARSE_RELU
from sparse_lm.convert.sparsellama import SPARSELLAMA

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, QWEN2, LLAMA_SPARSE_RELU, QWEN2_SPARSE_RELU, SPARSELLAMA, MINICPM, ARCEE, BAMBOO,
    )
}  # fmt: skip
NATIVE = ("llama", "qwen2", "arcee")
"""Model types that transformers loads by itself; the others need their publisher's modelling code."""


def family_from_hf(fields: dict[str, Any]) -> Family:
    """The family that a ``config.json`` names. Raises ConversionError if there is none."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(
            f"config.json must have a model_type that this library knows, one of {', '.join(FAMILIES)}; "
            f"found {model_type!r}"
        )
    return FAMILIES[model_type]


def family_for(config: ModelConfig) -> Family:
    """The family that a model of ours is exported as: one that transformers knows where there is one.

    Raises:
      ConversionError: no published family is like it.
    """
    if config.activation == SILU:
        raise ConversionError(
            f"only a model with silent neurons can be exported; this one's activation is {SILU}"
        )
    scaled = (config.embedding_scale, config.residual_scale, config.logit_divisor) != (1, 1, 1)
    if config.activation == "drelu":
        family = BAMBOO
    elif scaled:
        family = MINICPM
    elif isinstance(config.ffn_options.activation, Threshold):
        family = SPARSELLAMA
    elif not config.gated:
        family = ARCEE
    else:
        family = QWEN2 if config.qkv_bias else LLAMA
    obstacles = {
        "model.gated": config.gated != family.gated({}),
        "model.qkv-bias": config.qkv_bias != family.qkv_bias,
        "model.activation": activation_to_hf(family.model_type, config.activation) is None,
        "the scalings of MiniCPM": scaled and family is not MINICPM,
    }
    found = [name for name, stands in obstacles.items() if stands]
    if found:
        raise ConversionError(
            f"no published family has this model's {', '.join(found)}; nearest is {family.model_type}: such "
            "a model cannot be exported"
        )
    return family


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model of ours, readable by transformers 4 and 5.

    Raises:
      ConversionError: no published family is like it.
    """
    family = family_for(config)
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": config.dtype,
        **(activation_to_hf(family.model_type, config.activation) or {}),
        **rope_to_hf(config.rope_theta, config.rope_scaling),
    }
    if family is MINICPM:
        fields |= scalings_to_hf(config)
    if family is QWEN2:
        fields["use_sliding_window"] = False
    elif family is BAMBOO:
        fields["sliding_window"] = None
    else:
        fields |= {"attention_bias": False, "mlp_bias": False}
    return fields
