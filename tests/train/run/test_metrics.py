"""The metrics file, TensorBoard, speed, and the share of the peak."""

import json
import math
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from sparse_lm import ModelConfig
from sparse_lm.model import flops_per_token
from train.errors import UserError
from train.run.metrics import (
    MetricsWriter,
    Speed,
    is_finite,
    model_flops_utilisation,
    peak_flops,
    to_record,
)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_record_is_plain_json():
    record = to_record(
        3, {"ce": jnp.float32(1.5), "max_nnz": jnp.int32(7), "l0_per_layer": jnp.array([1.0, 2.0])}
    )
    assert json.loads(json.dumps(record)) == {"step": 3, "ce": 1.5, "max_nnz": 7, "l0_per_layer": [1.0, 2.0]}


def test_a_step_is_read_once_whatever_it_counts(monkeypatch):
    """One wait for the device, not one for each counter; the loop makes one record a step."""
    reads = []
    monkeypatch.setattr("train.run.metrics.jax.device_get", lambda tree: reads.append(tree) or {"ce": 0.0})
    to_record(1, {"ce": jnp.float32(1.5), "overflow_rows": jnp.int32(7), "l0_per_layer": jnp.zeros(2)})
    assert [set(read) for read in reads] == [{"ce", "overflow_rows", "l0_per_layer"}]


@pytest.mark.parametrize(
    ("loss", "norm", "expected"), [(1, 1, True), (math.nan, 1, False), (1, math.inf, False)]
)
def test_finite_means_loss_and_gradient(loss, norm, expected):
    assert is_finite({"loss": loss, "grad_norm": norm}) is expected


def test_resumed_file_has_no_step_twice_and_no_broken_line(tmp_path):
    writer = MetricsWriter(tmp_path, start=0, tensorboard=False)
    for step in range(1, 6):
        writer.write({"step": step, "ce": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{}\n{"step": 6, "c')
    writer = MetricsWriter(tmp_path, start=3, tensorboard=False)
    writer.write({"step": 4, "ce": 40.0})
    writer.close()
    assert lines(tmp_path) == [
        {"step": 1, "ce": 1.0}, {"step": 2, "ce": 2.0}, {"step": 3, "ce": 3.0}, {"step": 4, "ce": 40.0}
    ]  # fmt: skip


def test_what_is_dropped_is_kept_beside_the_file(tmp_path):
    """Steps come again with other options, or the file was never this program's: neither may be lost."""
    first, second = tmp_path / "metrics.jsonl", tmp_path / "metrics.dropped.jsonl"
    whole, torn = b'{"step": 1}\n', b'caf\xe9\n{"step": 2}\n{"step": 3, "c'
    first.write_bytes(whole + torn)
    for _ in range(2):  # the second start has nothing to drop, and adds nothing
        MetricsWriter(tmp_path, start=1, tensorboard=False).close()
        assert first.read_bytes() == whole
        assert second.read_bytes() == torn + b"\n"


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "none", start=0, tensorboard=True, primary=False)
    writer.write({"step": 1})
    writer.close()
    assert not (tmp_path / "none").exists()


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            written.append((directory, purge_step))

        def add_scalar(self, *point):
            written.append(point)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = MetricsWriter(tmp_path, start=3, tensorboard=True)
    writer.write({"step": 4, "ce": 2.0, "l0_per_layer": [5.0, 6.0], "evaluation": {"ce": 3.0}})
    writer.close()
    assert written == [
        (str(tmp_path / "tensorboard"), 4),
        ("ce", 2.0, 4), ("l0_per_layer/0", 5.0, 4), ("l0_per_layer/1", 6.0, 4), ("evaluation/ce", 3.0, 4),
        "closed",
    ]  # fmt: skip


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'sparse-lm\[tensorboard\]'"):
        MetricsWriter(tmp_path, start=0, tensorboard=True)


def test_speed_leaves_out_the_first_step_and_pauses(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    speed = Speed(start=10, steps=20, tokens_per_step=1000)
    clock[0] += 50  # compilation
    speed.done(11)
    assert speed.tokens_per_second(11) is None
    assert speed.seconds_left(11) is None
    clock[0] += 2
    with speed.pause():
        clock[0] += 30
    speed.done(15)
    assert speed.tokens_per_second(15) == pytest.approx(1000 * 4 / 2)
    assert speed.seconds_left(15) == pytest.approx(5 * 0.5)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("cpu", None),
        ("NVIDIA L400", None),
    ],
)  # fmt: skip
def test_peak_is_known_or_left_out(kind, peak):
    assert peak_flops(kind) == peak


def test_utilisation_is_of_all_devices(monkeypatch):
    config = ModelConfig()
    assert model_flops_utilisation(config, 1e5) is None
    device = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda: [device] * 2)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    expected = 1e5 * flops_per_token(config, 2048) / (2 * 989.4e12)
    assert model_flops_utilisation(config, 1e5) == pytest.approx(expected)
    assert model_flops_utilisation(ModelConfig(dtype="float32"), 1e5) is None
