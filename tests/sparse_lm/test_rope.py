"""Rotary frequencies by their definitions; what transformers computes with them is in convert/."""

import json
import math

import numpy as np
import pytest

from pallas_kernels import FFNOptions
from sparse_lm import ModelConfig
from sparse_lm.rope import RopeScaling, frequencies
from train.config import TrainConfig
from train.config_json import from_dict, to_dict

PLAIN = 100.0 ** (-np.arange(8) / 8)


def test_plain_and_linear():
    np.testing.assert_allclose(frequencies(16, 100.0, RopeScaling()), PLAIN, rtol=1e-6)
    np.testing.assert_allclose(frequencies(16, 100.0, RopeScaling("linear", 4.0)), PLAIN / 4, rtol=1e-6)


@pytest.mark.parametrize("scaling", [RopeScaling("llama3", 8.0, 64), RopeScaling("yarn", 8.0, 64)])
def test_fast_pairs_are_kept_and_slow_ones_are_stretched(scaling):
    found = frequencies(16, 1e6, scaling)
    plain = frequencies(16, 1e6, RopeScaling())
    ratio = found / plain
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 8)
    assert np.all(np.diff(ratio) <= 1e-7)


def test_only_yarn_scales_what_is_rotated():
    assert RopeScaling("yarn", 4.0, 64).amplitude == pytest.approx(0.1 * math.log(4) + 1)
    assert RopeScaling("yarn", 4.0, 64, attention_factor=0.7).amplitude == 0.7
    assert RopeScaling("llama3", 4.0, 64, attention_factor=0.7).amplitude == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "longrope"}, "must be one of none, linear, dynamic, llama3, yarn; got 'longrope'"),
        ({"kind": "linear", "factor": 0.5}, "at least 1; got 0.5"),
        ({"kind": "yarn", "factor": 2.0}, "original-context must be at least 1 for yarn; got None"),
        ({"low_freq_factor": 4.0}, "under high-freq-factor=4.0; got 4.0"),
        ({"beta_slow": 40.0}, "got 40.0 and 32.0"),
        ({"attention_factor": 0.0}, "finite positive number or None; got 0.0"),
    ],
)
def test_what_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        RopeScaling(**fields)


def test_dynamic_scaling_ends_where_it_would_begin():
    scaling = RopeScaling("dynamic", 2.0, 32)
    assert ModelConfig(context_length=32, rope_scaling=scaling).rope_scaling is scaling
    with pytest.raises(ValueError, match=r"must not go beyond .*original-context=32 .*; got 33"):
        ModelConfig(context_length=33, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation": "gelu"}, "model.activation: .*got 'gelu'.*; silu is for a dense baseline"),
        ({"activation": "silu"}, r"model.sparsity.l1 must be 0 with model.activation=silu.*; got 2e-05"),
        (
            {"activation": "silu", "ffn": FFNOptions("panel")},
            "model.ffn.format must be dense or auto .*panel",
        ),
        ({"activation": "threshold(-1.0)"}, r"model.activation: threshold\(...\) must hold a finite number"),
        ({"ffn": FFNOptions(activation="relu2")}, "model.ffn.activation must be left out"),
        ({"activation": "drelu", "gated": False}, "rectifies both sides of a gate"),
        ({"logit_divisor": 0.0}, "model.logit-divisor must be a finite positive number; got 0.0"),
    ],
)
def test_a_model_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**fields)


def test_a_configuration_survives_json():
    model = ModelConfig(
        activation="threshold(0.02)", rope_scaling=RopeScaling("yarn", 4.0, 512), residual_scale=0.2
    )
    config = TrainConfig(model=model)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
