"""``sparse-lm analyze`` on a tiny run: it counts what numpy counts, and says what it leaves out and why."""

import builtins
import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.device import Device
from sparse_lm.model_order import ModelOrder
from train import cli
from train.analyze import activity, analysis, command, figures, on_device, report, training
from train.bench import order_counts
from train.bench.order_times import LayerTimes
from train.bench.text_layers import TextLayers
from train.data.tokenizer import ByteTokenizer
from train.errors import UserError
from train.picture import check_matplotlib
from train.run.checkpoint_files import find_checkpoint

CALL = 128


@pytest.fixture(scope="module")
def out(finished, tmp_path_factory):
    return tmp_path_factory.mktemp("analysis") / "new"


@pytest.fixture(scope="module")
def found(finished, out):
    options = command.AnalyzeOptions(str(finished.workdir), str(out), tokens=320, call_tokens=CALL)
    return command.run(options)


@pytest.fixture(scope="module")
def layers(finished):
    return TextLayers(str(finished.workdir), tokens=320, more=0)


@pytest.fixture(scope="module")
def masks(layers):
    """(L, M, F)."""
    return np.stack([np.asarray(layers.active(layer, layers.entering(layer))) for layer in range(2)])


def test_counts_are_numpys(found, masks):
    assert found.tokens == masks.shape[1] == 320, "two calls and a rest"
    assert [layer.mean_nnz for layer in found.layers] == pytest.approx(
        masks.sum(axis=2).mean(axis=1).tolist()
    )
    assert [layer.max_nnz for layer in found.layers] == masks.sum(axis=2).max(axis=1).tolist()
    silent = (~masks.any(axis=1)).mean(axis=1)
    assert [layer.silent_share for layer in found.layers] == pytest.approx(silent.tolist())
    np.testing.assert_allclose(
        found.by_position, masks.sum(axis=2).reshape(2, -1, 16).mean(axis=1), rtol=1e-6
    )


def test_unions_are_numpys_in_the_texts_order_and_by_id(found, layers, masks):
    ids = np.asarray(layers.tokens)
    assert found.own_order == "text"
    assert found.panels == (16, 32, 64, 128)
    for at, panel in enumerate(found.panels):
        totals = {"text": [], "token id": []}
        for call in (slice(0, CALL), slice(CALL, 2 * CALL)):
            by_id = np.argsort(ids[call], kind="stable")
            for name, rows in {"text": masks[:, call], "token id": masks[:, call][:, by_id]}.items():
                unions = rows.reshape(2, -1, panel, 64).any(axis=2).sum(axis=2)
                totals[name].append(unions.mean(axis=1))
        for name, parts in totals.items():
            np.testing.assert_allclose(found.unions[name][:, at], np.mean(parts, axis=0), rtol=1e-6)


def test_autos_probe_decides_by_the_share_that_a_panel_activates(found, masks):
    """A call is one panel of 128 tokens here, which is what the probe looks at."""
    auto = found.auto
    for layer, choice in enumerate(auto.layers):
        shares = [masks[layer, at : at + CALL].any(axis=0).mean() for at in (0, CALL)]
        assert choice.panel_forward == np.mean([share < auto.break_even_forward for share in shares])
        assert choice.panel_train == np.mean([share < auto.break_even_train for share in shares])
    assert auto.forward_is_asked
    assert "runs dense on xla" in auto.here


def test_a_forward_of_few_panels_is_not_asked(found):
    said = "takes PanelELL there without a probe"
    assert said not in report.write_html(found, ())
    few = dataclasses.replace(found, auto=dataclasses.replace(found.auto, forward_is_asked=False))
    assert said in report.write_html(few, ())


def test_the_training_is_read_from_the_metrics(found, finished):
    records = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "ce" in record]
    training = found.training
    assert training.tokens == tuple(record["step"] * 128 for record in steps)
    assert training.nnz[1] == tuple(record["l0_per_layer"][1] for record in steps)
    assert training.dead_share[0] == tuple(record["dead_per_layer"][0] / 64 for record in steps)
    assert training.dead_after == 256


