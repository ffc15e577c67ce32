"""The tuner of PanelELL's stages: what it tries, what it leaves out, what it keeps,
and that the table is used."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FFNOptions, Panel, reference, sparse_ffn, tuning
from pallas_kernels import device as device_lib
from pallas_kernels.bench import layers as bench_layers
from pallas_kernels.bench import panel_stages
from pallas_kernels.bench import tune_panel as panel_search
from pallas_kernels.bench.inputs import Activity, ffn_inputs
from pallas_kernels.bench.panel_stages import STAGES, TIED, candidates, with_chunk
from pallas_kernels.bench.timing import Timing
from pallas_kernels.bench.tune_panel import Found, tune_panel
from pallas_kernels.device import Device
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.config import HotConfig, StageConfig

H200 = Device("gpu", "NVIDIA H200", 90, 132)
AMPERE = Device("gpu", "NVIDIA A10", 86, 72)
OPTIONS = FFNOptions(format=Panel(tokens=16), backend="interpret")
X = jax.ShapeDtypeStruct((16384, 2048), jnp.bfloat16)


# -- candidates


@pytest.mark.parametrize("device", [H200, AMPERE], ids=str)
@pytest.mark.parametrize("panel", [32, 64, 128])
@pytest.mark.parametrize("stage", STAGES)
def test_candidates_keep_the_laws_and_fit(stage, panel, device):
    plain = configs.heuristic(X, panel, device)
    for chunk in panel_stages.CHUNKS:
        base = with_chunk(plain, chunk)
        if base is None:
            continue
        found = candidates(stage, base, 2, True, device)
        assert found[0] == getattr(base, stage)
        assert len(set(found)) == len(found) >= 2
        for config in found:
            assert dataclasses.replace(base, **{stage: config}).panel == panel
            if stage in TIED:
                assert config.tile in (chunk, 2 * chunk)
        for config in found[1:]:
            if isinstance(config, StageConfig):
                assert config.misfit(panel, 2, device) is None


def test_the_configs_that_have_been_fast_are_among_them():
    plain = configs.heuristic(X, 128, H200)
    wide = with_chunk(plain, 256)
    assert {StageConfig(128, 32, 4, 6), StageConfig(256, 32, 8, 8)} <= set(
        candidates("down", plain, 2, True, H200)
    )
    assert StageConfig(128, 64, 4, 3) in candidates("up", plain, 2, True, H200)
    assert StageConfig(256, 32, 8, 6) in candidates("up", wide, 2, True, H200)


def test_without_a_list_neighbours_are_tried():
    plain = configs.heuristic(X, 128, H200)
    own = plain.dw
    found = candidates("dw", plain, 2, True, H200)
    assert dataclasses.replace(own, tile=2 * own.tile) in found
    assert dataclasses.replace(own, num_stages=own.num_stages - 1) in found
    exact = configs.heuristic(jax.ShapeDtypeStruct((64, 64), jnp.float32), 128, H200)
    assert dataclasses.replace(exact.up, num_warps=8) in candidates("up", exact, 4, True, H200)


# -- what beats what


@pytest.mark.parametrize(
    ("new", "old", "wins"),
    [
        ([0.9, 0.91, 0.89], [1, 1, 1], True),
        ([0.99, 1.0, 0.95], [1, 1, 1], False),  # a gain of 1 % that varies by 5
        ([1.1, 1.1, 1.1], [1, 1, 1], False),
        ([1, 1, 1], [1, 1, 1], False),
        ([0.9, 1.8, 2.7], [1, 2, 3], True),  # a clock that drifts hits both
    ],
)
def test_a_gain_must_be_larger_than_its_spread(new, old, wins):
    assert panel_search._beats(new, old) == wins


class FakeSearch:
    """Calls that name what they would run."""

    def __init__(self, plain):
        self.plain = plain

    def compiled(self, stage, tried):
        return {key: lambda: None for key in tried}


SEARCHED = [stage for stage in STAGES if stage != "gate"]
"""Where the gate stage is a packing kernel behind XLA's product, as it is in the interpreter."""


def contender(stage, chunk, config, ms):
    return panel_search._Contender(stage, chunk, config, ms)


