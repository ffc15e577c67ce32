"""Shards give what was written, and a file that is not whole is one sentence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.shard_writer import seal
from train.data.shards import InMemory, Joined, ShardFile
from train.errors import UserError

VALUES = np.random.default_rng(0).integers(0, 1 << 16, 10_000).astype("<u2")


def written(path, values=VALUES):
    path.write_bytes(values.tobytes())
    seal(path, values.dtype, len(values))
    return ShardFile(path, values.dtype, len(values))


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 9_999), count=st.integers(1, 9_000))
def test_any_part_is_what_was_written(tmp_path_factory, start, count):
    file = written(tmp_path_factory.mktemp("shard") / "a.tokens")
    assert len(file) == 10_000
    stop = min(start + count, 10_000)
    assert np.array_equal(file.read(start, stop), VALUES[start:stop])


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 100), max_size=5), start=st.integers(0, 99), count=st.integers(1, 100))
def test_joined_parts_are_one_sequence(cuts, start, count):
    values = np.arange(100)
    joined = Joined([InMemory(part) for part in np.split(values, sorted(cuts))])
    assert len(joined) == 100
    stop = min(start + count, 100)
    assert np.array_equal(joined.read(start, stop), values[start:stop])


def test_sealing_again_changes_nothing(tmp_path):
    written(tmp_path / "a.tokens")
    before = (tmp_path / "a.tokens").read_bytes()
    seal(tmp_path / "a.tokens", VALUES.dtype, len(VALUES))
    assert (tmp_path / "a.tokens").read_bytes() == before


@pytest.mark.parametrize("position", [0, 9_000, 19_999, 20_000])
def test_one_changed_bit_is_noticed_where_it_is_read(tmp_path, position):
    file = written(tmp_path / "a.tokens")
    data = bytearray((tmp_path / "a.tokens").read_bytes())
    data[position] ^= 1
    (tmp_path / "a.tokens").write_bytes(data)
    with pytest.raises(
        UserError, match=r"a\.tokens must be whole; found that values [0-9,]+ and after are not"
    ):
        file.read(0, 10_000)


def test_what_is_sound_of_a_damaged_file_is_read(tmp_path):
    file = written(tmp_path / "a.tokens")
    data = bytearray((tmp_path / "a.tokens").read_bytes())
    data[9_990 * 2] ^= 1
    (tmp_path / "a.tokens").write_bytes(data)
    assert np.array_equal(file.read(0, 8192), VALUES[:8192])
    with pytest.raises(UserError, match="values 8,192 and after"):
        file.read(8192, 8193)


def test_a_file_cut_short_is_noticed_when_it_is_opened_and_while_it_is_read(tmp_path):
    path = tmp_path / "a.tokens"
    file = written(path)
    path.write_bytes(path.read_bytes()[:15_000])
    with pytest.raises(UserError, match=r"found that it ends after 15,000 bytes: restore the file"):
        file.read(0, 10_000)
    with pytest.raises(UserError, match=r"found that it has 15,000 bytes where the index says 20,012"):
        ShardFile(path, VALUES.dtype, 10_000)


def test_a_file_that_vanished_is_noticed_when_it_is_opened(tmp_path):
    file = written(tmp_path / "a.tokens")
    (tmp_path / "a.tokens").unlink()
    assert np.array_equal(file.read(5, 9), VALUES[5:9])  # an open file stays
    with pytest.raises(
        UserError, match=r"a\.tokens must be whole; found that it cannot be read \(No such file"
    ):
        ShardFile(tmp_path / "a.tokens", VALUES.dtype, 10_000)
