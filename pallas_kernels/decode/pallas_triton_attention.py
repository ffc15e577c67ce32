"""Attention of one new token a row to its cache, in Pallas Triton: one kernel where XLA has ten.

Why it exists. At one query the keys and values of a row, 4 C K H bytes in 16 bits for a context of C, are
read once, which takes less time than the launches of rotation, two cache writes, scores, softmax and sums
apart. And it reads the filled part of the cache only, where a product of fixed shape reads all of its
capacity.

**`decode_attention`**: programs for each row and key/value head: one, or where these are fewer than the
device has cores, several *splits* of the positions. A program rotates its queries and its new key and goes
over its blocks of positions with a running softmax; the first split also writes key and value to their place
in the cache, which it updates in place. The new position takes part from registers, so no read waits for the
write. Each split counts itself in; the one that finds all others counted merges what they found, in their
order whichever comes last: so the same inputs give the same bits.

**Numerics.** Scores, softmax and sums are f32; rotated queries and keys, and the weights of the values, are
rounded to the input type. f32 inputs multiply as IEEE f32.

**Limits.** Heads of 32, 64, 128 or 256; an NVIDIA GPU of compute capability 8.0 or newer.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import varying_axes
from pallas_kernels.common.products import CONTRACT_FIRST, CONTRACT_LAST, dot
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.config import AttentionConfig
from pallas_kernels.decode.pallas_triton_tiles import barrier

_LEAST_ROWS = 16
HEAD_DIMS = (32, 64, 128, 256)


def decode_attention(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    arrivals: jax.Array,
    *,
    config: AttentionConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Softmax attention of each row's new token to itself and to what its cache holds.

    Args:
      qkv: (B, (N + 2 K) H), queries, keys and values of the new tokens, not rotated yet.
      keys, values: (B, C, K, H) of qkv's type; donate them, and they are updated in place.
      lengths: (B,) int32, positions filled before; a row whose cache is full attends to all of it and to the
        new token, which is not kept.
      cos, sin: (B, H / 2) f32, of the new tokens' angles.
      arrivals: (B, K) int32 zeros, for splits to count in.

    Returns:
      (B, N H) in qkv's type, the keys and values with the new ones at ``lengths``, and ``arrivals``, zeros
      again, for the next layer.
    """
    batch, _, kv_heads, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    config = configs.choose_attention(keys) if config is None else config
    output: Any = partial(varying_axes.output, qkv)
    of_splits = config.splits, batch, heads
    y, keys, values, arrivals, _ = pl.pallas_call(
        partial(_kernel, config=config, interpret=interpret),
        out_shape=(
            output((batch, heads * head_dim), qkv.dtype),
            output(keys.shape, keys.dtype),
            output(values.shape, values.dtype),
            output(arrivals.shape, jnp.int32),
            _Softmax(
                output(of_splits, jnp.float32),
                output(of_splits, jnp.float32),
                output((*of_splits, head_dim), jnp.float32),
            ),
        ),
        grid=(kv_heads, config.splits, batch),
        input_output_aliases={1: 1, 2: 2, 6: 3},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="decode_attention",
    )(qkv, keys, values, lengths, cos, sin, arrivals)
    return y, keys, values, arrivals


class _Softmax(NamedTuple):
    """A running softmax of some heads (N,): after any number of positions, none included.

    Attributes:
      highest: (N,) f32, the highest score; minus infinity after none.
      total: (N,) f32, the sum of the weights exp(score - highest).
      sums: (N, H) f32, the weighted sum of the values.
    """

    highest: jax.Array
    total: jax.Array
    sums: jax.Array

    def under(self, highest: jax.Array) -> "_Softmax":
        """The same with weights exp(score - ``highest``), (N,) of which none is below the highest so far."""
        correction = jnp.exp(self.highest - highest)
        return _Softmax(highest, self.total * correction, self.sums * correction[:, None])

    def plus(self, total: jax.Array, sums: jax.Array) -> "_Softmax":
        """With more positions' weights of the same highest score."""
        return _Softmax(self.highest, self.total + total, self.sums + sums)


