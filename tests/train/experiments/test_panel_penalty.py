"""The penalty on panels against autodiff of its formula, and a run that is trained with it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from pallas_kernels.activations import RELU, rule
from train import cli
from train.experiments import panel_l1 as program
from train.experiments.panel_l1 import Point, union_at
from train.experiments.panel_penalty import panel_ffn, panel_l1

M, D, F, P = 32, 8, 24, 8
RULES = {"relu": RELU, "relu2": rule("relu2"), "drelu": rule("drelu")}


def formula(x, weights, activation, panel):
    """y and the penalty as they are written, for autodiff."""
    w_gate, w_up, w_down = weights
    up = x @ w_up.T
    gate = up if w_gate is None else x @ w_gate.T
    h = {"relu": jax.nn.relu(gate), "relu2": jax.nn.relu(gate) ** 2, "drelu": jax.nn.relu(gate)}[activation]
    if w_gate is not None:
        h = h * (jax.nn.relu(up) if activation == "drelu" else up)
    squares = jnp.sum(h.reshape(-1, panel, h.shape[1]) ** 2, axis=1)
    # The root has no slope at 0, where the penalty's is 0.
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return h @ w_down, jnp.sqrt(panel) * jnp.sum(norms) / len(x)


@pytest.mark.parametrize(
    ("activation", "gated"), [("relu", True), ("relu", False), ("relu2", True), ("drelu", True)]
)
def test_values_and_gradients_are_those_of_the_formula(activation, gated):
    keys = jax.random.split(jax.random.key(0), 5)
    x, dy = (jax.random.normal(key, (M, D)) for key in keys[:2])
    w_gate, w_up, w_down = (jax.random.normal(key, (F, D)) for key in keys[2:])
    w_gate = w_gate.at[0].set(0)  # a neuron that is silent everywhere
    weights = (w_gate if gated else None, w_up.at[0].set(0) if not gated else w_up, w_down)

    def loss(layer):
        def of(x, weights):
            y, penalty = layer(x, weights)
            return jnp.sum(y * dy) + 7.0 * penalty, (y, penalty)

        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)

    def layer(x, weights):
        y, stats = panel_ffn(x, weights, RULES[activation], P)
        return y, stats.l1

    (_, got), got_grads = jax.jit(loss(layer))(x, weights)
    with jax.default_matmul_precision("highest"):
        (_, want), want_grads = jax.jit(loss(lambda x, w: formula(x, w, activation, P)))(x, weights)
    for g, w in zip(jax.tree.leaves((got, got_grads)), jax.tree.leaves((want, want_grads)), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * np.abs(w).max())


def test_it_is_l1_where_a_panels_tokens_agree_and_more_where_one_stands_out():
    alike = jnp.ones((16, 3))
    assert float(panel_l1(alike, 8)) == pytest.approx(3)
    alone = jnp.zeros((16, 3)).at[0, 0].set(16.0)
    assert float(panel_l1(alone, 8)) == pytest.approx(np.sqrt(8))  # l1 is 1


def test_a_small_penalty_reaches_the_gradient_in_16_bits():
    """It is added before the rounding: alone it would vanish beside the gradient of y."""
    keys = jax.random.split(jax.random.key(1), 5)
    x, dy = (jax.random.normal(key, (512, D), jnp.bfloat16) for key in keys[:2])
    weights = tuple(jax.random.normal(key, (F, D)) for key in keys[2:])

    def gradient(scale):
        def loss(weights):
            y, stats = panel_ffn(x, weights, RELU, 128)
            return jnp.sum(y.astype(jnp.float32) * dy) + scale * stats.l1

        return jax.grad(loss)(weights)[1]

    share = 300.0  # some 1e-3 of the first term
    reached = gradient(share) - gradient(0.0)
    alone = (gradient(1e8) - gradient(0.0)) * (share / 1e8)
    assert float(jnp.vdot(reached, alone) / jnp.vdot(alone, alone)) == pytest.approx(1, abs=0.25)


def test_tokens_that_make_no_whole_panel_are_refused():
    with pytest.raises(ValueError, match="whole panels of 8 tokens; got 12 tokens"):
        panel_l1(jnp.ones((12, 3)), 8)


def test_the_curve_is_read_at_equal_cross_entropy():
    unions = {"text": 400.0, "alike": 200.0}
    curve = [
        Point(0, 3.0, 50, unions),
        Point(1e-5, 3.2, 20, {"text": 100.0, "alike": 50.0}),
        Point(1e-6, 3.1, 40, {"text": 500.0, "alike": 300.0}),  # worse than the first in both
    ]
    assert union_at(curve, 2.9, "text") is None
    assert union_at(curve, 3.0, "text") == pytest.approx(400)
    assert union_at(curve, 3.1, "text") == pytest.approx(200)  # half way, on a logarithmic axis
    assert union_at(curve, 3.3, "alike") == 50


def test_a_run_with_it_stands_beside_the_rows_of_a_sweep(corpus, tmp_path, monkeypatch, capsys):
    options = (
        *programs.TINY, "--model.context-length", "64", "--report.evaluate-tokens", "256", "--steps", "3",
        "--l1", "0", "--variants", "--no-figure",
    )  # fmt: skip
    monkeypatch.setattr(program, "PANEL", 32)
    words = ["sweep", "study", *options, "--data.paths", str(corpus), "--workdir", str(tmp_path)]
    assert cli.main(words) == 0
    assert program.main(["--sweep", str(tmp_path), "--strengths", "0", "100"]) == 0
    found = json.loads((tmp_path / "panel_l1.json").read_text())
    (dense,) = found["l1"]
    free, penalised = found["panel_l1"]
    assert free["ce"] == pytest.approx(dense["ce"], abs=1e-3), "without a weight it is the same run"
    assert penalised["nnz"] < 0.98 * free["nnz"]
    assert penalised["of_l1"]["text"] == penalised["unions"]["text"] / dense["unions"]["text"]
    assert (tmp_path / "panel_l1.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "panel_l1.png").read_bytes().startswith(b"\x89PNG")
    records = (tmp_path / "panel-l1-100" / "metrics.jsonl").read_bytes()
    assert program.main(["--sweep", str(tmp_path), "--strengths", "100"]) == 0
    assert (tmp_path / "panel-l1-100" / "metrics.jsonl").read_bytes() == records, "it is not run again"
    assert dataclasses.asdict(Point(**dense)) == dense


def test_a_directory_without_a_sweep_is_refused(tmp_path, capsys):
    assert program.main(["--sweep", str(tmp_path)]) == 1
    assert "--sweep must name the directory of a sweep with rows of λ" in capsys.readouterr().err
