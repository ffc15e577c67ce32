"""What stands between the kernels of a decode step in Pallas Triton: projections, and sums with a norm.

Why they exist. A projection of a few tokens takes the time of reading its weight; `decode_project` streams it
past tokens that are padded to what a tensor core takes, so that a row's result is the same among 3 to 16
rows (one or two have kernels without tensor cores). `add_norm` is one launch for a residual sum and the norm
that reads it, where XLA has two or three.

**Numerics.** f32 accumulation, one rounding to the output type; the residual sum is rounded to the input type
before the norm reads it, and the norm's result is rounded once.

**Limits.** An NVIDIA GPU of compute capability 8.0 or newer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.common import varying_axes
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.config import TilesConfig
from pallas_kernels.decode.pallas_triton_rows import rows_project
from pallas_kernels.decode.pallas_triton_tiles import products
from pallas_kernels.decode.residual import Normed, Residual, Stream


def decode_project(
    x: jax.Array | Normed,
    weight: jax.Array,
    *,
    dtype: DTypeLike | None = None,
    config: TilesConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``x W^T`` for x (M, D) and W (O, D): (M, O) in x's type, or in ``dtype``.

    Raises:
      ValueError: more tokens than `ROWS_TOKENS` of a `Normed`, a `Normed` with a config, or a config whose
        programs do not have all outputs.
    """
    tokens, outputs = x.shape[0], weight.shape[0]
    dtype = x.dtype if dtype is None else dtype
    if tokens <= configs.ROWS_TOKENS and config is None:
        rows = configs.choose_rows(x)
        return rows_project(x, weight, dtype=dtype, config=rows, interpret=interpret)
    if isinstance(x, Normed):
        raise ValueError(
            f"a norm is applied to at most {configs.ROWS_TOKENS} tokens on their way, without a config; got "
            f"{tokens} tokens {'without a config' if config is None else f'and {config}'}"
        )
    config = configs.choose_project(x, outputs) if config is None else config
    return pl.pallas_call(
        partial(_project_kernel, config=config, owned=config.owned(outputs)),
        out_shape=varying_axes.output(x, (tokens, outputs), dtype),
        grid=(config.programs, pl.cdiv(tokens, config.rows)),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="decode_project",
    )(x, weight)


def project_onto(
    onto: Residual, x: jax.Array | Normed, weight: jax.Array, *, interpret: bool = False
) -> Stream:
    """`decode_project` of one or two tokens to the width of a residual stream, added to that."""
    rows = configs.choose_rows(x)
    return rows_project(x, weight, onto, dtype=x.dtype, config=rows, interpret=interpret)


def _project_kernel(x_ref, w_ref, y_ref, *, config, owned):
    rows = pl.program_id(1) * config.rows + lax.iota(jnp.int32, config.rows)
    own = lax.iota(jnp.int32, config.tile)
    outputs = pl.program_id(0) * owned + own
    row_here, output_here = rows < x_ref.shape[0], (own < owned) & (outputs < w_ref.shape[0])
    groups, sizes = [(outputs, output_here)], {"tile_k": config.tile_k, "chains": config.chains}
    (y,) = products(w_ref, groups, x_ref, rows, row_here, **sizes)
    mask = output_here[:, None] & row_here[None, :]
    plt.store(y_ref.at[rows[None, :], outputs[:, None]], y.astype(y_ref.dtype), mask=mask)


def add_norm(
    x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """x + y (M, D) in x's type, and ``RMSNorm`` of that with a scale (D,) f32, in x's type."""
    return pl.pallas_call(
        partial(_add_norm_kernel, eps=eps),
        out_shape=(varying_axes.output(x, x.shape, x.dtype),) * 2,
        grid=(x.shape[0],),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        name="decode_add_norm",
    )(x, y, scale)


def _add_norm_kernel(x_ref, y_ref, scale_ref, sum_ref, normed_ref, *, eps):
    row, d_model = pl.program_id(0), x_ref.shape[1]
    columns = lax.iota(jnp.int32, pl.next_power_of_2(d_model))
    inside = columns < d_model
    terms = [plt.load(ref.at[row, columns], mask=inside, other=0) for ref in (x_ref, y_ref)]
    total = sum(term.astype(jnp.float32) for term in terms).astype(x_ref.dtype)
    plt.store(sum_ref.at[row, columns], total, mask=inside)
    wide = total.astype(jnp.float32)
    mean_square = jnp.sum(wide * wide) / d_model
    scale = plt.load(scale_ref.at[columns], mask=inside, other=0)
    normed = wide * lax.rsqrt(mean_square + eps) * scale
    plt.store(normed_ref.at[row, columns], normed.astype(normed_ref.dtype), mask=inside)
