"""Gates in a low precision, each with a proven bound on its distance from the gate that the layer computes.

The layer's gate of a token x and a neuron w is x·w, summed in f32 in some order and rounded to 16 bits. A
scheme computes ``low``, an approximation, and ``bound``, such that the sum before its rounding is within
``bound`` of ``low`` for every order of summation. Rounding is monotonic and the threshold is a number of the
type, so ``low + bound <= threshold`` proves that the neuron is inactive. All other neurons are candidates,
which have to be computed as the layer does.

A scheme may first take parts of the product apart that are cheap to compute as they are:

    x·w = m·w + y·c + y·v             y = x - m, v = w - c: m is the mean of the panel, c that of the neurons
    y·v = z·Vᵀ + (yʹU)·Vᵀ + yʹ·vʹ     yʹ = y - z Uᵀ, V = v U, vʹ = v - V Uᵀ: U (D, r) are r directions

and what is left goes through the low precision, in which p and q stand for y and v:

    y·v = p·q + y·(v - q) + (y - p)·q

The first term is computed. By Cauchy-Schwarz the others are at most |y| |v - q| + |y - p| |q|: of whole rows,
or summed over blocks of columns, which is never more and is itself a thin product. All of these norms are
measured, so that nothing is assumed of how a low-precision number was rounded.

To that come the errors of f32 sums, n ``_UNIT`` Σ|a_k b_k| <= n ``_UNIT`` |a| |b| for n terms in any order,
on both sides. ``_UNIT`` is twice the rounding unit of f32, since tensor cores truncate. Hopper sums products
of FP8 less precisely than in f32, by how much is not documented: for FP8 the bounds here are lower limits.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

Array = np.ndarray

_UNIT = 2.0**-23
_MORE_TERMS = 8  # roundings outside the sums: scales, differences stored in f32, the adding up of parts
_BOUND_ROUNDING = 2.0**-16  # of the bound itself, which is computed in f32 from at most D / _BLOCK blocks
_SMALLEST = 2.0**-126  # smaller numbers may be flushed to zero, those that enter a product too
_OVERFLOW = float(np.finfo(np.float32).max) / 4
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_BLOCK = 128
_DIRECTION_SHARE = 32
_POWER_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to compute gates in a low precision with a bound.

    Attributes:
      name: in words.
      type: int8, or FP8 with three bits of mantissa (e4m3); both multiply at twice the rate of bf16.
      terms: low-precision numbers that add up to one of x, each with a product of its own.
      blocks: whether scales and norms are those of blocks of 128 columns, and not of whole rows.
      centred: whether the means of the panel's tokens and of all neurons are taken apart.
      directions: whether products with the D / 32 largest directions of x are computed in bf16.
    """

    name: str
    type: Literal["int8", "fp8"] = "int8"
    terms: int = 1
    blocks: bool = False
    centred: bool = False
    directions: bool = False

    def product_time(self, d_model: int, d_ff: int, panel: int) -> float:
        """What its products take, as a share of the bf16 gate's, by FLOPs and the types' peak rates."""
        time = 0.5 * self.terms
        if self.blocks:
            time += 2 / block_size(d_model)  # two norms a block, in 16 bits
        if self.centred:
            time += 1 / panel  # m·w
        if self.directions:
            time += direction_count(d_model) * (1 / d_model + 2 / d_ff)  # z·Vᵀ; z and z Uᵀ
        return time


SCHEMES = (
    Scheme("FP8", type="fp8"),
    Scheme("int8"),
    Scheme("int8, x in two terms", terms=2),
    Scheme("int8, blocks", blocks=True),
    Scheme("int8, centred", centred=True),
    Scheme("int8, centred, blocks", centred=True, blocks=True),
    Scheme("int8, centred, directions", centred=True, directions=True),
)


def block_size(d_model: int) -> int:
    """Columns of a block: 128, or for other widths the largest power of two that divides them."""
    return math.gcd(d_model, _BLOCK)


