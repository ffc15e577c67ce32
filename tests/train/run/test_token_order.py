"""A training that its token order follows: same losses, same after a restart, saved with the model."""

import dataclasses
import itertools
import os
import signal

import jax
import numpy as np
import pytest
import tiny_runs

from sparse_lm import model_order
from sparse_lm.convert import load_params, open_hf
from train.config import ParallelConfig, ReportConfig
from train.evaluate import evaluate_checkpoint
from train.run import convert
from train.run.checkpoint_reading import load_for_inference
from train.run.hooks import Hook
from train.run.loop import run

MODEL = dataclasses.replace(tiny_runs.MODEL, token_order="centroids", token_clusters=6)


@pytest.fixture(scope="module", autouse=True)
def orders_of_few_tokens():
    """A device has 16 or 64 tokens of a micro-batch here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_order, "LEAST_TOKENS", 16)
        yield


def config(corpus, workdir, **changes):
    return tiny_runs.tiny_config(corpus, workdir, model=MODEL, refresh_order_every=3, **changes)


@pytest.fixture(scope="module")
def ordered(corpus, tmp_path_factory):
    """The workdir of a whole run, and its state after every step."""
    workdir = tmp_path_factory.mktemp("ordered")
    report = ReportConfig(every=1, evaluate_every=4, evaluate_tokens=128, samples=("the sum",))
    result, states = tiny_runs.run_recording(config(corpus, workdir, report=report))
    assert result.outcome == "finished"
    return workdir, states


def losses(workdir):
    return [record["loss"] for record in tiny_runs.read_records(workdir) if "loss" in record]


def test_the_losses_are_those_of_the_text_order(ordered, finished):
    np.testing.assert_allclose(losses(ordered[0]), losses(finished.workdir), rtol=1e-5)


def test_centroids_are_renewed_every_third_step(ordered):
    centroids = [state.buffers["token_order"]["centroids"] for state in ordered[1].values()]
    changed = [bool((one != other).any()) for one, other in itertools.pairwise(centroids)]
    assert changed == [False, False, True, False, False, True, False]


def test_a_checkpoint_gives_the_centroids_to_inference(ordered):
    workdir, states = ordered
    model, _, _, step = load_for_inference(workdir)
    saved = states[step].buffers["token_order"]
    np.testing.assert_array_equal(model.token_order.centroids[...], saved["centroids"])
    np.testing.assert_array_equal(model.token_order.weights[...], saved["weights"])


def test_what_is_done_with_a_trained_model(ordered, tmp_path):
    """It is sampled from during the run, and evaluated and exported from its checkpoint."""
    workdir, states = ordered
    records = tiny_runs.read_records(workdir)
    samples = [record["samples"] for record in records if "samples" in record]
    assert [text.startswith("the sum") for (text,) in samples] == [True, True]
    evaluations = [record["evaluation"] for record in records if "evaluation" in record]
    assert evaluate_checkpoint(workdir).ce == pytest.approx(evaluations[-1]["ce"], rel=1e-6)
    convert.to_hf(str(workdir), tmp_path / "out")
    with open_hf(tmp_path / "out") as weights:
        exported = load_params(weights)
    jax.tree.map(np.testing.assert_array_equal, exported, states[tiny_runs.STEPS].params)


def test_a_stopped_run_goes_on_bit_for_bit(ordered, corpus, tmp_path):
    def stop(step, state):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    settings = config(corpus, tmp_path)
    assert run(settings, hooks=(Hook(stop, 1),)).outcome == "stopped"
    _, states = tiny_runs.run_recording(settings)
    assert min(states) == 6
    last, want = states[tiny_runs.STEPS], ordered[1][tiny_runs.STEPS]
    for (name, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(last), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(leaf, wanted, err_msg=str(name))


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(mode="pmap"), ParallelConfig(shard="fsdp")], ids=["pmap", "fsdp"]
)
def test_on_several_devices(parallel, ordered, corpus, tmp_path):
    run(config(corpus, tmp_path, parallel=parallel))
    np.testing.assert_allclose(losses(tmp_path), losses(ordered[0]), rtol=1e-5)
