"""Rotary frequencies and the published ways of stretching them to a longer context."""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

_MOST_ROTATIONS = 1_000_000  # far beyond any context
RopeScalingKind = Literal["none", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies differ from ``theta ** (-i / half)``.

    Attributes:
      kind: ``"none"``; ``"linear"`` divides all frequencies by ``factor`` (arXiv 2306.15595); ``"llama3"``
        divides the low ones and blends up to the high ones (arXiv 2407.21783); ``"yarn"`` does so over a ramp
        in the dimensions and scales the rotated vectors (arXiv 2309.00071); ``"dynamic"`` (NTK-aware) changes
        nothing up to ``original_context``, where a model's context has to end.
      factor: how much longer the context becomes.
      original_context: positions of the training before the stretch; ``"dynamic"``, ``"llama3"`` and
        ``"yarn"`` need it.
      low_freq_factor: ``"llama3"``: wavelengths over ``original_context / low_freq_factor`` are stretched.
      high_freq_factor: ``"llama3"``: wavelengths under ``original_context / high_freq_factor`` are not.
      beta_fast: ``"yarn"``: rotations within ``original_context`` where the ramp begins.
      beta_slow: ``"yarn"``: rotations within ``original_context`` where the ramp ends.
      truncate: ``"yarn"``: the ramp begins and ends at whole dimensions.
      attention_factor: ``"yarn"``: factor of the rotated queries and keys; ``None`` means
        ``0.1 ln(factor) + 1``.

    Raises:
      ValueError: a field outside its range.
    """

    kind: RopeScalingKind = "none"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeScalingKind):
            raise ValueError(
                f"model.rope-scaling.kind must be one of {', '.join(get_args(RopeScalingKind))}; "
                f"got {self.kind!r}"
            )
        if not (1 <= self.factor < math.inf):
            raise ValueError(
                f"model.rope-scaling.factor must be a finite number of at least 1; got {self.factor}"
            )
        if self.kind in ("dynamic", "llama3", "yarn") and not (self.original_context or 0) >= 1:
            raise ValueError(
                f"model.rope-scaling.original-context must be at least 1 for {self.kind}; "
                f"got {self.original_context}"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                "model.rope-scaling.low-freq-factor must be positive and under high-freq-factor="
                f"{self.high_freq_factor}; got {self.low_freq_factor}"
            )
        if not 0 < self.beta_slow < self.beta_fast <= _MOST_ROTATIONS:
            raise ValueError(
                "model.rope-scaling.beta-slow must be positive and under beta-fast, which is at most "
                f"{_MOST_ROTATIONS}; got {self.beta_slow} and {self.beta_fast}"
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(
                "model.rope-scaling.attention-factor must be a finite positive number or None; "
                f"got {self.attention_factor}"
            )

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by; 1 for all kinds but ``"yarn"``."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """(H / 2,) f32, radians a position of each pair of dimensions.

    Args:
      head_dim: H, even.
      theta: base of the wavelengths.
      scaling: how they are stretched.
    """
    half = head_dim // 2
    plain = theta ** (-np.arange(half, dtype=np.float64) / half)
    match scaling.kind:
        case "linear":
            scaled = plain / scaling.factor
        case "llama3":
            scaled = _llama3(plain, scaling)
        case "yarn":
            kept = 1.0 - _yarn_ramp(head_dim, theta, scaling)
            scaled = plain * kept + plain / scaling.factor * (1.0 - kept)
        case _:
            scaled = plain
    return scaled.astype(np.float32)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Low frequencies are divided by the factor, high ones kept, those between blended linearly."""
    rotations = _original_context(scaling) * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return plain * kept + plain / scaling.factor * (1.0 - kept)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """0 for pairs that keep their frequency, 1 for pairs that are divided by the factor, a ramp between."""

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        turns = _original_context(scaling) / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    return np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)


def _original_context(scaling: RopeScaling) -> int:
    assert scaling.original_context is not None  # checked by RopeScaling
    return scaling.original_context
