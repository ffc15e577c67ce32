"""Files of recorded layers: the same bits back, cases from them, and a sentence for anything else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import layers as bench_layers
from pallas_kernels.bench import recorded
from pallas_kernels.bench.inputs import Activity, ffn_inputs

DTYPES = ("bfloat16", "float16", "float32")


def layers_of(dtype, gated=True):
    return {
        layer: jax.device_get(
            ffn_inputs(
                jax.random.key(layer), Activity(8.0), tokens=32, d_model=16, d_ff=64, gated=gated,
                dtype=jnp.dtype(dtype),
            )
        )
        for layer in (1, 3)
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "layers.npz"
    recorded.save(path, "bfloat16", layers_of("bfloat16").items())
    return path


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_come_back(tmp_path, dtype, gated):
    path, layers = tmp_path / "layers.npz", layers_of(dtype, gated)
    recorded.save(path, dtype, layers.items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["layers.npz"]
    for case in recorded.cases(path):
        arrays, wanted = case.arrays(), layers[case.layer]
        assert arrays.keys() == wanted.keys()
        for name in wanted:
            assert arrays[name].dtype == jnp.dtype(dtype)
            assert np.asarray(arrays[name]).tobytes() == wanted[name].tobytes()
        assert (case.shape.d_model, case.shape.d_ff, case.shape.gated) == (16, 64, gated)


def test_numpy_alone_reads_the_file(file):
    with np.load(file) as archive:
        bits = archive["3/x"].astype(np.uint32) << 16  # a bfloat16 is the upper half of a float32
        np.testing.assert_array_equal(bits.view(np.float32), layers_of("bfloat16")[3]["x"].astype(np.float32))


def test_layers_and_tokens_are_what_was_asked(file):
    found = recorded.cases(file, layers=[3, 1], tokens=[8, 32])
    assert [(case.layer, case.tokens) for case in found] == [(3, 8), (3, 32), (1, 8), (1, 32)]
    assert found[0].arrays()["x"].shape == (8, 16)
    assert [(case.layer, case.tokens) for case in recorded.cases(file)] == [(1, 32), (3, 32)]
    assert str(found[0]) == "layer 3 of layers.npz, 8 tokens, D 16, F 64, gated, bfloat16"


def test_a_failed_save_leaves_what_was_there(file):
    before = file.read_bytes()

    def broken():
        yield from layers_of("bfloat16").items()
        raise MemoryError

    with pytest.raises(MemoryError):
        recorded.save(file, "bfloat16", broken())
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"layers": [2]}, "holds the layers 1, 3; got layer 2"),
        ({"tokens": [64]}, "holds 32 tokens of a layer; got 64: ask for 1 to 32"),
        ({"tokens": [0]}, "got 0: ask for 1 to 32"),
    ],
)
def test_what_the_file_has_not_is_a_sentence(file, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        recorded.cases(file, **asked)


def write_other_arrays(path):
    np.savez(path, weights=np.ones(3))


def write_half_a_layer(path):
    np.savez(path, **{"dtype": np.asarray("float32"), "0/x": np.ones((2, 2))})


def write_unknown_type(path):
    np.savez(
        path, **{"dtype": np.asarray("int8")}, **{f"0/{n}": np.ones((2, 2)) for n in ("x", "w_up", "w_down")}
    )


def write_one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def write_text(path):
    path.write_text("{}")


def write_a_cut_off_file(path):
    recorded.save(path, "float32", layers_of("float32").items())
    path.write_bytes(path.read_bytes()[:-100])


def write_nothing(path):
    path.touch()


@pytest.mark.parametrize(
    "write",
    [
        write_other_arrays, write_half_a_layer, write_unknown_type, write_one_array, write_text,
        write_a_cut_off_file, write_nothing,
    ],
)  # fmt: skip
def test_a_wrong_file_is_a_sentence(tmp_path, write):
    path = tmp_path / "wrong.npz"
    write(path)
    with pytest.raises(
        ValueError, match=r"^expected a file that `sparse-lm layer-inputs` has written; .*wrong"
    ):
        recorded.cases(path)


def test_no_file_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is none at"):
        recorded.cases(tmp_path / "none.npz")


def test_the_benchmark_runs_a_recorded_layer(file):
    case = recorded.cases(file, layers=[3])[0]
    result = bench_layers.run(case, "train", bench_layers.layers(["dense", "auto"]), rounds=1, chain_ms=0.1)
    assert not result.failures
    assert bench_layers.table(result).startswith("train: layer 3 of layers.npz, 32 tokens")
    [found] = bench_layers.to_json([result], [])["cases"]
    assert (found["source"], found["case"]["layer"]) == ("layers of layers.npz", 3)
