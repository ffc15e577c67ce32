"""``bench order`` on a tiny run: it counts what numpy counts, and writes what it prints."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import timing
from train import cli
from train.bench import order_counts, order_plot, order_times
from train.bench.text_layers import TextLayers
from train.errors import UserError

PANELS, TOKENS = (8, 16), 48


@pytest.fixture(scope="module", autouse=True)
def short_timings():
    """Times are printed and not judged here: one chain each."""
    measure = timing.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "measure", lambda calls: measure(calls, rounds=1, chain_ms=0.0))
        yield


@pytest.fixture(scope="module")
def layers(finished):
    return TextLayers(str(finished.workdir), tokens=2 * TOKENS, more=32)


@pytest.fixture(scope="module")
def rows(layers):
    orders = order_counts.forward_orders(layers, (4, 3))
    return order_counts.count_unions(layers, orders, tokens=TOKENS, panels=PANELS, count=4)


def test_the_layers_are_the_models_own(layers):
    entering = layers.model.ffn_inputs(layers.tokens.reshape(-1, 16))
    _, stats = layers.model(layers.tokens.reshape(-1, 16))
    for layer in range(2):
        want = entering[layer].reshape(-1, 32)
        np.testing.assert_allclose(layers.entering(layer), want, rtol=1e-4, atol=1e-5)
        hits = layers.active(layer, layers.entering(layer)).sum(axis=0)
        np.testing.assert_array_equal(hits, stats.neuron_hits[layer])


def test_unions_are_counted_call_by_call(layers, rows):
    """In the order of the text and by id, against numpy."""
    ids, found = np.asarray(layers.tokens), {row.name: row.unions for row in rows}
    for layer in range(2):
        mask = np.asarray(layers.active(layer, layers.entering(layer)))
        for at, panel in enumerate(PANELS):
            totals = {"text": [], "token id": []}
            for call in (slice(0, TOKENS), slice(TOKENS, 2 * TOKENS)):
                in_order = {"text": mask[call], "token id": mask[call][np.argsort(ids[call], kind="stable")]}
                for name, each in in_order.items():
                    totals[name].append(each.reshape(-1, panel, 64).any(axis=1).sum(axis=1).mean())
            for name, each in totals.items():
                assert found[name][layer, at] == pytest.approx(np.mean(each), rel=1e-6)


def test_no_order_is_below_the_floor(rows):
    floor = next(row for row in rows if row.name == order_counts.FLOOR).unions
    assert len(rows) > 10
    assert all((row.unions >= floor - 1e-4).all() for row in rows)
    assert (floor > 0).all()


def test_activity_clusters_gather_tokens_of_the_same_neurons():
    """Four kinds of tokens, each with neurons of its own: panels in that order hold one kind each."""
    kinds = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 16))
    mask = jnp.asarray(np.arange(64) // 16 == kinds[:, None])
    centroids = order_counts.fit(order_counts._directions(mask), 16)
    call = order_counts._Call(*[jnp.zeros(64, jnp.int32)] * 3, mask, mask.sum(axis=1), None)
    places = order_counts._by_activity(call, centroids=centroids, width=65).order
    unions = order_counts.mean_unions(mask, jnp.stack([jnp.arange(64), places]), (16,))
    np.testing.assert_array_equal(unions[1], [16.0])
    assert float(unions[0, 0]) > 48


def test_speedups_pay_for_the_order():
    times = order_times.LayerTimes("forward", "panel", 64, (4.0, 4.0), (2.0, 3.0), (1.0, 2.0))
    assert order_times.speedups(times, 1.0) == {"text": 1.6, "ordered": 2.0}


def test_the_command_prints_and_writes(finished, tmp_path, capsys):
    out, picture = tmp_path / "order.json", tmp_path / "order.png"
    command = [
        "bench", "order", "--checkpoint", str(finished.workdir), "--tokens", "32", "100000",
        "--panels", "8", "16", "--clusters", "4", "--times", "auto", "--json", str(out),
        "--picture", str(picture),
    ]  # fmt: skip
    assert cli.main(command) == 0
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "held-out text is short" in said, "the corpus has fewer tokens than asked for"
    small, large = written["tables"]
    assert small["tokens"] == 32 < large["tokens"] < 100_000
    assert set(small["cost_us"]) | {"text"} == set(small["of_forward"])
    for name, unions in small["unions"].items():
        assert name in said
        assert [len(unions[panel]) for panel in ("8", "16")] == [2, 2]
        assert ", ".join(f"{union:.0f}" for union in unions["8"]) in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    forward, train = written["times"]
    assert (forward["direction"], forward["tokens"]) == ("forward", large["tokens"])
    assert (train["direction"], train["tokens"]) == ("train", 32)
    assert f"{forward['speedups']['ordered']:.2f}" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["order", "--checkpoint", "nowhere"], "there is none at"),
        (["order", "--checkpoint", "x", "--panels", "0"], "panels must be numbers of at least 1; got 0"),
        (["order", "--checkpoint", "x", "--picture", "x.gif"], "--picture must end with .png, .svg or .pdf"),
        (["orders"], "got 'orders'; did you mean order?"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys):
    assert cli.main(["bench", *arguments]) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_the_picture_has_a_curve_an_order(rows, tmp_path):
    out = tmp_path / "orders.svg"
    order_plot.draw(rows, PANELS, out, tokens=TOKENS, d_ff=64)
    drawn = out.read_text()
    assert all(f"<!-- {row.name} -->" in drawn for row in rows)
    with pytest.raises(UserError, match="--picture must name a file in a directory that is there"):
        order_plot.draw(rows, PANELS, tmp_path / "none" / "orders.png", tokens=TOKENS, d_ff=64)


def test_a_format_that_cannot_run_says_so(finished, capsys):
    command = ["bench", "order", "--checkpoint", str(finished.workdir), "--tokens", "32", "--times", "panel"]
    assert cli.main([*command, "--clusters", "4"]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