def direction_count(d_model: int) -> int:
    """r, how many directions are taken apart: D / 32, at least one."""
    return max(1, d_model // _DIRECTION_SHARE)


def directions_of(x: Array) -> Array:
    """(D, r) f32: about the directions in which x (N, D) has most of its squares around its mean."""
    centred = x - x.mean(axis=0, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal((x.shape[1], direction_count(x.shape[1])))
    basis = start.astype(np.float32)
    for _ in range(_POWER_ROUNDS):
        basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
    return basis


def approximate(
    scheme: Scheme, x: Array, weight: Array, *, panel: int, directions: Array | None = None
) -> tuple[Array, Array]:
    """Low-precision gates of tokens x (N, D) and neurons (F, D), and their bounds: f32, both (N, F).

    Args:
      scheme: how.
      x: f32 that holds numbers of bf16; whole panels, one after the other.
      weight: likewise.
      panel: P, tokens of a panel.
      directions: (D, r) f32, for schemes that take directions apart. The bound holds for any; the better
        they are, the smaller it is.

    Raises:
      ValueError: N is no multiple of P, or there are no directions where the scheme needs them.
    """
    if len(x) % panel:
        raise ValueError(f"x must have whole panels of {panel} tokens; got {len(x)} tokens")
    if scheme.directions and directions is None:
        raise ValueError(f"the scheme {scheme.name!r} needs directions; got none")
    # Rows that are not finite, or so large that sums overflow, get a bound that is NaN or infinite.
    with np.errstate(all="ignore"):
        parts = _Parts(x, weight)
        y, v = x, weight
        if scheme.centred:
            y, v = parts.take_means(y, v, panel)
        if scheme.directions and directions is not None:
            y, v = parts.take_directions(y, v, directions)
        parts.take_low(y, v, scheme)
        return parts.low, parts.bound()


def candidates(low: Array, bound: Array, threshold: float) -> Array:
    """(N, F) bool: the gates that are not proven to be at or under the threshold; NaN is not."""
    with np.errstate(invalid="ignore"):
        return ~(low + bound <= np.float32(threshold))


def decided_active(low: Array, bound: Array, last_inactive: float) -> Array:
    """(N, F) bool: the gates that are proven to be above the largest number that is inactive."""
    with np.errstate(invalid="ignore"):
        return low - bound > np.float32(last_inactive)


class _Parts:
    """Of a product of x (N, D) and a weight (F, D): the sum of the parts that are computed, and the bounds of
    those that are not."""

    def __init__(self, x: Array, weight: Array) -> None:
        self.low = np.zeros((len(x), len(weight)), np.float32)
        self._left_out = np.zeros_like(self.low)
        self._magnitude = np.zeros_like(self.low)
        self._smallest = np.zeros_like(self.low)
        self._width = x.shape[1]
        self._sums(_norms(x), _norms(weight))  # the layer's own sum

    def bound(self) -> Array:
        sums = (self._width + _MORE_TERMS) * _UNIT * self._magnitude
        tiny = _MORE_TERMS * _SMALLEST * (self._width + math.sqrt(self._width) * self._smallest)
        bound = (1 + _BOUND_ROUNDING) * (self._left_out + sums + tiny)
        return np.where(self._magnitude < _OVERFLOW, bound, np.float32(np.inf))

    def take_means(self, x: Array, weight: Array, panel: int) -> tuple[Array, Array]:
        """Computes what the means of each panel and of all neurons contribute; returns x and w without."""
        means = _bf16(x.reshape(-1, panel, x.shape[1]).mean(axis=1, dtype=np.float64))
        mean_neuron = weight.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
        of_tokens = np.repeat(means, panel, axis=0)
        y, v = x - of_tokens, weight - mean_neuron
        self.low += np.repeat(means @ weight.T, panel, axis=0) + y @ mean_neuron.T
        self._sums(_norms(of_tokens), _norms(weight))
        self._sums(_norms(y), np.broadcast_to(_norms(mean_neuron), (len(v), 1)))
        self._sums(_norms(y), _norms(v))  # y and v are rounded to f32
        return y, v

    def take_directions(self, y: Array, v: Array, directions: Array) -> tuple[Array, Array]:
        """Computes what the directions contribute; returns y and v without."""
        basis = directions.astype(np.float64)
        along_y, along_v = _bf16(y @ basis), v @ basis
        short_v = _bf16(along_v)
        rest_y, rest_v = y - along_y @ basis.T, v - along_v @ basis.T
        self.low += along_y @ short_v.T
        self._bounded(_norms(along_y), _norms(along_v - short_v))
        self._bounded(_norms(rest_y @ basis), _norms(along_v))
        self._sums(_norms(along_y), _norms(short_v))
        self._sums(_norms(rest_y), _norms(rest_v))  # rounded to f32
        return rest_y.astype(np.float32), rest_v.astype(np.float32)

    def take_low(self, y: Array, v: Array, scheme: Scheme) -> None:
        """Computes the product of y and v in the low precision, and bounds what that leaves out."""
        block = block_size(self._width) if scheme.blocks else self._width
        q = _low_precision(v, scheme.type, block)
        rest = y
        for _ in range(scheme.terms):
            p = _low_precision(rest, scheme.type, block)
            rest = rest - p
            self.low += p @ q.T
            self._sums(_norms(p), _norms(q))
        self._sums(_norms(y), _norms(v))  # the differences are rounded to f32
        self._bounded(_norms(y, block), _norms(v - q, block))
        self._bounded(_norms(rest, block), _norms(q, block))

    def _bounded(self, a: Array, b: Array) -> None:
        """A product that is left out, of rows with norms a (N, blocks) and b (F, blocks)."""
        self._left_out += a @ b.T

    def _sums(self, a: Array, b: Array) -> None:
        """A product that is computed in f32, of rows with norms a (N, 1) and b (F, 1)."""
        self._magnitude += a @ b.T
        self._smallest += a + b.T


def _norms(rows: Array, block: int | None = None) -> Array:
    """(N, blocks) f32, rounded from f64: of each row, or of each block of its columns."""
    parts = rows.reshape(len(rows), -1, block or rows.shape[1])
    squares = np.einsum("nbk,nbk->nb", parts, parts, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)


def _low_precision(rows: Array, type: str, block: int) -> Array:
    """The numbers of a type, with a scale for each block of a row, that are nearest to rows: as f32."""
    parts = rows.reshape(len(rows), -1, block)
    largest = _LARGEST[type]
    scale = (np.abs(parts).max(axis=2, keepdims=True) / largest).astype(np.float32)
    units = np.clip(np.where(scale > 0, parts / scale, 0 * parts), -largest, largest)
    short = np.rint(units) if type == "int8" else units.astype(jnp.float8_e4m3fn).astype(np.float32)
    return (short * scale).astype(np.float32).reshape(rows.shape)


def _bf16(rows: Array) -> Array:
    """f32 that holds the nearest numbers of bf16."""
    return rows.astype(np.float32).astype(jnp.bfloat16).astype(np.float32)


def mean_union(mask: Array, panel: int) -> float:
    """The share of the neurons that some token of a panel of P sets, of mask (N, F); the mean over panels."""
    return float(mask.reshape(-1, panel, mask.shape[1]).any(axis=1).mean())
