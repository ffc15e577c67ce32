"""Configurations as JSON: what goes in comes out, also of the versions before."""

import dataclasses
import json

import pytest

from pallas_kernels import Auto, Dense, FFNOptions, Hybrid, Panel, Threshold, Twell
from sparse_lm import ModelConfig
from train.config import OptimizerConfig, TrainConfig
from train.config_json import from_dict, to_dict


def through_json(kind, values):
    return from_dict(kind, json.loads(json.dumps(values)))


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("auto", "auto"),
        (Auto(tokens=64), "auto(tokens=64)"),
        (Dense(), "dense"),
        (Dense(tokens=64), "dense(tokens=64)"),
        (Panel(), "panel"),
        ("panel( capacity=0.5,tokens=32 )", "panel(tokens=32, capacity=0.5)"),
        (Hybrid(width=48, backup_rows=8), "hybrid(width=48, backup_rows=8)"),
        (Twell(compression=4), "twell(compression=4)"),
    ],
)
def test_a_format_is_text(format, text):
    config = TrainConfig(model=ModelConfig(ffn=FFNOptions(format=format, backend="xla")))
    values = to_dict(config)
    assert values["model"]["ffn"]["format"] == text
    again = through_json(TrainConfig, values)
    assert again.model.ffn.layout == config.model.ffn.layout
    assert to_dict(again) == values


@pytest.mark.parametrize("activation", ["drelu", Threshold(0.1)])
def test_an_activation_is_text(activation):
    options = FFNOptions(activation=activation)
    assert through_json(FFNOptions, to_dict(options)) == options


@pytest.mark.parametrize(
    ("format", "layout"),
    [
        ("auto", Auto(tokens=64)),
        ("dense", Dense()),
        ("panel", Panel(tokens=64, capacity=0.5)),
        ("hybrid", Hybrid(width=96, backup_rows=4, tile=128)),
        ("twell", Twell(tile=128, compression=4, backup_rows=4)),
    ],
)
def test_configurations_of_the_version_before(format, layout):
    """Every format's options stood beside its name, and held-out text was counted in micro-batches."""
    now = TrainConfig(
        batch_size=8,
        model=ModelConfig(context_length=16, ffn=FFNOptions(format=layout)),
        optimizer=OptimizerConfig(accumulation=2),
    )
    values = to_dict(now)
    values["report"] = {"every": 10, "evaluate_every": 1000, "evaluate_batches": 3, "tensorboard": False}
    values["model"]["ffn"] = {
        "format": format, "backend": "auto", "weight_gradients": "auto", "tile": 128, "compression": 4,
        "width": 96, "backup_rows": 4, "panel": 64, "capacity": 0.5,
    }  # fmt: skip
    config = through_json(TrainConfig, values)
    assert config.model.ffn == FFNOptions(format=str(layout))
    assert config.report == dataclasses.replace(now.report, evaluate_tokens=3 * 4 * 16)


def test_a_field_that_no_version_had():
    with pytest.raises(TypeError, match="panels"):
        from_dict(FFNOptions, {"format": "panel", "panels": 64})