def test_the_directory_holds_a_report_that_needs_nothing_else(found, out):
    names = {"layers", "tokens", "position", "training", "popularity", "unions", "auto"}
    assert {path.stem for path in out.glob("*.png")} == names, "speed is left out where nothing was timed"
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)", page)
    assert f"{found.layers[0].mean_nnz:.1f}" in page
    assert "speed-ups are measured on an NVIDIA GPU, and this analysis ran on cpu" in page
    numbers = json.loads((out / "analysis.json").read_text())
    assert numbers["checkpoint"] == found.checkpoint
    assert [layer["mean_nnz"] for layer in numbers["layers"]] == [layer.mean_nnz for layer in found.layers]
    assert numbers["unions"]["text"] == found.unions["text"].tolist()
    assert numbers["times"] is None
    assert numbers["machine"]["versions"]["jax"]


def test_measured_speed_ups_are_of_the_order_that_the_model_runs_in(found):
    three = dataclasses.replace(found, layers=found.layers + found.layers[:1])
    times = LayerTimes("forward", "panel", CALL, (4.0, 4.0, 4.0), (2.0, 1.0, 2.0), (1.0, 1.0, 1.0))
    timed = dataclasses.replace(three, times=times)
    assert timed.speedups == (2.0, 4.0, 2.0)
    assert timed.correlations["mean_nnz"] == pytest.approx(
        -1 if found.layers[0].mean_nnz > found.layers[1].mean_nnz else 1
    )
    assert dataclasses.replace(timed, own_order="token id").speedups == (4.0, 4.0, 4.0)
    assert dataclasses.replace(timed, own_order="token id").correlations["mean_nnz"] is None


def test_the_speed_ups_stand_in_figure_and_report(found, tmp_path):
    times = LayerTimes("forward", "panel", CALL, (4.0, 4.0), (2.0, 1.0), (1.0, 1.0))
    timed = dataclasses.replace(found, times=times, times_note="Timed.")
    pictures = figures.draw(timed, tmp_path)
    assert "speed" in {picture.name for picture in pictures}
    page = report.write_html(timed, pictures)
    assert "2.00×" in page
    assert "none can be given: too few layers" in page


def test_on_a_gpu_layers_are_timed_as_panel(monkeypatch, layers):
    asked = {}

    def timed(layers, make, **how):
        asked.update(how)
        return "times"

    monkeypatch.setattr(on_device.device_lib, "current", lambda: Device("gpu", "NVIDIA H100", 90, 132))
    monkeypatch.setattr(on_device.order_times, "layer_times", timed)
    times, note = on_device.layer_times(layers, None, call=CALL)
    assert (times, asked) == ("times", {"format": "panel", "tokens": CALL, "train": False})
    assert "128 tokens a call, on NVIDIA H100" in note


def test_what_the_gpu_cannot_time_is_said(monkeypatch, layers):
    def refused(*arguments, **how):
        raise ValueError("no kernel")

    monkeypatch.setattr(on_device.device_lib, "current", lambda: Device("gpu", "NVIDIA V100", 70, 80))
    monkeypatch.setattr(on_device.order_times, "layer_times", refused)
    assert on_device.layer_times(layers, None, call=CALL) == (None, "Layers were not timed: no kernel.")


def test_a_text_shorter_than_a_panel_has_no_probe(layers):
    assert on_device.auto_choices(layers, None, call=64) is None


def test_a_text_shorter_than_every_panel_size_is_one_panel(layers, masks):
    counted = activity.count(layers, {}, panels=(512,), call=320)
    assert counted.panels == (320,)
    np.testing.assert_allclose(counted.unions["text"][:, 0], masks.any(axis=1).sum(axis=1))


