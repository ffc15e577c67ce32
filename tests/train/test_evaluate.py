"""Held-out figures against their definitions."""

import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from train.data.batches import heldout_batches
from train.data.evaluation_text import read_evaluation_text
from train.errors import UserError
from train.evaluate import evaluate_checkpoint
from train.run.checkpoint_reading import load_for_inference, read_saved_data


@pytest.fixture(scope="module")
def report(finished):
    return evaluate_checkpoint(finished.workdir, tokens=128)


def trained_on(finished):
    return read_saved_data(finished.result.checkpoint).corpus


def test_figures_are_what_they_are_called(finished, report):
    model, tokenizer, config, _ = load_for_inference(finished.workdir)
    text = read_evaluation_text(config.data, tokenizer, trained_on(finished).threshold, tokens=128)
    batches = heldout_batches(text.heldout, text.weights, context_length=16, tokens=128, batch_size=8)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    logits, stats = model(tokens[:, :-1])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nats = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).astype(np.float64)
    assert report.tokens == nats.size
    assert report.ce == pytest.approx(nats.mean(), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.ce))
    share = np.bincount(tokens[:, 1:].ravel())[tokens[:, 1:]] / nats.size  # of each token's own kind
    assert report.unigram_entropy == pytest.approx(-np.log(share).mean())
    size = sum(batch["bytes"] for batch in batches)
    assert report.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-5)
    np.testing.assert_allclose(report.l0_per_layer, stats.l0, rtol=1e-5)
    np.testing.assert_array_equal(report.max_nnz_per_layer, stats.max_nnz)
    np.testing.assert_allclose(report.silent_fraction_per_layer, np.mean(stats.neuron_hits == 0, axis=-1))


def test_run_evaluates_its_last_step_the_same_way(finished, report):
    # The run's four devices each compute a quarter of the batch.
    assert finished.result.evaluation.ce == pytest.approx(report.ce, rel=1e-5)
    assert finished.result.evaluation.tokens == report.tokens


def test_json_has_every_figure(report):
    values = json.loads(json.dumps(report.to_dict()))
    assert values["ce"] == report.ce
    assert values["l0"] == pytest.approx(np.mean(report.l0_per_layer))
    assert {"step", "tokens", "perplexity", "bits_per_byte", "silent_fraction", "max_nnz_per_layer"} <= set(
        values
    )


def test_table_has_a_row_a_layer(report):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    assert f"CE {report.ce:.4f}" in text
    assert f"{report.l0_per_layer[1]:.1f}" in text
    assert str(max(report.max_nnz_per_layer)) in text


@pytest.mark.parametrize("option", [{"tokens": 0}, {"batch_size": -1}])
def test_numbers_under_one_are_refused(finished, option):
    with pytest.raises(UserError, match=r"must be at least 1; got (0|-1)"):
        evaluate_checkpoint(finished.workdir, **option)
