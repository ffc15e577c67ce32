"""What a model is: sizes, numerics and sparsity. Frozen, validated, and the same in code, presets and CLI."""

import dataclasses
from typing import Literal, get_args

from pallas_kernels import FFNOptions, activations
from sparse_lm.rope import RopeScaling

RematPolicy = Literal["none", "full", "dots", "sparse"]
Dtype = Literal["bfloat16", "float16", "float32"]
TokenOrderName = Literal["text", "auto", "id", "vocabulary", "centroids", "hash"]


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """The L1 term that makes the feed-forward activations sparse (paper section 4).

    The training loss is ``CE + coefficient(step) * mean over layers of l1``.

    Attributes:
      l1: final coefficient λ; 0 trains the same model without sparsity pressure.
      schedule: ``"constant"`` holds λ from the first step; ``"linear"`` keeps it at 0 for ``off_steps``, then
        ramps it linearly to λ over ``ramp_steps`` (the paper's warm-up: 5,000 and 5,000).
      off_steps: steps at 0 before the ramp.
      ramp_steps: steps of the ramp.
    """

    l1: float = 2e-5
    schedule: Literal["constant", "linear"] = "constant"
    off_steps: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        if not (self.l1 >= 0 and self.l1 < float("inf")):
            raise ValueError(f"model.sparsity.l1 must be a finite number of at least 0; got {self.l1}")
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"model.sparsity.schedule must be constant or linear; got {self.schedule!r}")
        if self.off_steps < 0 or self.ramp_steps < 0:
            raise ValueError(
                "model.sparsity.off-steps and model.sparsity.ramp-steps must be at least 0; "
                f"got {self.off_steps} and {self.ramp_steps}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder (Qwen2 with ``qkv_bias=True``) whose feed-forward layers are sparse.

    Attributes:
      vocab_size: V, rows of the embedding.
      d_model: D, model width.
      d_ff: F, hidden neurons of each feed-forward layer.
      num_layers, num_heads, num_kv_heads: depth, query heads, key/value heads (grouped-query attention).
      gated: ``act(x Wg) * (x Wu)`` if true, ``act(x Wu)`` if false.
      activation: ``act``: ``"relu"``; ``"relu2"``, its square; ``"threshold(0.01)"``, x where it is over 0.01
        and else 0 (FATReLU); ``"drelu"``, ReLU of the gate and of ``x Wu`` too (gated models only).
      tied_embeddings: the output head is the embedding's transpose.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      context_length: longest sequence in tokens.
      rope_theta: base of the rotary embedding.
      rope_scaling: how its frequencies are stretched to a longer context.
      embedding_scale: factor of the embeddings (MiniCPM's ``scale_emb``).
      residual_scale: factor of what attention and feed-forward add to the residual stream (MiniCPM's
        ``scale_depth / sqrt(num_layers)``).
      logit_divisor: divides the hidden state before the output head (MiniCPM's
        ``hidden_size / dim_model_base``).
      norm_eps: RMSNorm epsilon.
      init_std: standard deviation of the initial weights.
      dtype: compute type, ``"bfloat16"``, ``"float16"`` or ``"float32"``; master weights are always f32.
      remat: what the backward recomputes in each layer: ``"none"``, ``"dots"`` (keeps matrix products),
        ``"sparse"`` (keeps what the sparse feed-forward kernels store for their backward, so that only
        attention is computed twice; a dense feed-forward stores nothing and is computed twice too),
        ``"full"`` (keeps only each layer's input).
      sparsity: the L1 term.
      ffn: how the feed-forward kernels run; its activation is not read.
      token_order: in which order the feed-forward layers take the tokens of a forward, which decides which
        tokens share a panel, and no result: ``"text"``, as they come; ``"id"``, by token id;
        ``"vocabulary"``, by clusters of the embedding, then id; ``"centroids"``, by clusters of what enters
        the first feed-forward layer, then id; ``"hash"``, by signs of random projections of that, then id;
        ``"auto"``, ``"centroids"`` where the layers may run in panels, else ``"text"``. Steps of decoding
        and forwards of few tokens leave it out. Clusters follow a training (`SparseLM.refresh_token_order`).
      token_clusters: K, how many clusters ``"vocabulary"`` and ``"centroids"`` tell apart.
    """

    vocab_size: int = 49_152
    d_model: int = 2048
    d_ff: int = 5632
    num_layers: int = 28
    num_heads: int = 32
    num_kv_heads: int = 32
    gated: bool = True
    activation: str = "relu"
    tied_embeddings: bool = True
    qkv_bias: bool = False
    context_length: int = 2048
    rope_theta: float = 100_000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dtype: Dtype = "bfloat16"
    remat: RematPolicy = "none"
    sparsity: SparsityConfig = dataclasses.field(default_factory=SparsityConfig)
    ffn: FFNOptions = dataclasses.field(default_factory=FFNOptions)
    token_order: TokenOrderName = "text"
    token_clusters: int = 64

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "d_ff",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "context_length",
            "token_clusters",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"model.{name.replace('_', '-')} must be at least 1; got {value}")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.num-heads must divide model.d-model={self.d_model}; got {self.num_heads}: "
                "choose a number of heads that divides it"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num-kv-heads must divide model.num-heads={self.num_heads}; got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.d-model / model.num-heads must be even for rotary embeddings; got {self.head_dim}"
            )
        try:
            activations.parse(self.activation)
        except ValueError as error:
            raise ValueError(f"model.activation: {error}") from error
        if self.ffn.activation != FFNOptions().activation:
            raise ValueError(
                "model.ffn.activation must be left out, model.activation is the model's; got "
                f"{self.ffn.activation}"
            )
        if self.activation == "drelu" and not self.gated:
            raise ValueError("model.activation=drelu rectifies both sides of a gate; got model.gated=False")
        for name in (
            "rope_theta",
            "norm_eps",
            "init_std",
            "embedding_scale",
            "residual_scale",
            "logit_divisor",
        ):
            value = getattr(self, name)
            if not (value > 0 and value < float("inf")):
                raise ValueError(
                    f"model.{name.replace('_', '-')} must be a finite positive number; got {value}"
                )
        if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"model.rope-theta must be over 1 for yarn; got {self.rope_theta}")
        original = self.rope_scaling.original_context
        if self.rope_scaling.kind == "dynamic" and original is not None and self.context_length > original:
            raise ValueError(
                "model.context-length must not go beyond model.rope-scaling.original-context="
                f"{original} with dynamic scaling, which changes its frequencies with the length of the text "
                f"from there on; got {self.context_length}: use linear, llama3 or yarn for longer texts"
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"model.dtype must be bfloat16, float16 or float32; got {self.dtype!r}")
        if self.remat not in get_args(RematPolicy):
            raise ValueError(f"model.remat must be none, full, dots or sparse; got {self.remat!r}")
        if self.token_order not in get_args(TokenOrderName):
            raise ValueError(
                f"model.token-order must be one of {', '.join(get_args(TokenOrderName))}; "
                f"got {self.token_order!r}"
            )
        if self.token_clusters * self.vocab_size >= 2**31:
            raise ValueError(
                f"model.token-clusters × model.vocab-size must be below 2^31, so that a cluster and an id "
                f"share an int32 key; got {self.token_clusters} × {self.vocab_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def ffn_options(self) -> FFNOptions:
        """``ffn`` with the model's activation: what a feed-forward layer of the model is called with."""
        return dataclasses.replace(self.ffn, activation=activations.parse(self.activation))
