"""The output head and the cross-entropy of the next token in one, chunk by chunk of the tokens.

The plain form makes logits (M, V) in f32, their softmax and its gradient: at 16,384 tokens and a
vocabulary of 49,152 these are 3.2 GB each. And since its cotangent is f32, so are the operands of the two
products of its backward. Here the logits of one chunk of tokens exist at a time.

The loss is a scalar, so its cotangent only scales the gradients. A forward that is differentiated therefore
makes them right away, while a chunk's logits are there, and nothing is computed twice (three products of
2 M V D FLOPs, as in the plain form):

    logits = x W^T          f32 sums of products in the compute type
    lse    = logsumexp(logits)
    dlogits = (1 + 2 z lse) softmax(logits) - onehot(target)      f32, rounded once to the compute type
    dx = dlogits W,  dW += dlogits^T x                            f32 sums; dx is rounded once, dW stays f32

Memory beside x, W and their gradients: `CHUNK_BYTES` of f32 logits, and dlogits of as many elements. Each
chunk reads and writes dW (8 V D bytes) once, which is why chunks are not as small as they could be.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from pallas_kernels.common import varying_axes
from sparse_lm.ffn import batch_split

CHUNK_BYTES = 512 * 2**20
"""Most bytes of f32 logits that exist at a time on a device: 2,048 tokens of a vocabulary of 49,152. On an
H100 half as many take a tenth longer, since dW is read and written more often; twice as many save 1 %."""


def cross_entropy(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Mean over all tokens of ``-ln softmax(hidden weight^T)[target] + z_loss * lse^2``.

    Differentiable in ``hidden`` and ``weight``, once and in reverse mode. Under an ambient mesh each device
    computes its own rows of the batch, or all of them where the number of devices does not divide B, and the
    result is of the whole batch, as are gradients; inside ``shard_map`` and ``pmap`` both are of the local
    tokens. On axes of type Explicit the rows are split as those of ``hidden`` are.

    Args:
      hidden: (B, S, D) in the compute type.
      weight: (V, D) of the output head, rounded to the compute type; its gradient is summed in f32.
      targets: (B, S) int32.
      z_loss: coefficient of the mean square of lse, the logarithm of the softmax's normaliser
        (arXiv 2204.02311).

    Returns:
      The loss, () f32, and the cross-entropy in nats per token alone, () f32, a figure that has no gradient.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    if hidden.ndim != 3 or hidden.shape[:2] != targets.shape or hidden.shape[2:] != weight.shape[1:]:
        raise ValueError(
            "cross_entropy expected hidden (B, S, D), weight (V, D) and targets (B, S); "
            f"got {hidden.shape}, {weight.shape} and {targets.shape}"
        )
    # Out here, so that the transposes of these casts sum gradients over the axes and place them as the arrays
    # are.
    hidden, weight, targets = varying_axes.vary_alike(*_split_by_rows(hidden, weight, targets))
    loss, ce = _cross_entropy(z_loss, hidden, weight, targets)
    return loss, lax.stop_gradient(ce)


def _split_by_rows(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """On mesh axes of type Explicit, the arrays split as `_over_devices` takes them."""
    mesh = jax.sharding.get_abstract_mesh()
    split = batch_split(mesh, hidden, None)
    if split is None or AxisType.Explicit not in mesh.axis_types:
        return hidden, weight, targets
    hidden, targets = jax.sharding.reshard((hidden, targets), split)
    return hidden, jax.sharding.reshard(weight, PartitionSpec()), targets


def log_likelihoods(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``ln softmax(hidden weight^T)[target]`` (...) f32, and whether the target is the most likely token.

    On mesh axes of type Explicit each device computes its own rows of the first axis, split as those of
    ``hidden`` are, and the results are split like them.

    Args:
      hidden: (..., D) in the compute type.
      weight: (V, D) of the output head, rounded to the compute type.
      targets: (...) int32.
    """
    weight = weight.astype(hidden.dtype)  # before it moves between devices
    mesh = jax.sharding.get_abstract_mesh()
    split = batch_split(mesh, hidden, None) if hidden.ndim > 1 else PartitionSpec()
    if split is None or AxisType.Explicit not in mesh.axis_types:
        return _log_likelihoods(hidden, weight, targets)
    return jax.shard_map(
        _log_likelihoods, in_specs=(split, PartitionSpec(), split), out_specs=(split, split)
    )(*_split_by_rows(hidden, weight, targets))


