"""``bench decode``: its cases, what it counts, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from pallas_kernels import reference
from pallas_kernels.errors import RequestError
from sparse_lm import ModelConfig
from sparse_lm.inference import InferenceModel
from train import cli
from train.bench import decode
from train.bench.results import CommonOptions

MODEL = ModelConfig(
    vocab_size=64, d_model=32, d_ff=128, num_layers=2, num_heads=2, num_kv_heads=1, context_length=64,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small():
    patch = pytest.MonkeyPatch()
    patch.setattr(decode, "_LAYERS", 2)
    patch.setattr(decode, "_REPEATS", 1)
    yield
    patch.undo()


def options(**changes):
    small = {"batches": (2,), "tokens": (1, 3), "formats": ("dense",), "nnz": 6, "context": 8, "prompt": 16}
    return decode.DecodeOptions(**{"model": MODEL, "rounds": 1} | small | changes)


def test_every_case_has_its_time_and_bytes(tmp_path):
    console, path = Console(record=True, width=140), tmp_path / "decode.json"
    rows = decode.run(options(common=CommonOptions(json=str(path))), console=console)
    assert [(row.what, row.tokens) for row in rows] == [
        ("layer", 1), ("layer", 3), ("step", 2), ("first token", 16),
    ]  # fmt: skip
    assert all(ms > 0 for row in rows for ms in row.samples_ms)
    weight, width = 4 * 128 * 32, 4 * 32 * 32
    assert rows[0].bytes == 3 * weight
    cache = 2 * 2 * 8 * 16 * 4
    assert rows[2].bytes == 4 * 64 * 32 + 2 * (3 * weight + 2 * width + width + cache)
    assert all(row.bandwidth_share > 0 for row in rows[:3])
    document = json.loads(path.read_text())
    assert [row["median_ms"] for row in document["rows"]] == [row.median_ms for row in rows]
    assert document["rows"][0]["name"] == "layer, 1 tokens, dense"
    assert document["device"]["platform"] == "cpu"
    assert "of bandwidth" in console.export_text()


def test_a_sparse_layer_reads_the_gate_and_its_active_rows():
    assert decode._ffn_bytes(MODEL, "auto", union=10) == 4 * 32 * (128 + 2 * 10)


def test_every_neuron_can_be_active():
    inputs = jax.jit(lambda key: decode._ffn_weights(options(nnz=0), key, tokens=3))(jax.random.key(0))
    assert decode._union(inputs["x"][:1], inputs["w_gate"], MODEL.ffn.rule) == 128


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"context": 60}, "--context must be from 1 to 48 and --prompt at most 64"),
        ({"prompt": 65}, "got 8 and 65"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(changes, sentence):
    with pytest.raises(RequestError, match=sentence):
        decode.run(options(**changes))


def test_the_command_names_its_benchmarks(capsys):
    assert cli.main(["bench"]) == 2
    assert (
        "one of layers, stages, model, step, decode, order, gate-bound, scaling, curves; got none"
        in capsys.readouterr().err
    )
    assert cli.main(["bench", "decod"]) == 2
    assert "got 'decod'; did you mean decode?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["layers", "forward"], ["stages"]])
def test_the_kernels_benchmarks_are_benchmarks_of_the_program_too(capsys, command):
    assert cli.main(["bench", *command]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_last_layer_is_as_active_as_asked():
    """Deviations of 0.3 at a width of 64 do to the residual stream what 0.02 do at a width of 1,000."""
    deep = ModelConfig(
        vocab_size=512, d_model=64, d_ff=1024, num_layers=4, num_heads=2, num_kv_heads=2, context_length=24,
        init_std=0.3, dtype="float32",
    )  # fmt: skip
    model = decode.synthetic_model(options(model=deep, nnz=12))
    tokens = np.random.default_rng(0).integers(0, 512, (256, 4), dtype=np.int32)
    hidden, _ = jax.jit(InferenceModel.prefill, static_argnums=3)(model, tokens, np.full(256, 4), 4)
    active = deep.ffn_options.rule.active(reference.project(hidden, model.layers[-1].w_gate))
    assert float(active.sum() / 256) == pytest.approx(12, rel=0.15)
