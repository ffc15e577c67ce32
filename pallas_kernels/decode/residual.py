"""The residual stream between the kernels of a decode step of one or two tokens: sums and norms inside them.

Why they exist. A residual sum and the RMSNorm that reads it move a few kilobytes, so that a kernel of their
own takes the time of a launch, twice a layer. Here the kernel whose result is added writes the sum
(`Residual`), and the kernel that reads the norm applies it to what it loads (`Normed`). A token's RMS needs
all columns, of which a program writes a tile: so each program also writes the sum of squares of its tile, and
whoever reads the stream adds these *parts* up (`Stream`).

Kernels of more tokens have sums and norms beside them (`add_norm`). They copy x to shared memory while they
compute, which a norm on the way prevents: for 8 tokens on one NVIDIA H100 the first kernel of the layer took
20 us with a norm in it and 16 without, and a kernel for the sum and the norm takes 2.

**Numerics.** The result is rounded, scaled and rounded, added to the stream and rounded, where separate
kernels would do so, and the norm's result is rounded once. Squares are those of the rounded stream, summed in
f32 in an order that the sizes fix, so that the same inputs give the same bits.

The classes are used on both sides of a launch: outside of kernels their fields are arrays, inside they are
refs.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import varying_axes


class Stream(NamedTuple):
    """A residual stream, as one kernel leaves it to the next.

    Attributes:
      x: (M, D).
      squares: (M, n_parts) f32, each token's sums of x² over parts of its columns.
    """

    x: jax.Array
    squares: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> "Stream":
        """The stream that begins with x (M, D)."""
        return cls(x, jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1, keepdims=True))

    def normed(self, scale: jax.Array, eps: float) -> "Normed":
        """RMSNorm of the stream with a scale (D,) f32, to be applied by the kernel that reads it."""
        return Normed(self.x, self.squares, scale, eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """RMSNorm of a stream, which a kernel that takes it for its x (M, D) applies to what it loads.

    Attributes:
      x, squares: those of the `Stream`.
      scale: (D,) f32.
      eps: added to the mean square.
    """

    x: jax.Array
    squares: jax.Array
    scale: jax.Array
    eps: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, D)."""
        return self.x.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the norm's result, which is rounded to x's type."""
        return self.x.dtype

    def inverse_rms(self, token: Any) -> jax.Array:
        """1 / RMS of a ``token`` (), in a kernel."""
        n_parts, d_model = self.squares.shape[1], self.shape[1]
        parts = lax.iota(jnp.int32, pl.next_power_of_2(n_parts))
        total = jnp.sum(plt.load(self.squares.at[token, parts], mask=parts < n_parts, other=0))
        return lax.rsqrt(total / d_model + self.eps)

    def apply(self, x: jax.Array, inverse_rms: jax.Array, columns: jax.Array) -> jax.Array:
        """The norm of values of x (n,) that stand at ``columns`` (n,), in a kernel."""
        scale = plt.load(self.scale.at[columns], mask=columns < self.shape[1], other=0)
        return (x.astype(jnp.float32) * inverse_rms * scale).astype(self.dtype)


def unnormed(x: Any) -> Any:
    """The array (M, D) that a kernel loads for x, an array or a `Normed`; of refs likewise."""
    return x.x if isinstance(x, Normed) else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """What a kernel adds its result (M, D) to, which then gives a `Stream`.

    Attributes:
      x: (M, D), the stream so far.
      factor: of the result, before it is added.
    """

    x: jax.Array
    factor: float = dataclasses.field(default=1.0, metadata={"static": True})

    def output(self, n_parts: int) -> Stream:
        """The shapes of that stream."""
        squares = (self.x.shape[0], n_parts)
        output: Any = partial(varying_axes.output, self.x)
        return Stream(output(self.x.shape, self.x.dtype), output(squares, jnp.float32))


def writer(
    out: Any, onto: Residual | None, token: Any, columns: jax.Array, inside: jax.Array, part: Any
) -> Callable[[jax.Array], None]:
    """How a kernel writes a tile of its result: a function of that (n,) in f32.

    Made before the result is computed, so that the old stream is on its way meanwhile.

    Args:
      out: a ref (M, D), or with ``onto`` a `Stream` of refs.
      onto: of a ref, what the result is added to; or None.
      token, columns, inside: where in (M, D) the tile is, and which columns exist.
      part: which of the token's sums of squares is the tile's.
    """
    at = token, columns
    if onto is None:
        return lambda y: plt.store(out.at[at], y.astype(out.dtype), mask=inside)
    old = plt.load(onto.x.at[at], mask=inside, other=0).astype(jnp.float32)

    def add(y):
        y = y.astype(out.x.dtype).astype(jnp.float32)
        if onto.factor != 1:
            y = (y * onto.factor).astype(out.x.dtype).astype(jnp.float32)
        total = (old + y).astype(out.x.dtype)
        plt.store(out.x.at[at], total, mask=inside)
        wide = total.astype(jnp.float32)
        out.squares[token, part] = jnp.sum(wide * wide)

    return add
