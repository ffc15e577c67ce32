"""Norms, sums and copies that read rows by index, in Pallas Triton: one pass over memory each.

Why they exist. A row of a few KiB is as fast to read by its index as in sequence, so that a permutation costs
nothing inside a pass that reads or writes the rows anyway. XLA gathers what its norm has written in a pass
of its own; and where what it gathers is computed in the same program, XLA may compute it twice, from operands
that it then reads twice. Bytes of M rows of D, in units of M D times the type's size:

| | here | XLA |
|---|---|---|
| ``rms_norm(x)[order]`` | 2 | 4, and 3 where it is differentiated |
| ``x + y[inverse]`` | 3 | 3 |
| ``dy[order]`` | 2 | up to 1 and as many as dy has operands |
| backward of ``x, rms_norm(x)[order]`` | 4, and ``4 / ROWS`` in 16 bits for the scale's gradient | 6 |

**Numerics.** f32 inside, rounded once: also the sum of the two cotangents of x, which autodiff rounds twice.
The scale's gradient is summed over ``ROWS`` rows in sequence, and then over those sums.

**Limits.** An NVIDIA GPU of compute capability 8.0 or newer; D up to ``WIDEST``, since a program holds whole
rows in registers; fewer than 2^31 values, since they are counted in int32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.common import varying_axes

WIDEST = 16384
ROWS = 16
"""Rows of one program of the norm's backward."""
_VALUES_PER_WARP = 512


def norm_rows(
    x: jax.Array,
    scale: jax.Array,
    order: jax.Array,
    *,
    eps: float,
    dtype: DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """``rms_norm(x)[order]`` of x (M, D), a scale (D,) and order (M,) int32: (M, D) in ``dtype``."""
    return _call(
        partial(_norm_kernel, eps=eps),
        varying_axes.output(x, x.shape, dtype),
        x.shape[0],
        x.shape[1],
        interpret,
        "norm_rows",
    )(x, scale, order)


def _norm_kernel(x_ref, scale_ref, order_ref, y_ref, *, eps):
    row, columns = pl.program_id(0), _columns(x_ref)
    x = _row(x_ref, order_ref[row], columns)
    y = x * lax.rsqrt(jnp.sum(x * x) / x_ref.shape[1] + eps) * _vector(scale_ref, columns)
    _store(y_ref, row, columns, y)


def norm_rows_backward(
    x: jax.Array,
    scale: jax.Array,
    inverse: jax.Array,
    dx: jax.Array,
    dy: jax.Array,
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of x (M, D) and the scale (D,), where x itself and `norm_rows` of it have been used.

    Args:
      x, scale: of the forward.
      inverse: (M,) int32, the place of each row of x in the order.
      dx: (M, D), cotangent of x.
      dy: (M, D), cotangent of the norm, in the order.
      eps: of the forward.
      interpret: run the kernel on any device, slowly.

    Returns:
      (M, D) in x's type and (D,) f32.
    """
    tokens, d_model = x.shape
    programs = pl.cdiv(tokens, ROWS)
    given, dscale = _call(
        partial(_norm_backward_kernel, eps=eps),
        (
            varying_axes.output(x, x.shape, x.dtype),
            varying_axes.output(x, (programs, d_model), jnp.float32),
        ),
        programs,
        d_model,
        interpret,
        "norm_rows_backward",
    )(x, scale, inverse, dx, dy)
    return given, jnp.sum(dscale, axis=0)


def _norm_backward_kernel(x_ref, scale_ref, inverse_ref, dx_ref, dy_ref, given_ref, dscale_ref, *, eps):
    """With ``n = x r``, r the inverse root, and ``g = scale dy``: ``dx + r (g - n mean(g n))``."""
    program, columns = pl.program_id(0), _columns(x_ref)
    tokens, d_model = x_ref.shape
    scale, first = _vector(scale_ref, columns), program * ROWS

    def one(row, total):
        x, dy = _row(x_ref, row, columns), _row(dy_ref, inverse_ref[row], columns)
        root = lax.rsqrt(jnp.sum(x * x) / d_model + eps)
        normed, along = x * root, dy * scale
        through = root * (along - normed * (jnp.sum(along * normed) / d_model))
        _store(given_ref, row, columns, _row(dx_ref, row, columns) + through)
        return total + dy * normed

    zeros = jnp.zeros(columns.shape, jnp.float32)
    total = lax.fori_loop(first, jnp.minimum(first + ROWS, tokens), one, zeros)
    _store(dscale_ref, program, columns, total)


def take_rows(
    y: jax.Array,
    order: jax.Array,
    x: jax.Array | None = None,
    *,
    factor: float = 1.0,
    dtype: DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """``factor * y[order]``, or ``x + factor * y[order]``: x and y (M, D), order (M,) int32, to (M, D) in
    ``dtype``. The product is rounded to y's type before the sum."""
    operands = (y, order) if x is None else (y, order, x)
    return _call(
        partial(_take_kernel, factor=factor),
        varying_axes.output(y, y.shape, dtype),
        y.shape[0],
        y.shape[1],
        interpret,
        "take_rows" if x is None else "add_rows",
    )(*operands)


def _take_kernel(y_ref, order_ref, *refs, factor):
    *x_refs, out_ref = refs
    row, columns = pl.program_id(0), _columns(y_ref)
    y = _row(y_ref, order_ref[row], columns)
    if factor != 1:
        y = (factor * y).astype(y_ref.dtype).astype(jnp.float32)
    for x_ref in x_refs:
        y += _row(x_ref, row, columns)
    _store(out_ref, row, columns, y)


def _call(kernel, outputs, programs: int, d_model: int, interpret: bool, name: str):
    warps = pl.next_power_of_2(pl.cdiv(d_model, _VALUES_PER_WARP))
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(programs,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=min(warps, 16), num_stages=1),
        name=name,
    )


def _columns(ref):
    return lax.iota(jnp.int32, pl.next_power_of_2(ref.shape[1]))


def _inside(ref, columns):
    """The mask of a row's columns; None where no column is beyond its end."""
    return None if columns.shape[0] == ref.shape[-1] else columns < ref.shape[-1]


def _row(ref, row, columns):
    """A row of a matrix in f32, zero beyond its end."""
    mask = _inside(ref, columns)
    other = None if mask is None else 0
    return plt.load(ref.at[row, columns], mask=mask, other=other).astype(jnp.float32)


def _vector(ref, columns):
    mask = _inside(ref, columns)
    return plt.load(ref.at[columns], mask=mask, other=None if mask is None else 0).astype(jnp.float32)


def _store(ref, row, columns, value):
    plt.store(ref.at[row, columns], value.astype(ref.dtype), mask=_inside(ref, columns))
