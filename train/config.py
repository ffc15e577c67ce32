"""A training run as data: every field is an option of ``sparse-lm train``."""

import dataclasses
import os
from typing import Literal

from pallas_kernels.errors import RequestError
from sparse_lm import ModelConfig


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise RequestError(message)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut.

    Attributes:
      paths: files or globs of documents (JSONL, plain text or Parquet; the first two plain or .gz/.xz/.zst),
        or directories of token shards that ``sparse-lm tokenize`` has made. Empty: the corpus that ships with
        the package.
      weights: share of each of ``paths`` in a mixture of them, in any unit. Empty: all are one corpus.
      text_field: field of a JSONL document, or column of Parquet, that holds its text.
      tokenizer: ``"byte"``, ``"bpe"`` (fitted on the corpus with the model's vocabulary size; token shards
        bring their own), or the path of a Hugging Face ``tokenizer.json``.
      holdout: share of documents kept out of training for evaluation; each document's own hash decides.
      accept_change: resume although the corpus is not the one that was trained on so far.
      require_paths: refuse an empty ``paths``: the corpus that ships with the package is too small for the
        model.
    """

    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    text_field: str = "text"
    tokenizer: str = "byte"
    holdout: float = 0.05
    accept_change: bool = False
    require_paths: bool = False

    def __post_init__(self) -> None:
        _require(all(self.paths), "data.paths must name files; got ''")
        _require(0 < self.holdout < 1, f"data.holdout must lie between 0 and 1; got {self.holdout}")
        _require(
            bool(self.tokenizer), "data.tokenizer must be byte, bpe or the path of a tokenizer.json; got ''"
        )
        _require(bool(self.text_field), "data.text-field must name a field; got ''")
        _require(
            len(self.weights) in (0, len(self.paths)),
            f"data.weights must be as many as data.paths, {len(self.paths)}; got {len(self.weights)}",
        )
        _require(
            all(0 < weight < float("inf") for weight in self.weights),
            f"data.weights must be finite positive numbers; got {', '.join(map(str, self.weights))}",
        )

    def absolute(self) -> "DataConfig":
        """The same files, named so that they are found from any directory."""
        named = self.tokenizer in ("byte", "bpe")
        return dataclasses.replace(
            self,
            paths=tuple(map(_absolute, self.paths)),
            tokenizer=self.tokenizer if named else _absolute(self.tokenizer),
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine schedule with linear warm-up (defaults: the paper's recipe).

    Attributes:
      learning_rate: peak learning rate.
      final_fraction: the cosine's end as a share of the peak.
      warmup_steps: steps of linear warm-up.
      weight_decay: decoupled decay, applied to matrices only (not to norms and biases).
      beta1: Adam's decay of the mean of gradients.
      beta2: Adam's decay of the mean of their squares.
      eps: Adam's, added to the root of the latter.
      clip: global-norm bound of the gradient.
      z_loss: coefficient of the mean square of the logarithm of the softmax's normaliser, which the loss
        adds; PaLM's 1e-4 keeps logits from drifting.
      accumulation: micro-batches summed into one step; the result equals the whole batch at once.
      skip_nonfinite: steps in a row whose loss or gradient is not finite and that are left out; one more
        stops the run.
    """

    learning_rate: float = 1e-3
    final_fraction: float = 0.0
    warmup_steps: int = 600
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    z_loss: float = 0.0
    accumulation: int = 1
    skip_nonfinite: int = 0

    def __post_init__(self) -> None:
        positive = {"learning-rate": self.learning_rate, "eps": self.eps, "clip": self.clip}
        for name, value in positive.items():
            _require(
                0 < value < float("inf"), f"optimizer.{name} must be a finite positive number; got {value}"
            )
        for name, value in {"beta1": self.beta1, "beta2": self.beta2}.items():
            _require(0 <= value < 1, f"optimizer.{name} must be at least 0 and under 1; got {value}")
        _require(
            0 <= self.final_fraction <= 1,
            f"optimizer.final-fraction must lie between 0 and 1; got {self.final_fraction}",
        )
        _require(
            0 <= self.weight_decay < float("inf"),
            f"optimizer.weight-decay must be a finite number of at least 0; got {self.weight_decay}",
        )
        _require(
            0 <= self.z_loss < float("inf"),
            f"optimizer.z-loss must be a finite number of at least 0; got {self.z_loss}",
        )
        _require(
            self.warmup_steps >= 0, f"optimizer.warmup-steps must be at least 0; got {self.warmup_steps}"
        )
        _require(
            self.accumulation >= 1, f"optimizer.accumulation must be at least 1; got {self.accumulation}"
        )
        _require(
            self.skip_nonfinite >= 0,
            f"optimizer.skip-nonfinite must be at least 0; got {self.skip_nonfinite}",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints.
      minutes: a checkpoint also after so many minutes without one; 0 counts steps alone.
      keep: newest checkpoints kept; the one with the lowest held-out CE is kept besides.
    """

    every: int = 1000
    minutes: float = 30.0
    keep: int = 3

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"checkpoint.every must be at least 1; got {self.every}")
        _require(
            0 <= self.minutes < float("inf"),
            f"checkpoint.minutes must be a finite number of at least 0; got {self.minutes}",
        )
        _require(self.keep >= 1, f"checkpoint.keep must be at least 1; got {self.keep}")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What a run says while it runs.

    Attributes:
      every: steps between progress lines.
      evaluate_every: steps between held-out evaluations; 0 evaluates only at the end.
      evaluate_tokens: held-out tokens of one evaluation, in whole windows of the context: at most so many,
        and the same ones for every batch size and number of devices.
      tensorboard: also write TensorBoard event files into the work directory.
      wandb: also send the metrics to this project of Weights & Biases.
      samples: texts to continue after each evaluation, to see what the model has learned.
      profile: steps to record with JAX's profiler, ``"100:110"`` for the hundredth to the hundred and tenth;
        the trace goes into the work directory.
    """

    every: int = 10
    evaluate_every: int = 1000
    evaluate_tokens: int = 1 << 24
    tensorboard: bool = False
    wandb: str = ""
    samples: tuple[str, ...] = ()
    profile: str = ""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"report.every must be at least 1; got {self.every}")
        _require(
            self.evaluate_every >= 0, f"report.evaluate-every must be at least 0; got {self.evaluate_every}"
        )
        _require(
            self.evaluate_tokens >= 1,
            f"report.evaluate-tokens must be at least 1; got {self.evaluate_tokens}",
        )
        _require(
            not self.profile or self.profile_steps is not None,
            f"report.profile must be two steps FIRST:LAST, the first no later; got {self.profile!r}",
        )

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """First and last step to profile, if any."""
        first, _, last = self.profile.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            return None
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a step spreads over devices (all of them, all processes).

    Attributes:
      mode: ``"jit"`` with a mesh, or ``"pmap"``.
      shard: what is split across devices under ``"jit"``: ``"none"`` (data parallel only), ``"zero1"``
        (optimizer state), ``"fsdp"`` (optimizer state and parameters).
      batch_per_device: sequences that a device takes at a time; how many times it does in a step then follows
        from ``batch_size``, which stays the batch of a step. 0: ``optimizer.accumulation`` says how many.
      reduce_dtype: in which gradients of matrices are summed over devices: ``"float32"``, or ``"bfloat16"``,
        half the bytes; each device's own gradient, and all that follows the sum, stay in f32.
    """

    mode: Literal["jit", "pmap"] = "jit"
    shard: Literal["none", "zero1", "fsdp"] = "none"
    batch_per_device: int = 0
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require(
            self.reduce_dtype in ("float32", "bfloat16"),
            f"parallel.reduce-dtype must be float32 or bfloat16; got {self.reduce_dtype!r}",
        )
        _require(self.mode in ("jit", "pmap"), f"parallel.mode must be jit or pmap; got {self.mode!r}")
        _require(
            self.shard in ("none", "zero1", "fsdp"),
            f"parallel.shard must be none, zero1 or fsdp; got {self.shard!r}",
        )
        _require(
            self.batch_per_device >= 0,
            f"parallel.batch-per-device must be at least 0; got {self.batch_per_device}",
        )
        _require(
            self.mode == "jit" or self.shard == "none",
            f"parallel.shard={self.shard} needs parallel.mode=jit; got parallel.mode={self.mode}",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      steps: optimizer steps in all.
      batch_size: sequences of one optimizer step, over all devices, processes and accumulation steps.
      seed: of the initial weights and of the data order.
      workdir: directory of checkpoints, logs and the tokenizer.
      refresh_order_every: steps between renewals of what ``model.token-order`` keeps, where it keeps
        anything; the first comes before the first step.
      compilation_cache: directory of compiled programs, which later runs take from there; by default on GPUs
        ``~/.cache/sparse-lm/compiled``, or what JAX_COMPILATION_CACHE_DIR says; ``off`` keeps none.
      plan: ``"auto"``: where ``model.ffn.format`` is auto and the device has panels, the run chooses a format
        for each layer, by what its steps count; ``"off"``: each call decides for itself.
      plan_every: steps over which is averaged what a plan is chosen by.
    """

    steps: int = 30_000
    batch_size: int = 512
    seed: int = 0
    workdir: str = "runs/sparse-lm"
    refresh_order_every: int = 50
    compilation_cache: str = ""
    plan: Literal["auto", "off"] = "auto"
    plan_every: int = 20
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        # Steps are counted in int32, and a seed is one word of JAX's key.
        _require(1 <= self.steps < 2**31, f"steps must be at least 1 and under 2^31; got {self.steps}")
        _require(0 <= self.seed < 2**32, f"seed must be at least 0 and under 2^32; got {self.seed}")
        _require(self.batch_size >= 1, f"batch-size must be at least 1; got {self.batch_size}")
        _require(bool(self.workdir), "workdir must name a directory; got ''")
        _require(
            self.refresh_order_every >= 1,
            f"refresh-order-every must be at least 1; got {self.refresh_order_every}",
        )
        _require(self.plan in ("auto", "off"), f"plan must be auto or off; got {self.plan!r}")
        _require(self.plan_every >= 1, f"plan-every must be at least 1; got {self.plan_every}")
        _require(
            self.batch_size % self.optimizer.accumulation == 0,
            f"batch-size must be a multiple of optimizer.accumulation={self.optimizer.accumulation}; "
            f"got {self.batch_size}",
        )

    def on_devices(self, devices: int) -> "TrainConfig":
        """The same run on so many devices: with the accumulation that ``parallel.batch_per_device`` makes.

        Raises:
          RequestError: the batch does not divide, or another accumulation was asked for besides.
        """
        at_once = self.parallel.batch_per_device
        if not at_once:
            return self
        unit, asked = devices * at_once, self.optimizer.accumulation
        product = f"devices × parallel.batch-per-device = {devices} × {at_once} = {unit}"
        below = self.batch_size // unit * unit
        _require(
            self.batch_size == below,
            f"batch-size must be a multiple of {product}; got {self.batch_size}: choose "
            + (f"{below} or {below + unit}" if below else f"{unit}")
            + ", or another number of sequences per device",
        )
        accumulation = self.batch_size // unit
        _require(
            asked in (1, accumulation),
            f"optimizer.accumulation must be batch-size / ({product}) = {accumulation} where "
            f"parallel.batch-per-device is given; got {asked}: leave one of the two out",
        )
        return dataclasses.replace(
            self, optimizer=dataclasses.replace(self.optimizer, accumulation=accumulation)
        )

    def as_asked(self) -> "TrainConfig":
        """The run for any number of devices: without the accumulation that `on_devices` has found."""
        if not self.parallel.batch_per_device:
            return self
        return dataclasses.replace(self, optimizer=dataclasses.replace(self.optimizer, accumulation=1))
