"""The three sparse formats of gate activations, with their conversions in plain jnp.

M tokens, F neurons. A value is *stored* where a gate is active: not at or under zero, so NaN is stored. The
kernels write these formats themselves; the conversions here are what they are tested against, and what a user
inspects. Each format says how much did not fit: nothing is dropped without being counted.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activations import stored_active

MAX_INDEX = 1 << 16
"""Neurons that a 16-bit index can name."""


_STATIC = {"static": True}  # part of the pytree's structure, not a leaf


def _bytes(*arrays: jax.Array | None) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays if a is not None)


def _check_gate(gate: jax.Array, limit: int | None) -> None:
    if gate.ndim != 2 or not jnp.issubdtype(gate.dtype, jnp.floating):
        raise ValueError(f"gate must be a floating-point array (M, F); got {gate.dtype}{list(gate.shape)}")
    if limit is not None and gate.shape[1] > limit:
        raise ValueError(f"a 16-bit index names at most F = {limit} neurons; got F = {gate.shape[1]}")


def _slots_of_active(mask: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """For each row of a bool mask (..., N): columns of its first ``slots`` active entries,
    and how many are active.

    Unused slots hold N, which is out of range on purpose.
    """
    columns = mask.shape[-1]
    count = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    order = jnp.argsort(~mask, axis=-1, stable=True)[..., :slots].astype(jnp.int32)
    if columns < slots:
        pad = [(0, 0)] * (mask.ndim - 1) + [(0, slots - columns)]
        order = jnp.pad(order, pad, constant_values=columns)
    used = lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1) < count[..., None]
    return jnp.where(used, order, columns), count


def _take(dense: jax.Array, columns: jax.Array) -> jax.Array:
    """Values of (..., N) at (..., S) columns; 0 where the column is out of range."""
    return jnp.take_along_axis(dense, columns, axis=-1, mode="fill", fill_value=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwELL:
    """Tile-wise ELLPACK (paper section 3.1): what the gate GEMM's epilogue writes.

    Columns are cut into ``n_tiles = ceil(F / T)`` tiles; each row of a tile owns S words. Word 0 is the true
    count of active gates of that row in that tile, also where it exceeds S - 1. Words 1 to min(count, S - 1)
    hold one active gate each: the column in the low 16 bits and, for 16-bit types, the value's bits in the
    high 16; their order within the tile is free. For f32 gates the values stand in ``values`` at the same
    place. A row with a count over S - 1 *overflows*: its counts are true, and its other words mean nothing.

    Attributes:
      words: (M, n_tiles * S) uint32.
      values: (M, n_tiles * S) f32 for f32 gates, else None.
      d_ff: F.  tile: T.  slots: S.  dtype: type of the gates.
    """

    words: jax.Array
    values: jax.Array | None
    d_ff: int = dataclasses.field(metadata=_STATIC)
    tile: int = dataclasses.field(metadata=_STATIC)
    slots: int = dataclasses.field(metadata=_STATIC)
    dtype: jnp.dtype = dataclasses.field(metadata=_STATIC)

    @classmethod
    def from_dense(cls, gate: jax.Array, *, tile: int = 256, compression: int = 8) -> "TwELL":
        """Packs a dense gate (M, F); inactive entries are dropped, active ones kept in
        ascending column order.

        Raises:
          ValueError: F over 65,536, or a gate that is not a floating-point matrix.
        """
        _check_gate(gate, MAX_INDEX)
        tokens, d_ff = gate.shape
        slots, n_tiles = tile // compression, -(-d_ff // tile)
        tiles = jnp.pad(gate, ((0, 0), (0, n_tiles * tile - d_ff))).reshape(tokens, n_tiles, tile)
        local, count = _slots_of_active(stored_active(tiles), slots - 1)
        kept = _take(tiles, local)
        column = local + tile * jnp.arange(n_tiles, dtype=jnp.int32)[None, :, None]
        word = jnp.where(local < tile, column, 0).astype(jnp.uint32)
        values = None
        if gate.dtype.itemsize == 2:
            word |= lax.bitcast_convert_type(kept, jnp.uint16).astype(jnp.uint32) << 16
        else:
            values = jnp.pad(kept.astype(jnp.float32), ((0, 0), (0, 0), (1, 0))).reshape(tokens, -1)
        words = jnp.concatenate([count[..., None].astype(jnp.uint32), word], axis=-1).reshape(tokens, -1)
        return cls(words, values, d_ff, tile, slots, jnp.dtype(gate.dtype))

    @property
    def n_tiles(self) -> int:
        return -(-self.d_ff // self.tile)

    @property
    def counts(self) -> jax.Array:
        """(M, n_tiles) int32, the true count of every tile."""
        return self.words.reshape(-1, self.n_tiles, self.slots)[..., 0].astype(jnp.int32)

    @property
    def overflows(self) -> jax.Array:
        """(M,) bool, rows with a tile that holds more than S - 1 active gates."""
        return jnp.any(self.counts > self.slots - 1, axis=1)

    @property
    def overflow_count(self) -> jax.Array:
        """() int32, rows that overflow."""
        return jnp.sum(self.overflows, dtype=jnp.int32)

    @property
    def nbytes(self) -> int:
        return _bytes(self.words, self.values)

    def to_dense(self) -> jax.Array:
        """(M, F) gates; exact for every row that does not overflow, meaningless for one that does."""
        tokens, n_tiles = self.words.shape[0], self.n_tiles
        words = self.words.reshape(tokens, n_tiles, self.slots)
        stored = words[..., 1:]
        used = jnp.arange(self.slots - 1, dtype=jnp.uint32)[None, None] < words[..., :1]
        if self.values is None:
            kept = lax.bitcast_convert_type((stored >> 16).astype(jnp.uint16), self.dtype)
        else:
            kept = self.values.reshape(words.shape)[..., 1:].astype(self.dtype)
        column = jnp.where(used, stored & 0xFFFF, self.d_ff).astype(jnp.int32).reshape(tokens, -1)
        rows = jnp.arange(tokens)[:, None]
        dense = jnp.zeros((tokens, self.d_ff), self.dtype)
        return dense.at[rows, column].set(kept.reshape(tokens, -1), mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HybridELL:
    """ELLPACK rows of width W with a dense backup (paper section 3.3): small residuals for training.

    Row i holds its ``nnz[i]`` active entries in ``values[i]`` and ``indices[i]`` if they are at most W.
    Otherwise it is one of the backup rows: ``backup[b]`` is the whole dense row and ``backup_ids[b] = i``.
    Unused entries of ``indices`` are 0 with value 0; unused backup rows have the id M.

    Attributes:
      values: (M, W).  indices: (M, W) uint16, or int32 where F > 65,536.  nnz: (M,) int32, always true.
      backup: (B, F).  backup_ids: (B,) int32.  d_ff: F.
    """

    values: jax.Array
    indices: jax.Array
    nnz: jax.Array
    backup: jax.Array
    backup_ids: jax.Array
    d_ff: int = dataclasses.field(metadata=_STATIC)

    @classmethod
    def from_dense(cls, gate: jax.Array, *, width: int = 128, backup_rows: int) -> "HybridELL":
        """Packs a dense gate (M, F) into rows of ``width`` and at most ``backup_rows`` dense rows."""
        _check_gate(gate, None)
        if width < 1 or backup_rows < 0:
            raise ValueError(
                f"width must be at least 1 and backup_rows at least 0; got {width}, {backup_rows}"
            )
        tokens, d_ff = gate.shape
        columns, nnz = _slots_of_active(stored_active(gate), width)
        fits = (nnz <= width)[:, None]
        columns = jnp.where(fits, columns, d_ff)
        index_type = jnp.uint16 if d_ff <= MAX_INDEX else jnp.int32
        ids = jnp.nonzero(nnz > width, size=backup_rows, fill_value=tokens)[0].astype(jnp.int32)
        dense = jnp.where(stored_active(gate), gate, 0).astype(gate.dtype)
        return cls(
            values=_take(gate, columns),
            indices=jnp.where(columns < d_ff, columns, 0).astype(index_type),
            nnz=nnz,
            backup=jnp.take(dense, ids, axis=0, mode="fill", fill_value=0),
            backup_ids=ids,
            d_ff=d_ff,
        )

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def overflow_count(self) -> jax.Array:
        """() int32, rows with more than W active entries."""
        return jnp.sum(self.nnz > self.width, dtype=jnp.int32)

    @property
    def lost_count(self) -> jax.Array:
        """() int32, overflowing rows that found no backup row: above 0, ``to_dense`` is incomplete."""
        return jnp.maximum(self.overflow_count - self.backup_ids.shape[0], 0)

    @property
    def nbytes(self) -> int:
        return _bytes(self.values, self.indices, self.nnz, self.backup, self.backup_ids)

    def to_dense(self) -> jax.Array:
        """(M, F); exact if ``lost_count`` is 0, with zero rows for the lost ones otherwise."""
        tokens, width = self.values.shape
        used = (jnp.arange(width)[None] < self.nnz[:, None]) & (self.nnz <= width)[:, None]
        columns = jnp.where(used, self.indices.astype(jnp.int32), self.d_ff)
        dense = jnp.zeros((tokens, self.d_ff), self.values.dtype)
        dense = dense.at[jnp.arange(tokens)[:, None], columns].set(self.values, mode="drop")
        return dense.at[self.backup_ids].set(self.backup, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PanelELL:
    """Blocked ELLPACK with P x 1 blocks: the neurons active for at least one of P consecutive tokens.

    Panel p covers tokens p P to (p + 1) P - 1 (the last one is padded with zero rows). It owns the slots
    ``offsets[p]`` to ``offsets[p + 1]``, its count rounded up to a multiple of the chunk. The first
    ``counts[p]`` of them hold, in ascending order, the neurons active for at least one of its tokens, and in
    ``values`` the P gates of each: transposed, because a neuron's P values are what the projections load
    together. The slots after them hold neuron 0 with value 0. Slots past the last panel's mean nothing. If
    the last offset exceeds the number of slots, the format *overflows*: then only counts and offsets
    have a meaning.

    Attributes:
      values: (n_slots, P).  neurons: (n_slots,) int32.  offsets: (n_panels + 1,) int32.
      counts: (n_panels,) int32.
      tokens: M.  d_ff: F.  chunk: what a panel's slots are a multiple of.
    """

    values: jax.Array
    neurons: jax.Array
    offsets: jax.Array
    counts: jax.Array
    tokens: int = dataclasses.field(metadata=_STATIC)
    d_ff: int = dataclasses.field(metadata=_STATIC)
    chunk: int = dataclasses.field(metadata=_STATIC)

    @classmethod
    def from_dense(
        cls, gate: jax.Array, *, panel: int = 128, chunk: int = 128, capacity: float = 1.0
    ) -> "PanelELL":
        """Packs a dense gate (M, F) into panels of ``panel`` tokens.

        Args:
          capacity: share of all (panel, neuron) pairs, in chunks, that there are slots for.

        Raises:
          ValueError: a panel or chunk under 1, a capacity outside (0, 1], or a gate that is
            no floating-point matrix.
        """
        _check_gate(gate, None)
        if panel < 1 or chunk < 1 or not 0 < capacity <= 1:
            raise ValueError(
                "panel and chunk must be at least 1 and capacity above 0 and at most 1; "
                f"got {panel}, {chunk} and {capacity}"
            )
        tokens, d_ff = gate.shape
        n_panels, width = -(-tokens // panel), -(-d_ff // chunk) * chunk
        n_slots = max(1, round(n_panels * width // chunk * capacity)) * chunk
        padded = jnp.pad(jnp.where(stored_active(gate), gate, 0), ((0, n_panels * panel - tokens), (0, 0)))
        panels = padded.astype(gate.dtype).reshape(n_panels, panel, d_ff)
        columns, counts = _slots_of_active(jnp.any(stored_active(panels), axis=1), width)
        kept = _take(panels, jnp.broadcast_to(columns[:, None], (n_panels, panel, width)))
        chunks = jnp.cumsum((counts + chunk - 1) // chunk, dtype=jnp.int32)
        offsets = jnp.concatenate([jnp.zeros((1,), jnp.int32), chunks]) * chunk
        place = offsets[:-1, None] + jnp.arange(width, dtype=jnp.int32)[None]
        place = jnp.where(place < offsets[1:, None], place, n_slots)
        neurons = (
            jnp.zeros((n_slots,), jnp.int32).at[place].set(jnp.where(columns < d_ff, columns, 0), mode="drop")
        )
        values = jnp.zeros((n_slots, panel), gate.dtype).at[place].set(kept.transpose(0, 2, 1), mode="drop")
        return cls(values, neurons, offsets, counts, tokens, d_ff, chunk)

    @property
    def overflows(self) -> jax.Array:
        """() bool, whether the panels need more slots than there are."""
        return self.offsets[-1] > self.neurons.shape[0]

    @property
    def overflow_count(self) -> jax.Array:
        """() int32, chunks that found no slots."""
        return jnp.maximum(self.offsets[-1] - self.neurons.shape[0], 0) // self.chunk

    @property
    def nbytes(self) -> int:
        return _bytes(self.values, self.neurons, self.offsets, self.counts)

    def to_dense(self) -> jax.Array:
        """(M, F) gates; meaningless if the format overflows."""
        (n_slots, panel), n_panels = self.values.shape, self.counts.shape[0]
        slot = jnp.arange(n_slots, dtype=jnp.int32)
        owner = jnp.searchsorted(self.offsets[1:], slot, side="right")
        owner = jnp.minimum(owner, n_panels - 1)
        used = slot - self.offsets[owner] < self.counts[owner]
        column = jnp.where(used, self.neurons, self.d_ff)
        dense = jnp.zeros((n_panels, panel, self.d_ff), self.values.dtype)
        dense = dense.at[owner[:, None], jnp.arange(panel)[None], column[:, None]].set(
            self.values, mode="drop"
        )
        return dense.reshape(n_panels * panel, self.d_ff)[: self.tokens]