def _kernel(
    qkv_ref,
    keys_ref,
    values_ref,
    lengths_ref,
    cos_ref,
    sin_ref,
    _,
    y_ref,
    new_keys_ref,
    new_values_ref,
    arrivals_ref,
    softmax_refs,
    *,
    config,
    interpret,
):
    _, capacity, kv_heads, head_dim = keys_ref.shape
    kv_head, split, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, dtype = softmax_refs.total.shape[2], qkv_ref.dtype
    group, half = heads // kv_heads, head_dim // 2
    padded = max(_LEAST_ROWS, pl.next_power_of_2(group))
    columns = lax.iota(jnp.int32, head_dim)
    length = lengths_ref[row]
    filled = jnp.minimum(length, capacity)

    within = lax.iota(jnp.int32, padded)
    here, head = within < group, kv_head * group + within
    mask = jnp.broadcast_to(here[:, None], (padded, head_dim))

    def rotated(load):
        """What ``load`` gives at columns, rotated with what it gives half a head away."""
        in_first = columns < half
        angle = jnp.where(in_first, columns, columns - half)
        cos, sin = plt.load(cos_ref.at[row, angle]), plt.load(sin_ref.at[row, angle])
        away = jnp.where(in_first, columns + half, angle)
        one, other = (load(at).astype(jnp.float32) for at in (columns, away))
        cos, sin = (
            lax.expand_dims(part, range(one.ndim - 1)) for part in (cos, jnp.where(in_first, -sin, sin))
        )
        return (one * cos + other * sin).astype(dtype)

    query = rotated(
        lambda at: plt.load(qkv_ref.at[row, head[:, None] * head_dim + at[None, :]], mask=mask, other=0)
    )
    start = (heads + kv_head) * head_dim
    key = rotated(lambda at: plt.load(qkv_ref.at[row, start + at]))
    value = plt.load(qkv_ref.at[row, start + kv_heads * head_dim + columns])

    @pl.when((length < capacity) & (split == 0))
    def write():
        plt.store(new_keys_ref.at[row, length, kv_head, columns], key)
        plt.store(new_values_ref.at[row, length, kv_head, columns], value)

    scale = head_dim**-0.5
    of_new = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32)[None, :], axis=1) * scale
    wide = jnp.broadcast_to(value.astype(jnp.float32)[None, :], (padded, head_dim))
    first = split == 0
    softmax = _Softmax(
        jnp.where(first, of_new, -jnp.inf),
        jnp.where(first, jnp.ones((padded,), jnp.float32), 0.0),
        jnp.where(first, wide, 0.0),
    )

    def step(nth, softmax):
        # The splits take turns, so that they share any number of positions.
        positions = (nth * config.splits + split) * config.block + lax.iota(jnp.int32, config.block)
        inside = positions < filled
        loaded = jnp.broadcast_to(inside[:, None], (config.block, head_dim))

        def load(ref):
            place = ref.at[row, positions[:, None], kv_head, columns[None, :]]
            return plt.load(place, mask=loaded, other=0)

        scores = dot(load(keys_ref), query, CONTRACT_LAST)
        scores = jnp.where(inside[:, None], scores * scale, -jnp.inf)
        highest = jnp.maximum(softmax.highest, jnp.max(scores, axis=0))
        weights = jnp.exp(scores - highest[None, :])
        sums = dot(weights.astype(dtype), load(values_ref), CONTRACT_FIRST)
        return softmax.under(highest).plus(jnp.sum(weights, axis=0), sums)

    blocks = (filled + config.block - 1) // config.block
    steps = (blocks - split + config.splits - 1) // config.splits
    softmax = lax.fori_loop(jnp.int32(0), steps, step, softmax)

    def finish(softmax):
        total = jnp.where(here, softmax.total, 1)
        place = y_ref.at[row, head[:, None] * head_dim + columns[None, :]]
        plt.store(place, (softmax.sums / total[:, None]).astype(dtype), mask=mask)

    if config.splits == 1:
        finish(softmax)
        return

    def found(nth):
        """Where a split leaves its softmax, and what of it exists."""
        at = nth, row, head
        places = (
            softmax_refs.highest.at[at],
            softmax_refs.total.at[at],
            softmax_refs.sums.at[nth, row, head[:, None], columns[None, :]],
        )
        return zip(places, (here, here, mask), strict=True)

    for (place, exists), values in zip(found(split), softmax, strict=True):
        plt.store(place, values, mask=exists)
    barrier(interpret)
    before = plt.atomic_add(arrivals_ref, (row, kv_head), jnp.int32(1))

    @pl.when(before == config.splits - 1)
    def merge():
        arrivals_ref[row, kv_head] = jnp.int32(0)
        parts = [
            _Softmax(*(plt.load(place, mask=exists, other=0) for place, exists in found(nth)))
            for nth in range(config.splits)
        ]
        merged = parts[0]
        for part in parts[1:]:
            highest = jnp.maximum(merged.highest, part.highest)
            merged = merged.under(highest).plus(*part.under(highest)[1:])
        finish(merged)
