"""Sparse against dense training: the measure on made curves, the controls' orders, a tiny comparison."""

import dataclasses
import json
from typing import get_args

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
from train.bench.compare_runs import Contestant, config_of
from train.config import DataConfig, OptimizerConfig, TrainConfig
from train.parallel import Layout
from train.state import build_program

MODEL = ModelConfig(
    vocab_size=257, d_model=32, d_ff=128, num_layers=2, num_heads=4, num_kv_heads=2, context_length=16,
    tied_embeddings=False, qkv_bias=True,
    ffn=FFNOptions("panel(tokens=16, capacity=1.0)", backend="interpret"), token_clusters=4,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(warmup_steps=1)


@pytest.fixture(scope="module", autouse=True)
def orders_of_few_tokens():
    """A device has 32 tokens here: enough for the sparse formats to take them in an order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_order, "LEAST_TOKENS", 16)
        yield


def compare(corpus, directory, **options):
    """Curves, verdict, what was printed, and the JSON file."""
    path = directory / "curves.json"
    options = CompareOptions(
        data=DataConfig(paths=(str(corpus),)), optimizer=OPTIMIZER, batch_size=8, controls=3, nnz=6,
        json=str(path), **options,
    )  # fmt: skip
    console = Console(record=True, width=120, soft_wrap=True)
    curves, verdict = run(options, console=console)
    return curves, verdict, console.export_text(), json.loads(path.read_text())


@pytest.fixture(scope="module")
def refreshed():
    """The centroids before and after each renewal, filled by ``compared``."""
    return []


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory, refreshed):
    order_refresh = Layout.order_refresh

    def observed(self, program):
        refresh = order_refresh(self, program)

        def observe(step, state, tokens):
            before = jax.device_get(state.buffers)
            state = refresh(step, state, tokens)
            if before:
                refreshed.append((step, before, jax.device_get(state.buffers)))
            return state

        return observe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "order_refresh", observed)
        directory = tmp_path_factory.mktemp("compare")
        return compare(corpus, directory, model=MODEL, steps=3, formats=("panel", "order"))


def test_all_runs_start_alike_and_learn(compared):
    curves, *_ = compared
    assert list(curves) == ["dense 0", "dense 1", "dense 2", "panel", "order"]
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
    for name in ("panel", "order"):
        where = "within" if verdict.within(name) else "outside"
        assert f"{name} lies {where} the spread of 3 dense runs" in text
        assert document["verdict"]["within"][name] is verdict.within(name)
    assert document["curves"]["panel"]["loss"] == list(curves["panel"].loss)


def test_an_order_moves_tokens_and_follows_the_training(compared, refreshed):
    curves, _, text, document = compared
    panel, order = curves["panel"], curves["order"]
    assert (panel.token_order, order.token_order) == ("text", "centroids")
    assert order.l0[0] == panel.l0[0]
    assert order.pairs[0] != panel.pairs[0]  # the same tokens in other panels
    assert curves["dense 0"].pairs == (0, 0, 0)
    assert "order took the tokens in the order of centroids" in text
    assert document["curves"]["order"]["token_order"] == "centroids"
    assert [step for step, *_ in refreshed] == [1, 2, 3]
    changed = [
        any((a != b).any() for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for _, *pair in refreshed
    ]
    assert changed == [True, False, False]  # every 50 steps, from the first one on


def test_the_contestant_plan_alone_has_one():
    """`auto` is what each call decides for itself."""
    runs = (*get_args(Contestant), "dense")
    assert [name for name in runs if config_of(name, TrainConfig()).plan != "off"] == ["plan"]


@pytest.fixture(scope="module")
def planned(corpus, tmp_path_factory):
    """Panels of 16 of these tokens activate a tenth of the neurons."""
    model = dataclasses.replace(
        MODEL, d_ff=512, num_layers=3, ffn=FFNOptions("auto(tokens=16)", backend="interpret")
    )
    directory = tmp_path_factory.mktemp("plan")
    return compare(corpus, directory, model=model, steps=5, formats=("plan",), plan_every=1)


def test_a_plan_that_moves_trains_the_dense_curve(planned):
    curves, verdict, text, document = planned
    plan = curves["plan"]
    (first, dense), (later, panels) = plan.plans.items()
    assert (first, dense) == (1, "3 × dense(tokens=16)")
    # Two windows of a step each speak for it; the second is read while the third step runs.
    assert (later, panels) == (4, "3 × panel(tokens=16, capacity=0.5)")
    assert document["curves"]["plan"]["plans"] == {"1": dense, "4": panels}
    assert "step 4: layers run as 3 × panel(tokens=16" in text
    assert f"plan changed the formats of layers once: at first {dense}; from step 4, {panels}" in text
    np.testing.assert_allclose(plan.loss, curves["dense 0"].loss, rtol=2e-3)
    assert plan.overflow_share == (0,) * 5
    assert verdict.within("plan") is document["verdict"]["within"]["plan"]


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
        ("compare --plan-every 0", "plan-every must be at least 1; got 0"),
    ],
)
def test_mistakes_are_sentences(capsys, command, sentence):
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "plan",
            "plan needs a device and sizes for which format=auto decides between panels and dense",
        ),
        ("order --model.context-length 1", "order needs at least 16 tokens of a micro-batch on each device"),
        ("order --model.token-order auto", "model.activation=relu do not with model.token-order=auto"),
    ],
)
def test_what_would_be_none_is_refused_at_once(capsys, options, sentence):
    assert cli.main(f"compare --config tiny --formats {options}".split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
