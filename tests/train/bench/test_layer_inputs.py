"""What enters the feed-forward layers, saved: what the layer makes of it is what the model's
own layer reported."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparse_ffn
from pallas_kernels.bench import recorded
from train import cli
from train.data.batches import heldout_batches
from train.data.evaluation_text import read_evaluation_text
from train.run.checkpoint_files import find_checkpoint
from train.run.checkpoint_reading import load_for_inference, read_saved_data


@pytest.fixture(scope="module")
def saved(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "layers.npz"
    arguments = ["--checkpoint", str(finished.workdir), "--out", str(out), "--tokens", "79"]
    assert cli.main(["layer-inputs", *arguments]) == 0
    return out


def test_each_layer_is_the_models_own(finished, saved):
    model, tokenizer, config, _ = load_for_inference(finished.workdir)
    threshold = read_saved_data(find_checkpoint(finished.workdir)).corpus.threshold
    text = read_evaluation_text(config.data, tokenizer, threshold, tokens=64)
    batches = heldout_batches(text.heldout, text.weights, context_length=16, tokens=64, batch_size=1)
    tokens = np.concatenate([batch["tokens"][:, :-1] for batch in batches])
    _, stats = model(jnp.asarray(tokens))
    cases = recorded.cases(saved)
    assert [(case.layer, case.tokens, case.dtype) for case in cases] == [
        (0, 64, "float32"),
        (1, 64, "float32"),
    ]
    for case in cases:
        _, found = sparse_ffn(**case.arrays())
        np.testing.assert_array_equal(found.neuron_hits, stats.neuron_hits[case.layer])
        assert float(found.l1) == pytest.approx(float(stats.l1[case.layer]), rel=1e-5)


def test_a_layer_alone_and_its_figures(finished, tmp_path, capsys):
    out = tmp_path / "one.npz"
    command = ["layer-inputs", "--checkpoint", str(finished.workdir), "--out", str(out), "--layers", "1"]
    assert cli.main(command) == 0
    [case] = recorded.cases(out)
    _, stats = sparse_ffn(**case.arrays())
    said = capsys.readouterr().out
    assert f"{float(stats.l0):.1f}" in said
    assert f"{case.tokens:,} tokens of each layer: {out}" in said
    assert "bench layers forward --inputs" in said


def test_sequences_in_parts_are_the_sequences_at_once(finished, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("train.bench.layer_inputs._TOKENS_AT_ONCE", 48)
    out = tmp_path / "parts.npz"
    arguments = ["--checkpoint", str(finished.workdir), "--out", str(out), "--tokens", "79"]
    assert cli.main(["layer-inputs", *arguments]) == 0
    for one, other in zip(recorded.cases(out), recorded.cases(saved), strict=True):
        np.testing.assert_allclose(one.arrays()["x"], other.arrays()["x"], rtol=1e-5, atol=1e-6)
