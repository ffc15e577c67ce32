"""The activations that are exactly zero up to a threshold, which is what lets a kernel skip a neuron.

A neuron is *active* unless its rounded gate is at or under the threshold; the gate alone decides. The
functions here are elementwise, take f32 and give f32, and run inside kernels as well as outside; who calls
them rounds, where the specification (`reference`) does.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

ActivationName = Literal["relu", "relu2", "drelu"]


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Thresholded ReLU: ``g`` above ``value``, zero up to it (FATReLU, JumpReLU; published: 0.01 to 0.03).

    The threshold is rounded to the type of x before gates are compared with it.

    Raises:
      ValueError: a value that is negative or not a finite number.
    """

    value: float

    def __post_init__(self) -> None:
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not number or not 0 <= self.value < math.inf:
            raise ValueError(
                f"Threshold.value must be a finite number of at least 0, up to which gates are silent; "
                f"got {self.value!r}"
            )

    def __str__(self) -> str:
        return f"threshold({self.value!r})"


Activation = ActivationName | Threshold
"""``"relu"``; ``"relu2"``, the square of ReLU; `Threshold`; or ``"drelu"``, both the gate and the up
projection rectified."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an activation means for the kernels: ``h = value(g) * up(u)`` where active, without a gate
    ``h = value(g)``.

    Attributes:
      threshold: gates at or under it are inactive.
      squared: whether ``value(g)`` is g².
      rectified_up: whether ``up(u)`` is max(u, 0).
    """

    threshold: float = 0.0
    squared: bool = False
    rectified_up: bool = False

    def active(self, gate: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Which neurons are active, of gates that were rounded to ``dtype`` (that of the array itself unless
        it was widened since); a NaN gate is active."""
        threshold = float(np.asarray(self.threshold, dtype or gate.dtype))
        return ~(gate <= jnp.asarray(threshold, gate.dtype))

    def last_inactive(self, dtype: DTypeLike) -> float:
        """The largest f32 number that is inactive once it is rounded to ``dtype``.

        So a kernel can read an f32 accumulator's side of the threshold without rounding it.
        """
        dtype = np.dtype(dtype)
        threshold = np.asarray(self.threshold, dtype)
        if dtype == np.float32:
            return float(threshold)
        following = (threshold.view(np.uint16) + np.uint16(1)).view(dtype)
        middle = np.float32((float(threshold) + float(following)) / 2)
        # A tie rounds to the even one of the two: up, and so to an active gate, where the threshold is odd.
        odd = bool(threshold.view(np.uint16) & 1)
        return float(np.nextafter(middle, np.float32(-np.inf)) if odd else middle)

    def value(self, gate: jax.Array) -> jax.Array:
        """The activation of an active gate."""
        return gate * gate if self.squared else gate

    def slope(self, gate: jax.Array) -> jax.Array | float:
        """The derivative of `value`."""
        return 2 * gate if self.squared else 1.0

    def up(self, up: jax.Array) -> jax.Array:
        """What the activation of the gate is multiplied with; NaN stays."""
        return jnp.where(up <= 0, jnp.zeros_like(up), up) if self.rectified_up else up

    def up_slope(self, up: jax.Array) -> jax.Array | float:
        """The derivative of `up`."""
        return jnp.where(up <= 0, 0.0, 1.0).astype(up.dtype) if self.rectified_up else 1.0


def stored_active(gate: jax.Array) -> jax.Array:
    """Which gates are active, of gates as the formats store them: zero where they are not, whatever the
    threshold."""
    return ~(gate <= 0)


RELU = Rule()
_RULES: dict[str, Rule] = {
    "relu": RELU,
    "relu2": Rule(squared=True),
    "drelu": Rule(rectified_up=True),
}


def rule(activation: Activation) -> Rule:
    """The rule of an activation.

    Raises:
      ValueError: no activation that the kernels know.
    """
    if isinstance(activation, Threshold):
        return Rule(threshold=float(activation.value))
    if activation not in get_args(ActivationName):
        raise ValueError(
            f"activation must be one of {', '.join(get_args(ActivationName))}, or Threshold(number); "
            f"got {activation!r}: an activation that is not zero up to a threshold has nothing to skip"
        )
    return _RULES[activation]


def parse(text: str) -> Activation:
    """The activation that ``str`` of one gives: ``"relu"``, ``"threshold(0.01)"``.

    Raises:
      ValueError: no activation that the kernels know.
    """
    if text.startswith("threshold(") and text.endswith(")"):
        inside = text.removeprefix("threshold(").removesuffix(")")
        try:
            return Threshold(float(inside))
        except ValueError as error:
            raise ValueError(
                f"threshold(...) must hold a finite number of at least 0; got {text!r}"
            ) from error
    rule(text)  # type: ignore[arg-type]  # raises where it is none
    return text  # type: ignore[return-value]