def test_a_checkpoint_without_metrics_is_analyzed_all_the_same(finished, tmp_path, capsys):
    alone = shutil.copytree(find_checkpoint(finished.workdir), tmp_path / "8")
    command = ["analyze", "--checkpoint", str(alone), "--out", str(tmp_path / "out"), "--tokens", "64"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert f"Nothing is known of the training: {alone} must be the work directory of a run" in said
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert numbers["training"] is None
    assert len(numbers["layers"]) == 2
    assert not (tmp_path / "out" / "training.png").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Nothing is known of the training" in page
    assert "The text is shorter than a panel" in page


@pytest.mark.parametrize(
    ("more", "sentence", "status"),
    [
        (["--data.paths", "{tmp}/none.jsonl"], "there is no file", 1),
        (["--data.every-document"], "--data.every-document needs --data.paths; got none", 2),
        (["--tokens", "8"], "tokens must be at least 16, one sequence of the model; got 8", 1),
        (["--call-tokens", "0"], "call-tokens must be at least 1; got 0", 2),
        (["--checkpoint", "{tmp}/none"], "a checkpoint must be a directory; there is none at", 1),
        (["--out", "{tmp}/file/out"], "--out must name a directory that can be written", 1),
        (["--out", "{tmp}/mine"], "holds a training.png that is of no analysis and would be lost", 1),
        (["--out", "{tmp}/other"], "holds the analysis of /runs/8: choose another directory", 1),
    ],
)
def test_mistakes_are_one_sentence(finished, tmp_path, capsys, more, sentence, status):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "training.png").touch()
    (tmp_path / "other" / "analysis.json").write_text('{"checkpoint": "/runs/8"}')
    command = ["analyze", "--checkpoint", str(finished.workdir), "--out", str(tmp_path / "out")]
    assert cli.main([*command, *(word.format(tmp=tmp_path) for word in more)]) == status
    out, err = capsys.readouterr()
    assert sentence in err
    assert (out, err.count("\n")) == ("", 1)
    assert json.loads((tmp_path / "other" / "analysis.json").read_text()) == {"checkpoint": "/runs/8"}


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"analyze needs the package matplotlib.*sparse-lm\[plot\]"):
        check_matplotlib("analyze")


def test_a_token_that_is_no_text_is_its_number():
    assert analysis.token_text(ByteTokenizer(), ord("a")) == "'a'"
    assert analysis.token_text(ByteTokenizer(), ord("\n")) == "'\\n'"
    assert analysis.token_text(ByteTokenizer(), 200) == "id 200"


def test_letters_beyond_the_figures_font_are_codes():
    assert figures._shown("'é 世$'") == "'é \\u4e16$'"


@pytest.mark.parametrize("order", ["id", "hash", "centroids", "auto", "vocabulary", "text"])
def test_the_models_own_order_is_the_one_that_it_runs_in(layers, order):
    config = dataclasses.replace(layers.config.model, token_order=order, token_clusters=4)
    state = ModelOrder(config, rngs=nnx.Rngs(0))
    fake = SimpleNamespace(model=SimpleNamespace(config=config, token_order=state))
    own = order_counts.own_order(fake)
    ids = jax.random.randint(jax.random.key(0), (1, 512), 0, config.vocab_size)
    x = jax.random.normal(jax.random.key(1), (1, 512, config.d_model))
    if order == "text":
        assert own is None
        return
    places = own[1](ids.reshape(-1), x.reshape(512, -1)).order
    want = state.before_layers(ids) if order in ("id", "vocabulary") else state.of_input(x, ids)
    np.testing.assert_array_equal(places, jnp.ravel(want.order))


def test_a_converted_model_has_no_curves(tmp_path):
    for name in ("run/metadata", "tokenizer/tokenizer.json", "params/model.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found, said = training.read(tmp_path, up_to=0, d_ff=4)
    assert found is None
    assert said == "Nothing is known of the training: this is a converted model."
