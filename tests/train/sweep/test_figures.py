"""What a sweep measures of a row: unions against numpy, speeds and energy at a size of milliseconds."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.bench import timing
from sparse_lm import clusters, order
from train.bench import energy, nvml
from train.run.checkpoint_reading import load_for_inference
from train.sweep import report, speed
from train.sweep.figures import count_unions, read_quality
from train.sweep.results import Results
from train.sweep.rows import Sweep
from train.sweep.speed import DENSE, Cost, Speed, SpeedTest, shape_of


@pytest.fixture(scope="module")
def model(finished):
    return load_for_inference(finished.workdir)[0]


@pytest.fixture(scope="module")
def sequences():
    return np.random.default_rng(0).integers(0, 257, (12, 16), dtype=np.int32)


def masks(model, tokens):
    """(L, M, F) bool, active neurons by numpy."""
    entering = np.asarray(model.ffn_inputs(jnp.asarray(tokens)))
    gates = np.asarray(model.blocks.ffn.w_gate[...])
    return np.einsum("lbsd,lfd->lbsf", entering, gates).reshape(len(gates), -1, gates.shape[1]) > 0


def test_unions_are_those_of_numpy(model, sequences):
    found = count_unions(model, sequences, panel=8)
    measured, others = sequences[:6], jnp.asarray(sequences[6:])
    assert found.tokens == measured.size == 96
    fitted = jnp.zeros((64, 32)), jnp.zeros(64)
    centroids, _ = clusters.follow(*fitted, model.first_ffn_input(others), rounds=12)
    first = model.first_ffn_input(jnp.asarray(measured))
    places = order.by_centroids(first, centroids, jnp.asarray(measured), vocab_size=257).order.reshape(-1)
    for layer, mask in enumerate(masks(model, measured)):
        for name, rows in {"text": mask, "alike": mask[np.asarray(places)]}.items():
            want = rows.reshape(-1, 8, 64).any(axis=1).sum(axis=1).mean()
            assert getattr(found, name)[layer] == pytest.approx(want, rel=1e-6), name


def test_a_panel_of_one_token_is_its_nnz_in_any_order(model, sequences):
    found = count_unions(model, sequences, panel=1)
    want = masks(model, sequences[:6]).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(found.text, want, rtol=1e-6)
    np.testing.assert_allclose(found.alike, want, rtol=1e-6)


def test_quality_is_that_of_the_run(finished):
    quality = read_quality(finished.workdir, d_ff=64)
    report = finished.result.evaluation
    assert (quality.ce, quality.nnz, quality.evaluated_tokens) == (report.ce, report.l0, report.tokens)
    dead = np.asarray(finished.states[8].activity.silent_tokens) >= 256
    np.testing.assert_allclose(quality.dead_per_layer, dead.mean(axis=1))
    assert quality.tokens_per_second > 0


@pytest.fixture
def counter(monkeypatch):
    """A GPU with an energy counter: two joules for a dense forward and one and a half for any other."""
    gpu = types.SimpleNamespace(moves=True)

    def measure(found, calls, **_):
        assert found is gpu
        if not gpu.moves:
            raise RuntimeError("the counter must move")
        power = energy.Power(400.0, 1.0, 50, 1500.0)
        joules = {name: 2.0 if name == DENSE else 1.5 for name in calls}
        used = {name: energy.Energy(power, 5.0, 200, joules[name], 2.5) for name in calls}
        return energy.EnergyReport(power, 2.0, used)

    monkeypatch.setattr(nvml, "find", lambda: (gpu, ""))
    monkeypatch.setattr(speed, "measure_energy", measure)
    return gpu


def test_speed_of_a_row_is_beside_dense_and_changes_no_weight(model, sequences, counter, monkeypatch):
    measure = timing.measure
    monkeypatch.setattr(timing, "measure", lambda calls, **_: measure(calls, rounds=2, chain_ms=0.0))
    tokens = np.concatenate([sequences, sequences[:, :1]], axis=1)
    variables = nnx.to_pure_dict(nnx.split(model)[1])
    test = SpeedTest(shape_of(model.config), ["auto"], tokens, tokens[:4])
    found = test.measure(variables)
    assert (found.forward_tokens, found.train_tokens) == (12 * 16, 4 * 16)
    assert list(found.costs) == [DENSE, "auto"]
    for cost in found.costs.values():
        assert (len(cost.forward_ms), len(cost.train_ms)) == (2, 2)
        assert cost.train_bytes > 0
    assert found.forward(DENSE) == found.train(DENSE) == found.memory(DENSE) == 1
    assert found.energy("auto") == 0.75
    assert Speed.from_dict(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert test.no_energy == ""
    counter.moves = False
    again = test.measure(variables)  # the weights are still there
    assert again.energy("auto") is None
    assert test.no_energy == "the counter must move"


def test_speeds_are_columns_of_the_table(finished, tmp_path):
    config = dataclasses.replace(
        finished.config, workdir=str(tmp_path), model=dataclasses.replace(finished.config.model)
    )
    sparse = dataclasses.replace(config.model.sparsity, schedule="constant", target_l0=0.0, revive="off")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, sparsity=sparse))
    results = Results(Sweep(config, l1=(0.0, 1.0), variants=()), "tiny")
    costs = {
        "dense": Cost((4.0, 5.0, 4.0), (12.0,), 1000, 2.0),
        "auto": Cost((2.0, 1.0, 2.0), (8.0,), 750, 1.5),
    }
    for result in results.rows:
        result.quality = read_quality(finished.workdir, d_ff=64)
    results.rows[1].speed = Speed("gpu", 1, 1, costs)
    head, _, dense, timed = report.markdown(results).splitlines()[2:6]
    assert head.endswith("| forward, auto | train, auto | memory, auto | energy, auto |")
    assert timed.endswith("| 2.00× | 1.50× | 75% | 75% |")
    assert dense.endswith("|  |  |  |  |")
    report.draw(results, tmp_path / "sweep.svg")
    assert "times as fast as dense (auto)" in (tmp_path / "sweep.svg").read_text()
