"""The parameters of a model, under our name and under the one that Hugging Face's Llama-like models use."""

import dataclasses

import numpy as np

from sparse_lm.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of `SparseLM`; one of a layer stands for that of every layer.

    Attributes:
      path: keys into the model's state.
      shape: ours, without the layer axis.
      hf_name: with ``{}`` for the layer's number in a layer.
      transposed: whether the published tensor is the transpose.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf_name: str
    transposed: bool = False

    @property
    def layered(self) -> bool:
        return self.path[0] == "blocks"

    @property
    def hf_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def layers(self, config: ModelConfig) -> range:
        """Numbers of the tensors behind the leaf."""
        return range(config.num_layers if self.layered else 1)

    def name(self, layer: int) -> str:
        """Our name of one layer's tensor: ``blocks.3.ffn.w_up``, ``embedding``."""
        first, *rest = self.path
        return ".".join([first, str(layer), *rest] if self.layered else self.path)

    def hf(self, layer: int) -> str:
        """The published name of one layer's tensor."""
        return self.hf_name.format(layer)

    def flip(self, values: np.ndarray) -> np.ndarray:
        """Ours from the published tensor, or the other way round: a contiguous copy or the array itself."""
        return np.ascontiguousarray(values.T) if self.transposed else values


def leaves(config: ModelConfig) -> list[Leaf]:
    """Every parameter of ``SparseLM(config)``, each once."""
    d, f, kv = config.d_model, config.d_ff, config.num_kv_heads * config.head_dim

    def layer(path: str, shape: tuple[int, ...], name: str, transposed: bool = False) -> Leaf:
        return Leaf(("blocks", *path.split(".")), shape, "model.layers.{}." + name, transposed)

    found = [
        Leaf(("embedding",), (config.vocab_size, d), "model.embed_tokens.weight"),
        layer("attention_norm.scale", (d,), "input_layernorm.weight"),
        layer("attention.query.kernel", (d, d), "self_attn.q_proj.weight", True),
        layer("attention.key.kernel", (d, kv), "self_attn.k_proj.weight", True),
        layer("attention.value.kernel", (d, kv), "self_attn.v_proj.weight", True),
        layer("attention.output.kernel", (d, d), "self_attn.o_proj.weight", True),
        layer("ffn_norm.scale", (d,), "post_attention_layernorm.weight"),
        layer("ffn.w_up", (f, d), "mlp.up_proj.weight"),
        layer("ffn.w_down", (f, d), "mlp.down_proj.weight", True),
        Leaf(("final_norm", "scale"), (d,), "model.norm.weight"),
    ]
    if config.gated:
        found.append(layer("ffn.w_gate", (f, d), "mlp.gate_proj.weight"))
    if config.qkv_bias:
        found += [
            layer("attention.query.bias", (d,), "self_attn.q_proj.bias"),
            layer("attention.key.bias", (kv,), "self_attn.k_proj.bias"),
            layer("attention.value.bias", (kv,), "self_attn.v_proj.bias"),
        ]
    if not config.tied_embeddings:
        found.append(Leaf(("head",), (config.vocab_size, d), "lm_head.weight"))
    return found