@pytest.mark.parametrize("now", [0.5, 0.999])
def test_another_chunk_is_taken_or_left_as_a_whole(monkeypatch, now):
    plain = configs.heuristic(X, 128, H200)
    wide = with_chunk(plain, 256)
    best: dict[str, Any] = {
        stage: {128: contender(stage, 128, getattr(plain, stage), 1.0)} for stage in STAGES
    }
    for stage in TIED:
        best[stage][256] = contender(stage, 256, getattr(wide, stage), 0.5)
    best["down"][128] = contender("down", 128, StageConfig(128, 64, 8, 4), 0.8)

    def compare(calls):
        slow = {"up": now, "up_keep": 1.2, "down": 0.8}
        return {
            (which, stage): Timing((slow.get(stage, 1.0) if which == "new" else 1.0,) * 3, 1)
            for which, stage in calls
        }

    monkeypatch.setattr(panel_search, "_compare", compare)
    chosen, before, after = panel_search._choose(FakeSearch(plain), best, ("up", "down"))
    assert chosen.down == StageConfig(128, 64, 8, 4)
    assert before == pytest.approx(2)
    assert chosen.chunk == 256
    assert after == pytest.approx(now + 0.8)
    monkeypatch.setattr(panel_search, "_beats", lambda new, old: sum(new) < 0.9 * sum(old))
    chosen, _, _ = panel_search._choose(FakeSearch(plain), best, ("up", "down"))
    assert chosen.chunk == (256 if now == 0.5 else 128)


# -- the search itself, in the interpreter


@pytest.fixture(scope="module")
def layer():
    inputs = ffn_inputs(jax.random.key(0), Activity(6.0), tokens=40, d_model=32, d_ff=64, dtype=jnp.bfloat16)
    return inputs, bench_layers.cotangent(inputs)


def milliseconds(key):
    """Eight warps are twice as fast in this test, whatever the machine says."""
    return 1.0 if key[1].num_warps == 8 else 2.0


@pytest.fixture
def without_dw(monkeypatch):
    """The stages but for the one that takes longest to compile."""
    # Another dictionary: what is put back into one comes last.
    stages = {stage: run for stage, run in STAGES.items() if stage not in ("dw", "rare")}
    monkeypatch.setattr(panel_search, "STAGES", stages)


@pytest.fixture
def few_candidates(monkeypatch):
    """Each stage's own config and one of eight warps; times as `milliseconds` and as asked."""

    def two(stage, base, *arguments):
        own = getattr(base, stage)
        return [own, dataclasses.replace(own, num_warps=8)]

    monkeypatch.setattr(panel_search, "candidates", two)
    monkeypatch.setattr(panel_search, "CHUNKS", ())
    monkeypatch.setattr(
        panel_search, "_search", lambda calls: {key: Timing((milliseconds(key),), 1) for key in calls}
    )
    monkeypatch.setattr(
        panel_search,
        "_compare",
        lambda calls: {key: Timing((1.0 if key[0] == "new" else 2.0,) * 3, 1) for key in calls},
    )


def test_the_table_holds_what_was_fastest_and_the_layer_uses_it(monkeypatch, tmp_path, layer, few_candidates):
    inputs, dy = layer
    said: list[str] = []
    found = tune_panel(inputs, dy, OPTIONS, "train", directory=tmp_path, say=said.append)
    assert found.changed.keys() == set(SEARCHED)
    assert found.before_ms == 2 * found.after_ms == 12.0
    assert str(found).endswith(f"in {tmp_path / 'cpu' / 'panel.json'}")
    assert [line.split(":")[0].strip() for line in said] == [
        f"{stage}, lists of 128" if stage in TIED else stage for stage in SEARCHED
    ]
    plain = configs.choose(inputs["x"], inputs["w_up"], OPTIONS.layout.tokens)
    monkeypatch.setattr(tuning, "DIRECTORY", tmp_path)
    tuned = configs.choose(inputs["x"], inputs["w_up"], OPTIONS.layout.tokens)
    assert all(getattr(tuned, stage).num_warps == 8 for stage in SEARCHED)
    assert tuned != plain
    y, stats = sparse_ffn(**inputs, options=OPTIONS)
    dense, wanted = reference.ffn(inputs["x"], inputs["w_gate"], inputs["w_up"], inputs["w_down"])
    np.testing.assert_array_equal(stats.neuron_hits, wanted.neuron_hits)
    np.testing.assert_allclose(np.float32(y), np.float32(dense), rtol=0.02, atol=1e-3)


