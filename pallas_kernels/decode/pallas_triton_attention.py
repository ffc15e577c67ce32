"""Attention of one new token a row to its cache, in Pallas Triton: one kernel where XLA has ten.

Why it exists. At one query the keys and values of a row, 4 C K H bytes in 16 bits for a context of C, are
read once, which takes less time than the launches of rotation, two cache writes, scores, softmax and sums
apart. And it reads the filled part of the cache only, where a product of fixed shape reads all of its
capacity.

**`decode_attention`**: one program for each row and key/value head. It rotates its queries and its new
key, writes key and value to their place in the cache, which it updates in place, and goes over the positions
before with a running softmax. The new position takes part from registers, so no read waits for the write.

**Numerics.** Scores, softmax and sums are f32; rotated queries and keys, and the weights of the values, are
rounded to the input type. f32 inputs multiply as IEEE f32.

**Limits.** Heads of 32, 64, 128 or 256; an NVIDIA GPU of compute capability 8.0 or newer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels import device as device_lib
from pallas_kernels.common import varying_axes
from pallas_kernels.common.products import CONTRACT_FIRST, CONTRACT_LAST, dot
from pallas_kernels.device import Device

_LEAST_ROWS = 16
_STAGES = 3
_SHARED_MEMORY_ROOM = 24 * 1024  # for queries, weights and the compiler's own
HEAD_DIMS = (32, 64, 128, 256)


def decode_attention(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax attention of each row's new token to itself and to what its cache holds.

    Args:
      qkv: (B, (N + 2 K) H), queries, keys and values of the new tokens, not rotated yet.
      keys, values: (B, C, K, H) of qkv's type; donate them, and they are updated in place.
      lengths: (B,) int32, positions filled before; a row whose cache is full attends to all of it and to the
        new token, which is not kept.
      cos, sin: (B, H / 2) f32, of the new tokens' angles.

    Returns:
      (B, N H) in qkv's type, and the keys and values with the new ones at ``lengths``.
    """
    batch, capacity, kv_heads, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    block = min(positions(head_dim, qkv.dtype), max(_LEAST_ROWS, pl.next_power_of_2(capacity)))
    return pl.pallas_call(
        partial(_kernel, heads=heads, block=block),
        out_shape=(
            varying_axes.output(qkv, (batch, heads * head_dim), qkv.dtype),
            varying_axes.output(qkv, keys.shape, keys.dtype),
            varying_axes.output(qkv, values.shape, values.dtype),
        ),
        grid=(kv_heads, batch),
        input_output_aliases={1: 1, 2: 2},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="decode_attention",
    )(qkv, keys, values, lengths, cos, sin)


def positions(head_dim: int, dtype: DTypeLike, device: Device | None = None) -> int:
    """Positions of the cache that a program reads at a time: as many as the shared memory of ``device``, by
    default the present one, has room for."""
    device = device_lib.current() if device is None else device
    itemsize = jnp.dtype(dtype).itemsize
    block = 128 if head_dim <= 64 and itemsize == 2 else 32
    # Keys and values of all stages but the one that is computed with.
    in_flight = 2 * (_STAGES - 1) * head_dim * itemsize
    while block > _LEAST_ROWS and block * in_flight > device.shared_memory - _SHARED_MEMORY_ROOM:
        block //= 2
    return block


def _kernel(
    qkv_ref,
    keys_ref,
    values_ref,
    lengths_ref,
    cos_ref,
    sin_ref,
    y_ref,
    new_keys_ref,
    new_values_ref,
    *,
    heads,
    block,
):
    _, capacity, kv_heads, head_dim = keys_ref.shape
    kv_head, row = pl.program_id(0), pl.program_id(1)
    group, half, dtype = heads // kv_heads, head_dim // 2, qkv_ref.dtype
    padded = max(_LEAST_ROWS, pl.next_power_of_2(group))
    first, whole = lax.iota(jnp.int32, half), lax.iota(jnp.int32, head_dim)
    cos, sin = plt.load(cos_ref.at[row, first]), plt.load(sin_ref.at[row, first])
    length = lengths_ref[row]
    filled = jnp.minimum(length, capacity)

    within = lax.iota(jnp.int32, padded)
    here = within < group
    starts = ((kv_head * group + within) * head_dim)[:, None]
    halves = [
        plt.load(
            qkv_ref.at[row, starts + part[None, :]],
            mask=jnp.broadcast_to(here[:, None], (padded, half)),
            other=0,
        ).astype(jnp.float32)
        for part in (first, first + half)
    ]
    query = _rotated(halves, cos[None, :], sin[None, :], dtype)

    start = (heads + kv_head) * head_dim
    halves = [plt.load(qkv_ref.at[row, start + part]).astype(jnp.float32) for part in (first, first + half)]
    key = _rotated(halves, cos, sin, dtype)
    value = plt.load(qkv_ref.at[row, start + kv_heads * head_dim + whole])

    @pl.when(length < capacity)
    def write():
        plt.store(new_keys_ref.at[row, length, kv_head, first], key[0])
        plt.store(new_keys_ref.at[row, length, kv_head, first + half], key[1])
        plt.store(new_values_ref.at[row, length, kv_head, whole], value)

    scale = head_dim**-0.5
    of_new = sum(
        jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None, :], axis=1)
        for q, k in zip(query, key, strict=True)
    )
    state = (
        of_new * scale,
        jnp.ones((padded,), jnp.float32),
        jnp.broadcast_to(value.astype(jnp.float32)[None, :], (padded, head_dim)),
    )

    def step(nth, state):
        highest, total, sums = state
        positions = nth * block + lax.iota(jnp.int32, block)
        inside = positions < filled

        def load(ref, columns):
            mask = jnp.broadcast_to(inside[:, None], (block, columns.shape[0]))
            return plt.load(ref.at[row, positions[:, None], kv_head, columns[None, :]], mask=mask, other=0)

        scores = dot(load(keys_ref, first), query[0], CONTRACT_LAST)
        scores += dot(load(keys_ref, first + half), query[1], CONTRACT_LAST)
        scores = jnp.where(inside[:, None], scores * scale, -jnp.inf)
        following = jnp.maximum(highest, jnp.max(scores, axis=0))
        weights = jnp.exp(scores - following[None, :])
        correction = jnp.exp(highest - following)
        weighted = dot(weights.astype(dtype), load(values_ref, whole), CONTRACT_FIRST)
        total = total * correction + jnp.sum(weights, axis=0)
        return following, total, sums * correction[:, None] + weighted

    steps = (filled + block - 1) // block
    _, total, sums = lax.fori_loop(jnp.int32(0), steps, step, state)
    mask = jnp.broadcast_to(here[:, None], sums.shape)
    place = y_ref.at[row, starts + whole[None, :]]
    plt.store(place, (sums / total[:, None]).astype(dtype), mask=mask)


def _rotated(halves, cos, sin, dtype):
    first, second = halves
    return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)
