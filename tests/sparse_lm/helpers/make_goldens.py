"""Small random models of every family, and what transformers computes with them: ``python make_goldens.py``.

Needs torch and transformers. Families that transformers does not have are its Llama with the published
change: another activation, or MiniCPM's three scalings. Weights are stored in bfloat16, logits are f32.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy learns bfloat16, in which safetensors hands out the weights
import numpy as np

GOLDENS = Path(__file__).parents[1] / "convert" / "goldens"
PROMPT, NEW_TOKENS = 8, 12
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
    "beta_fast": 2.0, "beta_slow": 0.5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers and what makes another family of it.

    Attributes:
      base: the class in transformers without ``ForCausalLM``.
      options: of its configuration.
      published: fields of the published ``config.json`` that differ.
      change: turns the model into the family's.
      counters: further tensors, as SparseLM's training leaves them.
      shard: most bytes of a file, in transformers' words.
    """

    base: str
    options: dict[str, Any]
    published: dict[str, Any] = dataclasses.field(default_factory=dict)
    change: Callable[[Any], None] = lambda model: None
    counters: bool = False
    shard: str = "5GB"


def _fatrelu(model: Any) -> None:
    import torch

    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Threshold(0.1, 0.0)


def _both_sides(model: Any) -> None:
    import torch

    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: torch.relu(output))


def _minicpm(model: Any) -> None:
    _fatrelu(model)
    scale = 1.4 / math.sqrt(2)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * 12)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: output * scale)
        layer.self_attn.register_forward_hook(lambda module, inputs, output: (output[0] * scale, *output[1:]))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / (32 / 16),))


CASES = {
    "llama": Case("Llama", {"hidden_act": "relu", "num_key_value_heads": 4}),
    "llama-linear": Case(
        "Llama",
        {
            "hidden_act": "relu",
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": LINEAR,
        },
    ),
    "llama-llama3": Case(
        "Llama",
        {"hidden_act": "relu2", "num_key_value_heads": 2, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    ),
    "qwen2": Case("Qwen2", {"hidden_act": "relu", "num_key_value_heads": 2}),
    "qwen2-dynamic": Case(
        "Qwen2",
        {
            "hidden_act": "relu",
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": DYNAMIC,
        },
    ),
    "llama_sparse_relu": Case(
        "Llama",
        {
            "hidden_act": "relu",
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 100_000.0,
        },
        {
            "model_type": "llama_sparse_relu",
            "architectures": ["SparseLlamaForCausalLM"],
            "hidden_act": "silu",
        },
        counters=True,
        shard="16KB",
    ),
    "qwen2_sparse_relu": Case(
        "Qwen2",
        {
            "hidden_act": "relu",
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_theta": 100_000.0,
        },
        {
            "model_type": "qwen2_sparse_relu",
            "architectures": ["SparseQwen2ForCausalLM"],
            "hidden_act": "silu",
        },
        counters=True,
    ),
    "sparsellama": Case(
        "Llama",
        {"hidden_act": "relu", "num_key_value_heads": 4},
        {
            "model_type": "sparsellama",
            "architectures": ["SparseLlamaForCausalLM"],
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.1,
        },
        change=_fatrelu,
    ),
    "minicpm": Case(
        "Llama",
        {"hidden_act": "relu", "num_key_value_heads": 2, "tie_word_embeddings": True},
        {
            "model_type": "minicpm",
            "architectures": ["MiniCPMForCausalLM"],
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.1,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 16,
        },
        change=_minicpm,
    ),
    "arcee": Case("Arcee", {"hidden_act": "relu2", "num_key_value_heads": 2, "rope_parameters": YARN}),
    "bamboo": Case(
        "Llama",
        {"hidden_act": "relu", "num_key_value_heads": 1},
        {"model_type": "bamboo", "architectures": ["BambooForCausalLM"], "sliding_window": 4096},
        change=_both_sides,
    ),
}


def build(name: str, directory: Path) -> None:
    """Writes one case: what `save_pretrained` writes, and ``expected.safetensors``.

    ``tokens`` (2, 24) int32, ``logits`` (2, 24, V) f32, and ``greedy`` (2, 12) int32, the continuation of
    the first 8 tokens.
    """
    import torch
    import transformers
    from safetensors.numpy import save_file

    case = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{case.base}Config")(**SIZES, **case.options)
    kind = getattr(transformers, f"{case.base}ForCausalLM")
    model = kind(config)
    with torch.no_grad():
        for key, values in model.named_parameters():
            spread = torch.randn_like(values) * (0.2 if "norm" in key or "bias" in key else 0.35)
            values.copy_((spread + 1 if "norm" in key else spread).bfloat16())
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=case.shard)
    (directory / "generation_config.json").unlink(missing_ok=True)
    model = kind.from_pretrained(directory, dtype=torch.float32).eval()
    case.change(model)

    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 24)))
    with torch.no_grad():
        logits = model(tokens).logits
        greedy = model.generate(
            tokens[:, :PROMPT],
            attention_mask=torch.ones(2, PROMPT),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
    save_file(
        {
            "tokens": tokens.numpy().astype(np.int32),
            "logits": logits.numpy(),
            "greedy": np.ascontiguousarray(greedy[:, PROMPT:].numpy().astype(np.int32)),
        },
        directory / "expected.safetensors",
    )
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | case.published
    path.write_text(json.dumps(fields, indent=1) + "\n")
    if case.counters:
        _add_counters(directory)


def _add_counters(directory: Path) -> None:
    """What the training of SparseLM leaves beside the weights, in the last file."""
    from safetensors.numpy import load_file, save_file

    counters = {
        "tracker.last_activated.0": np.zeros(32, np.int64),
        "model.layers.1.mlp.tracker.last_activated": np.zeros(32, np.int64),
        "metrics_accumulator.l0": np.zeros((), np.float32),
    }
    last = max(directory.glob("model*.safetensors"))
    save_file(load_file(last) | counters, last, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(counters, last.name)
        index.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    for case_name in CASES:
        build(case_name, GOLDENS / case_name)
