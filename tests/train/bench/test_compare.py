"""Sparse against dense training: the measure on made curves, the controls' orders, a tiny comparison."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import configs
from pallas_kernels import FFNOptions
from sparse_lm import ModelConfig, model_order
from train import cli
from train.bench.compare import CompareOptions, judge, reordered, run
from train.config import DataConfig, OptimizerConfig, TrainConfig
from train.state import build_program

MODEL = ModelConfig(
    vocab_size=257, d_model=32, d_ff=128, num_layers=2, num_heads=4, num_kv_heads=2, context_length=16,
    tied_embeddings=False, qkv_bias=True,
    ffn=FFNOptions("panel(tokens=16, capacity=1.0)", backend="interpret"), token_order="centroids",
    token_clusters=4,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def orders_of_few_tokens():
    """A device has 16 tokens here: enough for the sparse formats to take them in an order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_order, "LEAST_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "curves.json"
    options = CompareOptions(
        model=MODEL, data=DataConfig(paths=(str(corpus),)), optimizer=OptimizerConfig(warmup_steps=1),
        steps=3, batch_size=4, formats=("panel", "auto"), controls=3, nnz=6, json=str(path),
    )  # fmt: skip
    console = Console(record=True, width=120)
    curves, verdict = run(options, console=console)
    return curves, verdict, console.export_text(), json.loads(path.read_text())


def test_all_runs_start_alike_and_learn(compared):
    curves, *_ = compared
    assert list(curves) == ["dense 0", "dense 1", "dense 2", "panel", "auto"]
    for name, curve in curves.items():
        assert len(curve.loss) == len(curve.l0) == len(curve.overflow_share) == 3
        # The same weights and tokens; bf16 rounds in another place.
        np.testing.assert_allclose(curve.loss[0], curves["dense 0"].loss[0], rtol=2e-3, err_msg=name)
        assert curve.loss[-1] < curve.loss[0]
        assert curve.overflow_share == (0, 0, 0)
        np.testing.assert_allclose(curve.l0[0], 6, rtol=0.4)
    assert curves["panel"].loss != curves["dense 0"].loss


def test_the_verdict_is_that_of_the_curves(compared):
    curves, verdict, text, document = compared
    assert verdict == judge({name: curve.loss for name, curve in curves.items()}, verdict.controls)
    for name in ("panel", "auto"):
        where = "within" if verdict.within(name) else "outside"
        assert f"{name} lies {where} the spread of 3 dense runs" in text
        assert document["verdict"]["within"][name] is verdict.within(name)
    assert document["curves"]["panel"]["loss"] == list(curves["panel"].loss)


def test_the_measure():
    """Controls 0, 1 and 5 lie 3, 1.5 and 4.5 from the mean of the other two at the last step."""
    curves = {"a": [1, 0], "b": [1, 1], "c": [1, 5], "near": [1, -2], "far": [9, 2], "bad": [1, np.nan]}
    verdict = judge(curves, ("a", "b", "c"))
    assert verdict.deviations["a"] == 3
    assert verdict.deviations["b"] == 1.5
    assert verdict.spread == verdict.deviations["c"] == 4.5
    assert (verdict.deviations["near"], verdict.steps["near"]) == (4, 2)
    assert (verdict.deviations["far"], verdict.steps["far"]) == (8, 1)
    assert [verdict.within(name) for name in ("near", "far", "bad")] == [True, False, False]


@pytest.mark.parametrize(
    "changes", [{}, {"gated": False}, {"tied_embeddings": True}, {"qkv_bias": False}], ids=str
)
def test_another_order_is_the_same_function_of_other_arrays(changes):
    model = dataclasses.replace(MODEL, dtype="float32", init_std=0.2, ffn=FFNOptions(), **changes)
    program = build_program(
        TrainConfig(steps=1, batch_size=4, model=model, optimizer=OptimizerConfig(warmup_steps=0))
    )
    state = program.init()
    other = reordered(state, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, model.vocab_size)

    @jax.jit
    def logits(variables):
        return nnx.merge(program.graphdef, variables)(tokens)[0]

    want, got = logits(state.variables), logits(other.variables)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(other.params), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.sort(a, axis=None), np.sort(b, axis=None), err_msg=name)
        assert "scale" in name or "bias" in name or (a != b).any(), name


def test_the_small_preset_has_twelve_layers_and_200_steps():
    config = configs.load("small")
    assert (config.model.num_layers, config.model.d_model, config.model.d_ff, config.steps) == (
        12,
        512,
        2048,
        200,
    )
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("compare --controls 2", "controls must be at least 3, to have a spread; got 2"),
        ("compare --nnz -1", "nnz must be at least 0; got -1.0"),
        ("compare --steps 0", "steps must be at least 1"),
        ("compare --config zzz", "config must be one of"),
        ("compare --formats dense", "must be one of"),
    ],
)
def test_mistakes_are_sentences(capsys, command, sentence):
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