def _log_likelihoods(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log_likelihoods` on one device, of a weight in the compute type."""

    def chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, target = inputs
        logits = _logits(x, weight)
        return _picked(logits, target) - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == target

    chunks = _chunks(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weight.shape[0])
    log_p, most_likely = (values.reshape(-1)[: targets.size] for values in lax.map(chunk, chunks[:2]))
    return log_p.reshape(targets.shape), most_likely.reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    z_loss: float, hidden: jax.Array, weight: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (loss, ce), _ = _over_devices(z_loss, hidden, weight, targets, differentiated=False)
    return loss, ce


def _forward(z_loss, hidden, weight, targets):
    outputs, gradients = _over_devices(z_loss, hidden, weight, targets, differentiated=True)
    return outputs, (*gradients, jnp.zeros((0,), weight.dtype))


def _backward(z_loss, saved, cotangents):
    dx, dw, like_weight = saved
    scale = cotangents[0] / _headroom(dx.dtype, dx.shape[0] * dx.shape[1])
    return (dx.astype(jnp.float32) * scale).astype(dx.dtype), (dw * scale).astype(like_weight.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _over_devices(
    z_loss: float, hidden: jax.Array, weight: jax.Array, targets: jax.Array, *, differentiated: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Loss and cross-entropy of the whole batch; dx and dW times `_headroom`, if wanted."""
    tokens = targets.size
    local = partial(_local, z_loss=z_loss, tokens=tokens, differentiated=differentiated)
    weight = weight.astype(hidden.dtype)  # before it moves between devices
    split = batch_split(jax.sharding.get_abstract_mesh(), hidden, None)
    if split is None:
        sums, gradients = local(hidden, weight, targets)
    else:
        axes = split[0] if len(split) else ()

        def on_device(*arrays):
            sums, gradients = local(*arrays)
            return lax.psum(sums, axes), (*gradients[:1], *lax.psum(gradients[1:], axes))

        specs = (split, PartitionSpec()) if differentiated else ()
        sums, gradients = jax.shard_map(
            on_device,
            in_specs=(split, PartitionSpec(), split),
            out_specs=(PartitionSpec(), specs),
            check_vma=False,  # the backward is not derived from this
        )(hidden, weight, targets)
    ce, squares = (value / tokens for value in sums)
    return (ce + z_loss * squares if z_loss else ce, ce), gradients


def _local(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    z_loss: float,
    tokens: int,
    differentiated: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """One device's sums of the cross-entropy and of lse^2; dx (B, S, D) and its share of dW (V, D) f32."""
    vocab_size, width = weight.shape
    factor = _headroom(hidden.dtype, tokens) / tokens

    def chunk(carry, inputs):
        ce, squares, dw = carry
        x, target, counted = inputs
        logits = _logits(x, weight)
        lse = _logsumexp(logits)
        ce += jnp.sum(jnp.where(counted, lse - _picked(logits, target), 0.0))
        squares += jnp.sum(jnp.where(counted, lse * lse, 0.0))
        if not differentiated:
            return (ce, squares, dw), None
        row = jnp.where(counted, factor, 0.0)[:, None]
        slope = (1.0 + 2.0 * z_loss * lse)[:, None] if z_loss else 1.0
        is_target = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
        onehot = is_target.astype(jnp.float32)
        dlogits = (row * (slope * jnp.exp(logits - lse[:, None]) - onehot)).astype(x.dtype)
        dx = lax.dot_general(dlogits, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dw += lax.dot_general(dlogits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (ce, squares, dw), dx.astype(x.dtype)

    chunks = _chunks(hidden.reshape(-1, width), targets.reshape(-1), vocab_size)
    start = jnp.float32(0), jnp.float32(0), jnp.zeros(weight.shape, jnp.float32) if differentiated else None
    (ce, squares, dw), dx = lax.scan(chunk, varying_axes.vary_with(hidden, start), chunks)
    if not differentiated:
        return (ce, squares), ()
    return (ce, squares), (dx.reshape(-1, width)[: targets.size].reshape(hidden.shape), dw)


def _chunks(x: jax.Array, targets: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (N, C, D), targets (N, C) and which rows count (N, C), of N chunks that hold all M tokens."""
    tokens = len(targets)
    most = max(16, CHUNK_BYTES // (4 * vocab_size))
    most = 1 << (most.bit_length() - 1)  # whole tiles of the products
    number = max(1, -(-tokens // most))
    size = -(-tokens // number)
    if number > 1:
        size = -(-size // 16) * 16
    padding = number * size - tokens
    counted = jnp.arange(number * size, dtype=jnp.int32) < tokens
    if padding:
        x, targets = jnp.pad(x, ((0, padding), (0, 0))), jnp.pad(targets, (0, padding))
    parts = number, size
    return x.reshape(*parts, -1), targets.reshape(parts), counted.reshape(parts)


def _logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _logsumexp(logits: jax.Array) -> jax.Array:
    """(C, V) f32 to (C,), in one pass over the logits; the usual form makes one for the maximum first."""

    def combine(a, b):
        greatest = jnp.maximum(a[0], b[0])
        return greatest, a[1] * jnp.exp(a[0] - greatest) + b[1] * jnp.exp(b[0] - greatest)

    operands = logits, jnp.ones_like(logits)
    start = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    greatest, total = lax.reduce(operands, start, combine, (1,))
    return greatest + jnp.log(total)


def _picked(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def _headroom(dtype: DTypeLike, tokens: int) -> float:
    """Factor of the gradients until the cotangent is known, a power of two, which rounds nothing.

    Those of a mean over many tokens are below float16's least number, and the cotangent of a scaled loss
    would make up for that too late.
    """
    return float(2 ** math.ceil(math.log2(tokens))) if dtype == jnp.float16 else 1.0
