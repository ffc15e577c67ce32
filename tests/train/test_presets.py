"""Presets build, and the paper's are the paper's."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

import configs
from sparse_lm import SparseLM
from train.config import TrainConfig
from train.config_json import from_dict, to_dict
from train.errors import UserError
from train.run.loop import run

PAPER = {
    "0p5b": (8, 10_000, 0.5e9),
    "1b": (18, 20_000, 1e9),
    "1p5b": (28, 30_000, 1.5e9),
    "2b": (38, 40_000, 2e9),
}


def parameters(config: TrainConfig) -> int:
    model = nnx.eval_shape(lambda: SparseLM(config.model, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_names():
    assert set(configs.names()) == {"small", "study", "tiny", *PAPER}


@pytest.mark.parametrize("name", configs.names())
def test_each_preset_is_a_run_of_its_own_directory(name):
    config = configs.load(name)
    assert isinstance(config, TrainConfig)
    assert config.workdir == f"runs/{name}"
    assert config.optimizer.warmup_steps < config.steps


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models(name):
    num_layers, steps, size = PAPER[name]
    config = configs.load(name)
    model = config.model
    assert (model.num_layers, config.steps) == (num_layers, steps)
    # Per layer four attention and three feed-forward matrices and two norms; the embedding is tied.
    expected = 49_152 * 2048 + num_layers * (4 * 2048 * 2048 + 3 * 2048 * 5632 + 2 * 2048) + 2048
    assert parameters(config) == expected
    assert abs(expected / size - 1) < 0.03
    assert config.batch_size * model.context_length == 1 << 20
    assert model.sparsity.l1 == 2e-5
    assert model.dtype == "bfloat16"


def test_tiny_is_small_and_needs_no_file():
    config = configs.load("tiny")
    assert parameters(config) < 5e6
    assert config.data.paths == ()
    assert config.data.tokenizer in ("byte", "bpe")
    assert config.model.sparsity.l1 > 0


def test_study_is_small_enough_for_minutes_and_large_enough_to_compare():
    config = configs.load("study")
    model = config.model
    assert 60e6 < parameters(config) < 120e6
    assert model.d_ff % 128 == 0
    assert 2.5 < model.d_ff / model.d_model < 3.5  # the paper's is 2.75
    assert config.steps * config.batch_size * model.context_length < 50e6


@pytest.mark.parametrize("name", ["study", *PAPER])
def test_presets_too_large_for_the_shipped_corpus_demand_another(name, tmp_path):
    config = configs.load(name)
    with pytest.raises(UserError, match=r"data.paths must name the corpus to train on.* got none"):
        run(dataclasses.replace(config, workdir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "hint"), [("1.5b", "did you mean 1p5b"), ("tinny", "did you mean tiny")])
def test_an_unknown_preset_names_the_nearest(name, hint):
    with pytest.raises(UserError, match=hint):
        configs.load(name)


@pytest.mark.parametrize("name", ["", "_paper", "../tiny", "zzz"])
def test_what_is_no_preset(name):
    with pytest.raises(UserError, match="must be one of 0p5b, 1b, 1p5b, 2b, small, study, tiny"):
        configs.load(name)


def test_presets_go_through_json():
    for name in configs.names():
        config = configs.load(name)
        assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
