"""The three formats: what they promise of any gate, on gates that hypothesis draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import HybridELL, PanelELL, TwELL

ROWS, COLUMNS = 6, 72
TILE, COMPRESSION = 32, 4
SLOTS = TILE // COMPRESSION
WIDTH, BACKUP = 8, 2
PANEL, CHUNK = 4, 8
DTYPES = ("bfloat16", "float16", "float32")

property_test = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def gates(draw):
    """(ROWS, COLUMNS) gates of one type: rows from empty to full, NaN, infinity and either
    zero among them."""
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = draw(st.lists(st.integers(0, COLUMNS), min_size=ROWS, max_size=ROWS))
    span = draw(st.sampled_from([COLUMNS, TILE]))
    gate = rng.choice([-1.0, -0.0, 0.0, -np.inf], (ROWS, COLUMNS))
    for row, count in zip(gate, counts, strict=True):
        columns = rng.permutation(span)[:count]
        row[columns] = rng.uniform(0.1, 4.0, len(columns))
        row[columns[rng.random(len(columns)) < 0.1]] = draw(st.sampled_from([np.nan, np.inf, 1.0]))
    return jnp.asarray(gate, dtype)


def rows_of(counts, columns=COLUMNS):
    """(len(counts), columns) f32 gates whose first ``counts[i]`` entries of row i are active."""
    gate = np.full((len(counts), columns), -1.0, np.float32)
    for row, count in zip(gate, counts, strict=True):
        row[:count] = 1 + np.arange(count)
    return jnp.asarray(gate)


def active(gate):
    return ~(np.asarray(gate, np.float64) <= 0)


def kept(gate):
    """The gate with inactive entries at zero: what a format stores."""
    return np.where(active(gate), np.asarray(gate, np.float64), 0)


def assert_rows_equal(got, want, rows=slice(None)):
    np.testing.assert_array_equal(np.asarray(got, np.float64)[rows], want[rows])


def nbytes(*arrays):
    return sum(np.asarray(array).nbytes for array in arrays)


twell = jax.jit(TwELL.from_dense, static_argnames=("tile", "compression"))
hybrid = jax.jit(HybridELL.from_dense, static_argnames=("width", "backup_rows"))
panels = jax.jit(PanelELL.from_dense, static_argnames=("panel", "chunk", "capacity"))
to_dense = jax.jit(lambda packed: packed.to_dense())


# -- TwELL -------------------------------------------------------------------------------------------------


@property_test
@given(gates())
@example(rows_of([0, 0, 0, 0, 0, 0]))
@example(rows_of([COLUMNS] * ROWS))
@example(rows_of([SLOTS - 1, SLOTS, SLOTS + 1, TILE, 0, 1]))
def test_twell(gate):
    packed = twell(gate, tile=TILE, compression=COMPRESSION)
    counts = np.pad(active(gate), ((0, 0), (0, 96 - COLUMNS))).reshape(ROWS, 3, TILE).sum(axis=2)
    overflows = (counts > SLOTS - 1).any(axis=1)
    np.testing.assert_array_equal(packed.counts, counts)
    np.testing.assert_array_equal(packed.overflows, overflows)
    assert packed.overflow_count == overflows.sum()
    assert packed.n_tiles == 3
    dense = to_dense(packed)
    assert (dense.shape, dense.dtype) == (gate.shape, gate.dtype)
    assert_rows_equal(dense, kept(gate), ~overflows)
    stored = (np.asarray(dense, np.float64) != 0).sum(axis=1)
    np.testing.assert_array_equal(stored, np.minimum(counts, SLOTS - 1).sum(axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_twell_words(dtype):
    """The documented layout: a count, then column and value of each active gate, in any order."""
    gate = jnp.full((1, 64), -1, dtype).at[0, jnp.array([3, 40, 63])].set(jnp.array([1.5, 2.0, 4.0], dtype))
    packed = TwELL.from_dense(gate, tile=32, compression=8)
    words = np.asarray(packed.words).reshape(2, 4)
    np.testing.assert_array_equal(words[:, 0], [1, 2])
    assert {int(words[0, 1] & 0xFFFF)} | {int(word & 0xFFFF) for word in words[1, 1:3]} == {3, 40, 63}
    if dtype == "float32":
        assert packed.values.reshape(2, 4)[0, 1] == 1.5
    else:
        assert packed.values is None
        assert (words[0, 1] >> 16).astype(np.uint16).view(jnp.dtype(dtype)) == 1.5
    per_word = 4 if packed.values is None else 8
    assert (
        packed.nbytes
        == nbytes(packed.words, *([] if packed.values is None else [packed.values]))
        == 8 * per_word
    )


def test_twell_names_the_last_of_65536_neurons():
    gate = jnp.zeros((1, 65536), jnp.bfloat16).at[0, jnp.array([0, 65535])].set(1)
    packed = twell(gate, tile=256, compression=8)
    np.testing.assert_array_equal(to_dense(packed), gate)
    with pytest.raises(ValueError, match="at most F = 65536 neurons; got F = 65537"):
        TwELL.from_dense(jnp.zeros((1, 65537)), tile=256, compression=8)


# -- HybridELL ---------------------------------------------------------------------------------------------


@property_test
@given(gates())
@example(rows_of([0, 0, 0, 0, 0, 0]))
@example(rows_of([COLUMNS] * ROWS))
@example(rows_of([WIDTH - 1, WIDTH, WIDTH + 1, WIDTH, 0, 1]))
def test_hybrid(gate):
    packed = hybrid(gate, width=WIDTH, backup_rows=BACKUP)
    nnz = active(gate).sum(axis=1)
    overflows = nnz > WIDTH
    np.testing.assert_array_equal(packed.nnz, nnz)
    assert packed.overflow_count == overflows.sum()
    assert packed.lost_count == max(overflows.sum() - BACKUP, 0)
    lost = np.zeros(ROWS, bool)
    lost[np.flatnonzero(overflows)[BACKUP:]] = True
    dense = to_dense(packed)
    assert (dense.shape, dense.dtype) == (gate.shape, gate.dtype)
    assert_rows_equal(dense, kept(gate), ~lost)
    assert_rows_equal(dense, np.zeros((ROWS, COLUMNS)), lost)
    ids = np.asarray(packed.backup_ids)
    np.testing.assert_array_equal(ids[: overflows.sum()], np.flatnonzero(overflows)[:BACKUP])
    assert (ids[overflows.sum() :] == ROWS).all()


@pytest.mark.parametrize(("d_ff", "index"), [(65536, "uint16"), (65537, "int32")])
def test_hybrid_indices_are_as_narrow_as_f_allows(d_ff, index):
    gate = jnp.zeros((2, d_ff), jnp.float32).at[:, jnp.array([0, d_ff - 1])].set(2)
    packed = hybrid(gate, width=3, backup_rows=0)
    assert packed.indices.dtype == index
    np.testing.assert_array_equal(to_dense(packed), gate)
    assert packed.nbytes == nbytes(
        packed.values, packed.indices, packed.nnz, packed.backup, packed.backup_ids
    )


# -- PanelELL ----------------------------------------------------------------------------------------------


@property_test
@given(gates())
@example(rows_of([0, 0, 0, 0, 0, 0]))
@example(rows_of([COLUMNS] * ROWS))
@example(rows_of([CHUNK, 0, 0, 0, CHUNK + 1, 0]))
def test_panel(gate):
    packed = panels(gate, panel=PANEL, chunk=CHUNK, capacity=1.0)
    together = np.pad(active(gate), ((0, 2), (0, 0))).reshape(2, PANEL, COLUMNS).any(axis=1)
    counts = together.sum(axis=1)
    np.testing.assert_array_equal(packed.counts, counts)
    np.testing.assert_array_equal(packed.offsets, np.cumsum([0, *-(-counts // CHUNK) * CHUNK]))
    assert not packed.overflows
    for panel in range(2):
        owned = np.asarray(packed.neurons[packed.offsets[panel] : packed.offsets[panel + 1]])
        np.testing.assert_array_equal(owned[: counts[panel]], np.flatnonzero(together[panel]))
        assert not owned[counts[panel] :].any()
    dense = to_dense(packed)
    assert (dense.shape, dense.dtype) == (gate.shape, gate.dtype)
    assert_rows_equal(dense, kept(gate))
    assert packed.nbytes == nbytes(packed.values, packed.neurons, packed.offsets, packed.counts)


@property_test
@given(gates())
def test_a_panel_format_without_room_says_so(gate):
    packed = panels(gate, panel=PANEL, chunk=CHUNK, capacity=0.25)
    needed = packed.offsets[-1] // CHUNK
    room = packed.neurons.shape[0] // CHUNK
    assert room < 2 * -(-COLUMNS // CHUNK)
    assert packed.overflow_count == max(int(needed) - room, 0)
    assert bool(packed.overflows) == (needed > room)
    if not packed.overflows:
        assert_rows_equal(to_dense(packed), kept(gate))


# -- all three ---------------------------------------------------------------------------------------------

PACKERS = {
    "TwELL": lambda gate: twell(gate, tile=TILE, compression=COMPRESSION),
    "HybridELL": lambda gate: hybrid(gate, width=WIDTH, backup_rows=BACKUP),
    "PanelELL": lambda gate: panels(gate, panel=PANEL, chunk=CHUNK),
}


@pytest.mark.parametrize("name", PACKERS)
def test_packed_gates_pass_through_jit_and_tree_map(name):
    packed = PACKERS[name](rows_of([1, 2, 3, 4, 5, 6]))
    again = jax.jit(lambda packed: packed)(packed)
    assert type(again) is type(packed)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    np.testing.assert_array_equal(again.to_dense(), to_dense(packed))


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("gate", [jnp.zeros((2, 3, 4)), jnp.zeros((2, 64), jnp.int32)], ids=["rank", "type"])
def test_only_floating_point_matrices_are_packed(name, gate):
    with pytest.raises(
        ValueError, match=r"gate must be a floating-point array \(M, F\); got (float32|int32)\["
    ):
        PACKERS[name](gate)


def test_capacities_out_of_range_are_refused():
    gate = rows_of([1, 2])
    with pytest.raises(ValueError, match="width must be at least 1 and backup_rows at least 0; got 0, 1"):
        HybridELL.from_dense(gate, width=0, backup_rows=1)
    with pytest.raises(ValueError, match="width must be at least 1 and backup_rows at least 0; got 4, -1"):
        HybridELL.from_dense(gate, width=4, backup_rows=-1)
    for panel, chunk, capacity in ((0, 8, 0.5), (4, 0, 0.5), (4, 8, 0.0), (4, 8, 1.5)):
        with pytest.raises(ValueError, match=f"at most 1; got {panel}, {chunk} and {capacity}"):
            PanelELL.from_dense(gate, panel=panel, chunk=chunk, capacity=capacity)
