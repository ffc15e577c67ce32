"""``bench gate-bound`` on a tiny run: what it prints and writes is what the masks of its gates say."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from train import cli
from train.bench import bench_gate_bound
from train.bench.bench_gate_bound import BenchGateBoundOptions
from train.bench.gate_bounds import SCHEMES
from train.bench.text_layers import TextLayers

PANEL, TOKENS = 8, 64


def test_the_command_prints_and_writes(finished, tmp_path, capsys):
    out = tmp_path / "bounds.json"
    command = [
        "bench", "gate-bound", "--checkpoint", str(finished.workdir), "--tokens", str(TOKENS),
        "--panel", str(PANEL), "--sample", "4", "--layers", "1", "--gather-rate", "0.5", "--json", str(out),
    ]  # fmt: skip
    assert cli.main(command) == 0
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    (layer,) = written["layers"]
    assert (layer["layer"], written["d_model"], written["d_ff"], written["tokens"]) == (1, 32, 64, TOKENS)
    assert written["order"] in said
    gates, *rows = layer["rows"]
    assert [row["name"] for row in rows] == [scheme.name for scheme in SCHEMES]
    for row, scheme in zip(rows, SCHEMES, strict=True):
        assert gates["candidates"] <= row["candidates"] <= gates["candidates"] + row["undecided"] + 1e-6
        assert gates["union_text"] <= row["union_text"] <= 1
        product = scheme.product_time(32, 64, PANEL)
        for order in ("text", "order"):
            assert row[f"time_{order}"] == pytest.approx(product + 0.05 + row[f"union_{order}"] / 0.5)
        assert row["name"] in said
        assert f"{row['candidates']:.1%}" in said


def test_the_gates_are_those_of_the_model(finished):
    """Of all panels as they come, and in an order that is given, against numpy."""
    layers = TextLayers(str(finished.workdir), TOKENS, 32)
    order = np.random.default_rng(0).permutation(TOKENS)
    places = np.stack([np.arange(TOKENS), order])
    options = BenchGateBoundOptions("", panel=PANEL)
    gates = bench_gate_bound.count(layers, 0, places, options)[0]
    x, weight = layers.entering(0).astype(jnp.bfloat16), layers.block(0).ffn.w_gate[...].astype(jnp.bfloat16)
    active = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T > 0
    assert gates.candidates == pytest.approx(active.mean())
    for found, rows in ((gates.union_text, active), (gates.union_order, active[order])):
        assert found == pytest.approx(rows.reshape(-1, PANEL, 64).any(axis=1).mean())
    (_, wide, *_), (_, widest, *_) = (
        bench_gate_bound.count(layers, 0, places, BenchGateBoundOptions("", panel=PANEL, as_d_model=width))
        for width in (32, 32 * 10_000)
    )
    assert wide.undecided < 0.5
    assert widest.undecided > 0.9, "bounds a hundred times as wide decide hardly anything"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--checkpoint nowhere", "there is none at"),
        ("--checkpoint x --panel 0", "panel must be at least 1; got 0"),
        ("--checkpoint x --as-d-model 0", "as-d-model must be at least 1; got 0"),
        ("--checkpoint x --quantise -1", "quantise must be at least 0; got -1"),
        ("--checkpoint x --gather-rate 0", "gather-rate must be over 0 and at most 1; got 0"),
        ("--checkpoint {run} --tokens 64 --layers 2", "layers must be from 0 to 1, which the model has"),
        ("--checkpoint {run} --tokens 64 --panel 65", "panel must be at most the 64 tokens of the call"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(finished, arguments, sentence, capsys):
    command = arguments.format(run=finished.workdir).split()
    assert cli.main(["bench", "gate-bound", *command]) in (1, 2)
    assert sentence in capsys.readouterr().err
