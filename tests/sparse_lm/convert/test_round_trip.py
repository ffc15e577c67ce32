"""Directory to ours and back is the same bits; a mesh gets its parts; nothing appears before it is whole."""

import json
import stat

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from sparse_lm import SparseLM
from sparse_lm.convert import (
    ConversionError,
    load_params,
    load_sharded,
    open_hf,
    open_own,
    staged,
    write_hf,
    write_own,
)


def read_all(directory):
    """name -> (type, shape, bytes) of every tensor in a directory's model files."""
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        for name, values in load_file(path).items():
            found[name] = (values.dtype, values.shape, values.tobytes())
    return found


def test_there_and_back_is_the_same_bits(golden, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    ours.mkdir(), back.mkdir()
    with open_hf(golden) as weights:
        write_own(weights, ours)
        config = weights.config
    with open_own(ours, config) as weights:
        write_hf(weights, back, eos_id=3)
    original = read_all(golden)
    counters = {name for name in original if "tracker" in name or "metrics_accumulator" in name}
    assert read_all(back) == {name: original[name] for name in original if name not in counters}
    with open_hf(back) as weights:
        assert weights.config == config
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 3


def test_every_parameter_of_the_model_is_a_leaf(golden):
    with open_hf(golden) as weights:
        params = load_params(weights)
        config = weights.config
    state = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: SparseLM(config, rngs=nnx.Rngs(0))))[1])
    assert jax.tree.structure(params) == jax.tree.structure(state)
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == expected


def test_each_device_of_a_mesh_reads_its_own_part(llama, monkeypatch):
    """Neurons split over four devices: the same values, and no device's part is read for another."""
    mesh = jax.make_mesh((4,), ("neurons",), axis_types=(jax.sharding.AxisType.Auto,))

    def split(leaf):
        names = ("w_gate", "w_up", "w_down")
        neurons = PartitionSpec(None, "neurons") if leaf.path[-1] in names else PartitionSpec()
        return NamedSharding(mesh, neurons)

    with open_hf(llama) as weights:
        whole = load_params(weights)
        reads = []
        read = weights.files.read
        monkeypatch.setattr(weights.files, "read", lambda *args: reads.append(read(*args)) or reads[-1])
        parts = load_sharded(weights, split)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    down = parts["blocks"]["ffn"]["w_down"]
    assert [shard.data.shape for shard in down.addressable_shards] == [(2, 8, 32)] * 4
    assert sum(part.shape in ((8, 32), (32, 8)) for part in reads) == 3 * 2 * 4


def test_shards_hold_what_they_may(llama, tmp_path):
    """Files of at most so many bytes, an index of all of them, and the same model again."""
    out = tmp_path / "out"
    out.mkdir()
    with open_hf(llama) as weights:
        write_hf(weights, out, shard_bytes=8000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert all(sum(values.nbytes for values in load_file(path).values()) <= 8000 for path in files)
    assert {path.name for path in files} == set(
        json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert read_all(out) == read_all(llama)
    assert stat.S_IMODE(files[0].stat().st_mode) == stat.S_IMODE(out.stat().st_mode) & 0o666


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail():
        with staged(tmp_path / "out") as place:
            (place / "model.safetensors").write_bytes(b"half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "out") as place:
        (place / "file").write_bytes(b"whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ConversionError, match="exists already"), staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_bytes() == b"whole"
