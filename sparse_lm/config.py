"""What a model is: sizes, numerics and sparsity. Frozen, validated, and the same in code, presets and CLI."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, get_args

from pallas_kernels import FFNOptions, activations
from pallas_kernels.errors import RequestError
from sparse_lm.rope import RopeScaling

L1Schedule = Literal["constant", "linear", "staged", "target"]
SILU = "silu"
MAX_SILENCE = (1 << 30) - 1  # tokens of silence are counted up to here, in int32
RematPolicy = Literal["none", "full", "dots", "sparse"]
LayerLoop = Literal["auto", "scan", "unrolled"]
Dtype = Literal["bfloat16", "float16", "float32"]
TokenOrderName = Literal["text", "auto", "id", "vocabulary", "centroids", "hash"]


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """The L1 term that makes the feed-forward activations sparse, and what is done about neurons that it
    silences for good (paper section 4).

    The training loss is ``CE + λ(step) * mean over layers of l1``. A neuron is dead when none of the last
    ``dead_after`` tokens of training activated it.

    Attributes:
      l1: the coefficient λ; 0 trains the same model without sparsity pressure.
      schedule: ``"constant"`` holds λ from the first step; ``"linear"`` keeps it at 0 for ``off_steps``, then
        ramps it linearly to λ over ``ramp_steps`` (the paper's warm-up: 5,000 and 5,000); ``"staged"`` takes
        the value of ``stage_l1`` from each step of ``stage_steps`` on, and λ before the first; ``"target"``
        begins at λ after ``off_steps`` and steers it until ``target_l0`` neurons are active.
      off_steps: steps at 0 before the ramp, or before λ is steered.
      ramp_steps: steps of the ramp.
      stage_steps: steps at which the stages begin, rising.
      stage_l1: λ of each stage.
      target_l0: wanted active neurons of a token, mean over layers.
      steer_rate: how fast λ is steered: with twice as many neurons active as wanted, it grows by this share
        of itself in a step.
      dead_after: tokens of silence after which a neuron is dead (the paper: a step of about a million).
      revive: what is done with dead neurons after each step: ``"off"``, or their gate rows w become
        ``(1 - revive_mix) w + revive_mix N(0, revive_std²)`` and the optimizer's moments of these rows are
        set to zero (``"reset"``) or stay (``"keep"``).
      revive_mix: share of the noise.
      revive_std: standard deviation of the noise.
    """

    l1: float = 2e-5
    schedule: L1Schedule = "constant"
    off_steps: int = 0
    ramp_steps: int = 0
    stage_steps: tuple[int, ...] = ()
    stage_l1: tuple[float, ...] = ()
    target_l0: float = 0.0
    steer_rate: float = 0.01
    dead_after: int = 1_000_000
    revive: Literal["off", "reset", "keep"] = "off"
    revive_mix: float = 0.1
    revive_std: float = 0.02

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise RequestError(f"model.sparsity.{message}")

        finite = float("inf")
        require(0 <= self.l1 < finite, f"l1 must be a finite number of at least 0; got {self.l1}")
        require(
            self.schedule in get_args(L1Schedule),
            f"schedule must be {', '.join(get_args(L1Schedule)[:-1])} or {get_args(L1Schedule)[-1]}; "
            f"got {self.schedule!r}",
        )
        for name, value in {"off-steps": self.off_steps, "ramp-steps": self.ramp_steps}.items():
            require(value >= 0, f"{name} must be at least 0; got {value}")
        self._require_that_options_apply(require)
        rising = all(first < second for first, second in itertools.pairwise((0, *self.stage_steps)))
        require(rising, f"stage-steps must be at least 1 and rise; got {self.stage_steps}")
        require(
            len(self.stage_steps) == len(self.stage_l1),
            f"stage-l1 must have a value for each of the {len(self.stage_steps)} stage-steps; "
            f"got {len(self.stage_l1)}",
        )
        require(
            all(0 <= value < finite for value in self.stage_l1),
            f"stage-l1 must be finite numbers of at least 0; got {self.stage_l1}",
        )
        if self.schedule == "target":
            require(
                0 < self.target_l0 < finite,
                f"target-l0 must be a finite positive number for schedule=target; got {self.target_l0}",
            )
            require(
                self.l1 > 0, f"l1 must be positive for schedule=target, which multiplies it; got {self.l1}"
            )
        require(0 < self.steer_rate <= 1, f"steer-rate must be over 0 and at most 1; got {self.steer_rate}")
        require(
            1 <= self.dead_after <= MAX_SILENCE,
            f"dead-after must be from 1 to {MAX_SILENCE} tokens; got {self.dead_after}",
        )
        require(
            self.revive in ("off", "reset", "keep"), f"revive must be off, reset or keep; got {self.revive!r}"
        )
        require(0 < self.revive_mix <= 1, f"revive-mix must be over 0 and at most 1; got {self.revive_mix}")
        require(
            0 <= self.revive_std < finite,
            f"revive-std must be a finite number of at least 0; got {self.revive_std}",
        )

    def _require_that_options_apply(self, require: Callable[[bool, str], None]) -> None:
        """Refuses options of a schedule that was not chosen, which would otherwise do nothing unsaid."""
        owners: dict[str, tuple[str, ...]] = {
            "off_steps": ("linear", "target"),
            "ramp_steps": ("linear",),
            "stage_steps": ("staged",),
            "target_l0": ("target",),
        }
        for name, schedules in owners.items():
            require(
                not getattr(self, name) or self.schedule in schedules,
                f"{name.replace('_', '-')} needs schedule={' or '.join(schedules)}; got {self.schedule}",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder (Qwen2 with ``qkv_bias=True``) whose feed-forward layers are sparse.

    Attributes:
      vocab_size: V, rows of the embedding.
      d_model: D, model width.
      d_ff: F, hidden neurons of each feed-forward layer.
      num_layers: depth.
      num_heads: query heads.
      num_kv_heads: key/value heads (grouped-query attention).
      gated: ``act(x Wg) * (x Wu)`` if true, ``act(x Wu)`` if false.
      activation: ``act``: ``"relu"``; ``"relu2"``, its square; ``"threshold(0.01)"``, x where it is over 0.01
        and else 0 (FATReLU); ``"drelu"``, ReLU of the gate and of ``x Wu`` too (gated models only); or
        ``"silu"``, for a dense baseline: no neuron is ever silent, so that ``ffn`` must be dense or auto,
        which then is dense, and ``sparsity.l1`` 0.
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
      layer_loop: how a program runs the layers: ``"scan"``, as a loop, compiled once however many there are;
        ``"unrolled"``, one after the other, which takes longer to compile and saves the copies that a loop
        makes of each layer's weights and of what its backward needs (a tenth of a dense training step on an
        H100); ``"auto"``, unrolled on NVIDIA GPUs up to 48 layers, else a loop.
      sparsity: the L1 term.
      ffn: how the feed-forward kernels run; its activation is not read.
      token_order: in which order the feed-forward layers take the tokens of a forward, which decides which
        tokens share a panel, and no result: ``"text"``, as they come; ``"id"``, by token id;
        ``"vocabulary"``, by clusters of the embedding, then id; ``"centroids"``, by clusters of what enters
        the first feed-forward layer, then id; ``"hash"``, by signs of random projections of that, then id;
        ``"auto"``, ``"centroids"`` where the layers may run in panels, else ``"text"``. Generation and
        forwards of few tokens leave it out. Clusters follow a training (`SparseLM.refresh_token_order`).
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
    layer_loop: LayerLoop = "auto"
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
                raise RequestError(f"model.{name.replace('_', '-')} must be at least 1; got {value}")
        if self.d_model % self.num_heads:
            raise RequestError(
                f"model.num-heads must divide model.d-model={self.d_model}; got {self.num_heads}: "
                "choose a number of heads that divides it"
            )
        if self.num_heads % self.num_kv_heads:
            raise RequestError(
                f"model.num-kv-heads must divide model.num-heads={self.num_heads}; got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise RequestError(
                f"model.d-model / model.num-heads must be even for rotary embeddings; got {self.head_dim}"
            )
        if self.activation == SILU:
            self._require_dense()
        else:
            try:
                activations.parse(self.activation)
            except ValueError as error:
                raise RequestError(f"model.activation: {error}; {SILU} is for a dense baseline") from error
        if self.ffn.activation != FFNOptions().activation:
            raise RequestError(
                "model.ffn.activation must be left out, model.activation is the model's; got "
                f"{self.ffn.activation}"
            )
        if self.activation == "drelu" and not self.gated:
            raise RequestError("model.activation=drelu rectifies both sides of a gate; got model.gated=False")
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
                raise RequestError(
                    f"model.{name.replace('_', '-')} must be a finite positive number; got {value}"
                )
        if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise RequestError(f"model.rope-theta must be over 1 for yarn; got {self.rope_theta}")
        original = self.rope_scaling.original_context
        if self.rope_scaling.kind == "dynamic" and original is not None and self.context_length > original:
            raise RequestError(
                "model.context-length must not go beyond model.rope-scaling.original-context="
                f"{original} with dynamic scaling, which changes its frequencies with the length of the text "
                f"from there on; got {self.context_length}: use linear, llama3 or yarn for longer texts"
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise RequestError(f"model.dtype must be bfloat16, float16 or float32; got {self.dtype!r}")
        if self.remat not in get_args(RematPolicy):
            raise RequestError(f"model.remat must be none, full, dots or sparse; got {self.remat!r}")
        if self.layer_loop not in get_args(LayerLoop):
            raise RequestError(f"model.layer-loop must be auto, scan or unrolled; got {self.layer_loop!r}")
        if self.token_order not in get_args(TokenOrderName):
            raise RequestError(
                f"model.token-order must be one of {', '.join(get_args(TokenOrderName))}; "
                f"got {self.token_order!r}"
            )
        if self.token_clusters * self.vocab_size >= 2**31:
            raise RequestError(
                f"model.token-clusters × model.vocab-size must be below 2^31, so that a cluster and an id "
                f"share an int32 key; got {self.token_clusters} × {self.vocab_size}"
            )

    def _require_dense(self) -> None:
        """Refuses what is for layers with silent neurons."""
        for name, value, wanted in (
            ("ffn.format", self.ffn.layout.name, ("dense", "auto")),
            ("ffn.backend", self.ffn.backend, ("auto", "xla")),
            ("sparsity.l1", self.sparsity.l1, (0,)),
            ("sparsity.revive", self.sparsity.revive, ("off",)),
        ):
            if value not in wanted:
                raise RequestError(
                    f"model.{name} must be {' or '.join(map(str, wanted))} with model.activation={SILU}, "
                    f"which is zero for no neuron; got {value}"
                )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def ffn_options(self) -> FFNOptions:
        """``ffn`` with the model's activation: what a feed-forward layer of the model is called with.

        Raises:
          RequestError: the activation is SiLU, which no sparse layer runs.
        """
        if self.activation == SILU:
            raise RequestError(f"model.activation must have silent neurons for this; got {SILU}")
        return dataclasses.replace(self.ffn, activation=activations.parse(self.activation))
