"""What stands before and behind a layer that takes its tokens in another order, each as one pass over memory.

    x, entering = gathered_norm(x, scale, order, eps=1e-6, dtype=x.dtype)   # rms_norm(x)[order]
    y, stats = ffn(entering)                                                # in the order
    x = add_scattered(x, y, order)                                          # x + y[inverse]

The values are those of ``order.gather(rms_norm(x))`` and ``x + order.scatter(y)``. On NVIDIA GPUs the kernels
of `pallas_kernels.rows` compute them; the permutation is then part of a pass that the norm and the sum need
anyway, forward and backward. Elsewhere XLA compiles the two expressions. Like all that has to do with orders
it works on local arrays: under an ambient mesh, wrap it in `sparse_lm.ffn.over_local_tokens`.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import device as device_lib
from pallas_kernels import dispatch
from pallas_kernels.common import platforms, varying_axes
from pallas_kernels.errors import RequestError
from pallas_kernels.rows import pallas_triton as rows
from pallas_kernels.rows import pallas_triton_nearest as nearest
from sparse_lm import clusters
from sparse_lm.layers import rms_norm, scaled
from sparse_lm.order import Permutation

Backend = Literal["auto", "triton", "interpret", "xla"]

_LARGEST = 2**31


def gathered_norm(
    x: jax.Array,
    scale: jax.Array,
    order: Permutation,
    *,
    eps: float,
    dtype: DTypeLike,
    backend: Backend = "auto",
) -> tuple[jax.Array, jax.Array]:
    """x as it is, and its `rms_norm` in an order.

    Use the x that is returned in place of the one that was given: the cotangent of what follows then comes
    back through it, and the pass that computes the norm's adds the two.

    Args:
      x: (..., D).
      scale: (D,).
      order: of the tokens (...).
      eps: added to the mean square.
      dtype: type of the norm.
      backend: ``"auto"``: Triton on NVIDIA GPUs, for types up to 32 bits, else XLA; ``"interpret"`` runs the
        Triton kernels slowly on any device.

    Raises:
      ValueError: x has other tokens than the order, the scale another width than x, or the backend cannot
        run here.
    """
    order.check(x)
    _check_width("scale", scale, (x.shape[-1],))
    backend = _choose(backend, x)
    if backend == "xla":
        return x, order.gather(rms_norm(x, scale, eps=eps, dtype=dtype))
    call = _NormCall(backend, eps, jnp.dtype(dtype))
    places = order.order.reshape(-1), order.inverse.reshape(-1)
    same, normed = _gathered_norm(call, *varying_axes.vary_alike(_flat(x), scale, *places))
    return same.reshape(x.shape), normed.reshape(x.shape)


def add_scattered(
    x: jax.Array, y: jax.Array, order: Permutation, *, factor: float = 1.0, backend: Backend = "auto"
) -> jax.Array:
    """``x + factor * y``, for x in the tokens' own order and y in another.

    Args:
      x: (..., D).
      y: (..., D), in the order.
      order: of the tokens (...).
      factor: the product is computed in f32 and rounded to y's type.
      backend: as in `gathered_norm`.

    Raises:
      ValueError: y has other tokens than the order, x is of another shape than y, or the backend cannot run
        here.
    """
    order.check(y)
    if x.shape != y.shape:
        raise ValueError(f"x and y must be of one shape; got {x.shape} and {y.shape}")
    backend = _choose(backend, x, y)
    if backend == "xla":
        return x + scaled(order.scatter(y), factor)
    call = _AddCall(backend, factor, x.dtype, y.dtype)
    places = order.order.reshape(-1), order.inverse.reshape(-1)
    return _add_scattered(call, *varying_axes.vary_alike(_flat(x), _flat(y), *places)).reshape(x.shape)


def nearest_to_norm(
    x: jax.Array,
    scale: jax.Array,
    centroids: jax.Array,
    *,
    eps: float,
    dtype: DTypeLike,
    backend: Backend = "auto",
) -> jax.Array:
    """The index of the centroid (K, D) that is nearest to `rms_norm` of each x (..., D): (...) int32.

    ``clusters.nearest(rms_norm(x), centroids)`` up to rounding, in one pass over x. Not differentiated.

    Raises:
      ValueError: scale or centroids have another width than x, or the backend cannot run here.
    """
    _check_width("scale", scale, (x.shape[-1],))
    _check_width("centroids", centroids, (centroids.shape[0], x.shape[-1]))
    fits = x.dtype.itemsize == 2 and len(centroids) <= nearest.MOST_CENTROIDS
    backend = _choose(backend, x) if fits or backend != "auto" else "xla"

    def plain(x, scale, centroids):
        return clusters.nearest(rms_norm(x, scale, eps=eps, dtype=dtype), centroids)

    def kernel(x, scale, centroids):
        half_squares = 0.5 * jnp.sum(jnp.square(centroids), axis=1)
        scaled_centroids = (centroids * scale[None, :]).astype(x.dtype)
        return nearest.nearest_rows(
            x, scaled_centroids, half_squares, eps=eps, interpret=backend == "interpret"
        )

    if backend == "xla":
        return plain(x, scale, centroids)
    arguments = varying_axes.vary_alike(_flat(x), scale, centroids.astype(jnp.float32))
    return _run(kernel, plain, backend, *arguments).reshape(x.shape[:-1])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _check_width(name: str, array: jax.Array, wanted: tuple[int, ...]) -> None:
    if array.shape != wanted:
        raise ValueError(f"{name} must have the width of x, shape {wanted}; got {array.shape}")


def _choose(backend: Backend, *arrays: jax.Array) -> Backend:
    if backend not in get_args(Backend):
        raise RequestError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    reason = dispatch.device_reason("triton", device_lib.current())
    if backend == "xla" or (backend == "auto" and reason is not None):
        return "xla"
    if any(x.size == 0 for x in arrays):
        return "xla"
    fit = all(
        jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize in (2, 4)
        and x.shape[-1] <= rows.WIDEST
        and isinstance(x.size, int)  # a symbol where the call is exported for any number of tokens
        and x.size < _LARGEST
        for x in arrays
    )
    if backend == "auto":
        return "triton" if fit else "xla"
    if not fit:
        raise RequestError(
            f"backend={backend!r} takes floating types of 16 or 32 bits, up to {rows.WIDEST:,} wide, of less "
            f"than 2^31 elements; got {', '.join(f'{x.dtype} {x.shape}' for x in arrays)}: use 'auto'"
        )
    if backend == "triton" and reason is not None:
        raise RequestError(reason)
    return backend


def _run(kernels, instead, backend: str, *arguments):
    with jax.enable_x64(False):  # the kernels count rows in int32
        return platforms.where_kernels_run(kernels, instead, backend, *arguments)


class _NormCall(NamedTuple):
    backend: str
    eps: float
    dtype: jnp.dtype

    def plain(self, x, scale, order):
        return x, rms_norm(x, scale, eps=self.eps, dtype=self.dtype)[order]

    @property
    def options(self):
        return {"eps": self.eps, "interpret": self.backend == "interpret"}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered_norm(call: _NormCall, x, scale, order, inverse):
    kernel = partial(rows.norm_rows, dtype=call.dtype, **call.options)
    normed = _run(kernel, lambda *given: call.plain(*given)[1], call.backend, x, scale, order)
    return x, normed


def _gathered_norm_forward(call, x, scale, order, inverse):
    return _gathered_norm(call, x, scale, order, inverse), (x, scale, order, inverse)


def _gathered_norm_backward(call, kept, cotangents):
    def kernel(x, scale, order, inverse, dx, dy):
        dx, dscale = rows.norm_rows_backward(x, scale, inverse, dx, dy, **call.options)
        return dx, dscale.astype(scale.dtype)

    def plain(x, scale, order, inverse, dx, dy):
        return jax.vjp(partial(call.plain, order=order), x, scale)[1]((dx, dy))

    dx, dscale = _run(kernel, plain, call.backend, *kept, *cotangents)
    return dx, dscale, None, None


_gathered_norm.defvjp(_gathered_norm_forward, _gathered_norm_backward)


class _AddCall(NamedTuple):
    backend: str
    factor: float
    x_dtype: jnp.dtype
    y_dtype: jnp.dtype


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_scattered(call: _AddCall, x, y, order, inverse):
    def kernel(x, y, inverse):
        dtype = jnp.result_type(x, y)
        return rows.take_rows(y, inverse, x, dtype=dtype, factor=call.factor, interpret=_interpreted(call))

    def plain(x, y, inverse):
        return x + scaled(y[inverse], call.factor)

    return _run(kernel, plain, call.backend, x, y, inverse)


def _add_scattered_forward(call, x, y, order, inverse):
    return _add_scattered(call, x, y, order, inverse), order


def _add_scattered_backward(call, order, given):
    def kernel(given, order):
        return rows.take_rows(
            given, order, dtype=call.y_dtype, factor=call.factor, interpret=_interpreted(call)
        )

    def plain(given, order):
        return scaled(given.astype(call.y_dtype), call.factor)[order]

    dy = _run(kernel, plain, call.backend, given, order)
    return given.astype(call.x_dtype), dy, None, None


_add_scattered.defvjp(_add_scattered_forward, _add_scattered_backward)


def _interpreted(call: _AddCall) -> bool:
    return call.backend == "interpret"
