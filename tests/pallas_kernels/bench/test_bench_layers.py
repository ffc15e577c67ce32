"""The benchmark of whole layers on a tiny one: what it compares, what it prints, and its exit status."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Auto, Dense, Panel
from pallas_kernels import device as device_lib
from pallas_kernels.bench import layers as bench_layers
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.inputs import PROFILES, Activity, ffn_inputs, like_trained, measure
from pallas_kernels.bench.shapes import FFNShape
from pallas_kernels.device import Device

CASE = Case(FFNShape("tiny", 32, 64), 32, Activity(8.0))
COMPARED = bench_layers.layers(["dense", "auto"])


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_a_case_is_checked_timed_and_shown(direction):
    result = bench_layers.run(CASE, direction, COMPARED, rounds=2, chain_ms=1.0)
    assert not result.failures
    rows = {row.name: row for row in result.rows}
    assert {"dense", "auto"} <= rows.keys()
    assert rows["auto"].error == pytest.approx(1, abs=0.5)
    assert all(len(row.timing.samples_ms) == 2 for row in result.rows)
    assert result.measured["mean_nnz"] == pytest.approx(8, rel=0.2)
    text = bench_layers.table(result)
    assert text.startswith(f"{direction}: 32 tokens, D 32, F 64, gated, bfloat16")
    assert "| auto |" in text
    assert json.loads(json.dumps(bench_layers.to_json([result], ["x"])))["cases"][0]["direction"] == direction


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_a_wrong_format_is_reported(monkeypatch, direction):
    honest = bench_layers.contestants

    def one_is_wrong(direction, compared):
        programs = honest(direction, compared)
        right = programs["auto"]
        programs["auto"] = lambda *arguments: jax.tree.map(
            lambda leaf: leaf * jnp.asarray(1.1, leaf.dtype), right(*arguments)
        )
        return programs

    monkeypatch.setattr(bench_layers, "contestants", one_is_wrong)
    result = bench_layers.run(CASE, direction, COMPARED, rounds=1, chain_ms=1.0)
    assert result.failures
    assert all(failure.startswith("auto: ") for failure in result.failures)


def test_the_program_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(device_lib, "current", lambda: Device("cpu", "cpu", 0, 0))
    assert bench_layers.main(["forward"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def cases_of(*arguments):
    return bench_layers._cases(bench_layers._parser().parse_args(list(arguments)))


def test_cases_are_the_product_of_what_was_asked():
    cases = cases_of("train", "--nnz", "30", "100", "--tokens", "7", "9")
    assert [(case.activity.mean_nnz, case.tokens) for case in cases] == [(30, 7), (30, 9), (100, 7), (100, 9)]
    assert {case.source for case in cases} == {"independent tokens"}
    assert [case.tokens for case in cases_of("forward") + cases_of("train")] == [65536, 16384]


def test_profiles_and_like_trained_are_one_curve():
    cases = cases_of("forward", "--profile", "layer-5", "--nnz", "60", "--like-trained")
    assert [case.activity for case in cases] == [PROFILES["layer-5"], like_trained(60)]
    assert {case.source for case in cases} == {"like trained layers"}
    wider = cases_of("forward", "--nnz", "60", "--like-trained", "--shapes", "llama-3.2-1b")
    assert wider[0].activity == like_trained(60, 8192)


def test_panels_of_other_sizes_are_layers_of_their_own():
    compared = bench_layers.layers(["dense", "panel", "auto"], [32, 128])
    assert list(compared) == ["dense", "panel-32", "panel", "auto"]
    assert [options.layout for options in compared.values()] == [Dense(), Panel(tokens=32), Panel(), Auto()]


def test_a_format_with_options_is_compared_under_its_own_name():
    arguments = bench_layers._parser().parse_args(["train", "--formats", "panel", "panel(capacity=1.0)"])
    layouts = {name: options.layout for name, options in bench_layers.layers(arguments.formats).items()}
    assert layouts == {"panel": Panel(), "panel(capacity=1.0)": Panel(capacity=1.0)}


@pytest.fixture
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(device_lib, "current", lambda: Device("gpu", "NVIDIA H100", 90, 132))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--like-trained", "--like-trained goes with --nnz, which says how active the layers are; got none"),
        ("--alike", "--alike goes with --profile or --like-trained, whose tokens have topics; got neither"),
        ("--layer 3", "--layer goes with --inputs FILE, which holds the layers; got none"),
        ("--inputs x.npz --nnz 30", "--inputs brings shape, activity and type with it: leave out --nnz"),
        ("--inputs none.npz", "there is none at none.npz"),
        ("--nnz 9000", "a mean nnz of 9000 needs more than the"),
        ("--tokens 0", "at least 1"),
        ("--formats panels", "FFNOptions.format must be one of"),
        ("--formats dense", "must be one of twell, hybrid, panel, auto; got 'dense'"),
        ("--rest -1", "--rest must be at least 0 seconds; got -1.0"),
    ],
)
def test_bad_arguments_end_the_program_with_a_sentence(pretended_gpu, capsys, arguments, sentence):
    with pytest.raises(SystemExit):
        bench_layers.main(["forward", *arguments.split()])
    assert sentence in capsys.readouterr().err


def test_a_case_without_room_leaves_the_others_running(pretended_gpu, monkeypatch, capsys, tmp_path):
    honest = bench_layers.run(CASE, "forward", COMPARED, rounds=1, chain_ms=1.0)

    def run(case, *arguments, **keywords):
        if case.tokens == 8:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return honest

    monkeypatch.setattr(bench_layers, "run", run)
    path = tmp_path / "deep" / "out.json"
    assert bench_layers.main(["forward", "--tokens", "8", "9", "--json", str(path)]) == 1
    assert "8 tokens, D 2048, F 5632, gated, bfloat16 did not run: RESOURCE_EXH" in capsys.readouterr().err
    assert [case["source"] for case in json.loads(path.read_text())["cases"]] == ["independent tokens"]


SIZES = {"tokens": 2048, "d_model": 64}


@pytest.mark.parametrize("nnz", [20, 60, 200, 400])
def test_like_trained_is_as_active_and_as_shared_as_its_neighbours(nnz):
    """Means of nnz as asked; the union of 128 tokens between those of the measured layers on either side."""
    unions = {31: 594, 45: 590, 154: 1618, 273: 2435, 477: 4369, 5: 130}  # as measured on trained layers
    inputs = ffn_inputs(jax.random.key(0), like_trained(nnz), d_ff=5632, **SIZES)
    found = measure(inputs["x"], inputs["w_gate"])
    assert found["mean_nnz"] == pytest.approx(nnz, rel=0.06)
    below, above = max(n for n in unions if n <= nnz), min(n for n in unions if n >= nnz)
    assert 0.88 * unions[below] <= found["union_128"] <= 1.12 * unions[above]
    assert found["union_32"] < found["union_128"]
    assert found["mean_nnz"] < found["p99_nnz"] <= found["max_nnz"]


@pytest.mark.parametrize("profile", ["layer-1", "layer-6"])
def test_tokens_of_a_topic_share_neurons_and_neighbours_hardly_do(profile):
    """An order that puts alike tokens together has about half of the union, as on trained layers."""
    activity = dataclasses.replace(PROFILES[profile], topics=32)
    sizes = SIZES | {"tokens": 4096, "d_ff": 5632}
    independent = dataclasses.replace(activity, topic_share=0.0)
    found = {
        name: measure(inputs["x"], inputs["w_gate"])
        for name, inputs in {
            "as they come": ffn_inputs(jax.random.key(0), activity, **sizes),
            "alike together": ffn_inputs(jax.random.key(0), activity, alike=True, **sizes),
            "independent": ffn_inputs(jax.random.key(0), independent, **sizes),
        }.items()
    }
    together, come = found["alike together"], found["as they come"]
    assert together["mean_nnz"] == pytest.approx(come["mean_nnz"], rel=0.01)
    assert 0.45 < together["union_128"] / come["union_128"] < 0.62
    assert come["union_128"] > 0.88 * found["independent"]["union_128"]


def test_cases_of_alike_tokens_are_a_curve_of_their_own():
    [case] = cases_of("forward", "--profile", "layer-5", "--alike")
    assert (case.alike, case.source) == (True, "like trained layers, alike tokens together")


def test_like_trained_is_the_profile_where_there_is_one():
    assert like_trained(154) == PROFILES["layer-5"]
    assert like_trained(154 * 2, 5632 * 2) == dataclasses.replace(PROFILES["layer-5"], mean_nnz=308)
    assert like_trained(2).dead == like_trained(5).dead
    with pytest.raises(ValueError, match="must be above 0"):
        like_trained(0)


def test_what_is_measured_of_an_input():
    x = jnp.eye(64, dtype=jnp.float32)
    weight = jnp.concatenate([jnp.eye(64), jnp.full((1, 64), -1.0), jnp.ones((1, 64))])
    found = measure(x, weight)  # each token has a neuron of its own and one that all share; one is dead
    assert found == pytest.approx(
        {"mean_nnz": 2, "p99_nnz": 2, "max_nnz": 2, "dead_fraction": 1 / 66, "union_32": 33, "union_128": 65}
    )