def test_what_fails_or_is_wrong_is_left_out_with_its_reason(
    monkeypatch, tmp_path, without_dw, few_candidates
):
    """Of a layer without gate projection, with a second chunk too."""
    inputs = ffn_inputs(
        jax.random.key(0), Activity(6.0), tokens=40, d_model=32, d_ff=64, gated=False, dtype=jnp.bfloat16
    )
    monkeypatch.setattr(panel_search, "CHUNKS", (64,))
    right_dx, right_down = STAGES["dx"], STAGES["down"]

    def too_large(given, config, interpret):
        if config.dx.num_warps == 8:
            raise ValueError("needs 300000 bytes of shared memory\nand more words")
        return right_dx(given, config, interpret)

    def wrong(given, config, interpret):
        y = right_down(given, config, interpret)
        return y.at[0, 0].set(jnp.nan) if config.down.num_warps == 8 else y

    monkeypatch.setitem(panel_search.STAGES, "dx", too_large)
    monkeypatch.setitem(panel_search.STAGES, "down", wrong)
    said: list[str] = []
    found = tune_panel(
        inputs, bench_layers.cotangent(inputs), OPTIONS, "forward", directory=tmp_path, say=said.append
    )
    assert found.changed.keys() == set(SEARCHED) - {"dx", "down", "dw", "rare"}
    left_out = [line for line in said if "left out" in line]
    assert [line.split(":")[0].strip() for line in left_out] == ["down", "dx"]
    assert "off by nan" in left_out[0]
    assert left_out[1].endswith("is left out: needs 300000 bytes of shared memory")
    assert any(line.startswith("  dh, lists of 64: ") for line in said)


def test_without_time_the_heuristic_stays(tmp_path, layer, without_dw, few_candidates):
    inputs, dy = layer
    said: list[str] = []
    found = tune_panel(inputs, dy, OPTIONS, "forward", deadline=0.0, directory=tmp_path, say=said.append)
    assert not found.changed
    assert "nothing beats the heuristic" in str(found)
    assert sum("no time is left, the heuristic stays" in line for line in said) == len(
        set(SEARCHED) - {"dw", "rare"}
    )
    [entry] = json.loads((tmp_path / "cpu" / "panel.json").read_text()).values()
    assert entry["config"] == {}


def test_products_on_mosaic_gpu_are_not_searched(monkeypatch, tmp_path):
    monkeypatch.setattr(device_lib, "current", lambda: H200)
    x, weight = jnp.zeros((8192, 64), jnp.bfloat16), jnp.zeros((128, 64), jnp.bfloat16)
    inputs = {"x": x, "w_gate": weight, "w_up": weight, "w_down": weight}
    with pytest.raises(
        RuntimeError, match="the products of 8,192 tokens run on Mosaic GPU on NVIDIA H200, and"
    ):
        tune_panel(inputs, x, FFNOptions(format="panel"), "forward", directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_benchmark_tunes_each_case_and_panel(monkeypatch, capsys):
    monkeypatch.setattr(device_lib, "current", lambda: H200)
    asked = []

    def tune(inputs, dy, options, direction, *, deadline):
        asked.append((inputs["x"].shape, dy.shape, options.layout.tokens, direction))
        if options.layout.tokens == 32:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return Found(options.layout.tokens, {"dw": HotConfig(64, 64, 32, 4, 2)}, 2.0, 1.0, tuning.DIRECTORY)

    monkeypatch.setattr(bench_layers, "tune_panel", tune)
    monkeypatch.setattr(bench_layers, "run", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("not here")))
    arguments = [
        "--shapes",
        "qwen1.5-0.5b",
        "--tokens",
        "64",
        "--formats",
        "panel",
        "--tune",
        "--panels",
        "32",
        "128",
    ]
    assert bench_layers.main(["train", *arguments]) == 1
    assert asked == [((64, 1024), (64, 1024), panel, "train") for panel in (32, 128)]
    out, err = capsys.readouterr()
    assert "panels of 128: 2.000 to 1.000 ms with dw=HotConfig(" in out
    assert "not tuned: RESOURCE_EXHAUSTED" in err
    with pytest.raises(SystemExit):
        bench_layers.main(["forward", "--formats", "twell", "--tune"])
    assert "no panel is compared: add panel to --formats" in capsys.readouterr().err
