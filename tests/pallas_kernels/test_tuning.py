"""Tuning tables: keys, atomic files, what ships, and the search that writes them."""

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import FFNOptions, Panel, Twell, tuning
from pallas_kernels.bench import tune_twell as search
from pallas_kernels.bench.inputs import Activity, ffn_inputs
from pallas_kernels.bench.timing import Timing
from pallas_kernels.common.row_config import RowsConfig
from pallas_kernels.device import Device
from pallas_kernels.panel import config as panel_configs
from pallas_kernels.twell import config as configs
from pallas_kernels.twell.config import GatePackConfig

HOPPER = Device("gpu", "NVIDIA H100 80GB HBM3", 90, 132)
KINDS = {"twell_gate_pack": GatePackConfig, "twell_up_down": RowsConfig}


def test_buckets_round_to_the_nearest_power_of_two():
    key = tuning.bucket(tokens=70000, d_model=2048, d_ff=5632, itemsize=2, tile=256)
    assert key == "m65536-d2048-f4096-16bit-t256"
    assert tuning.bucket(tokens=1, d_model=3, d_ff=6, itemsize=4) == "m1-d4-f8-32bit"


def test_saved_entries_are_found_and_merged(tmp_path):
    first, second = {"config": {"entries": 2}, "ms": 1.0}, {"config": {"entries": 8}, "ms": 0.5}
    assert tuning.lookup("gpu", "op", "a", directory=tmp_path) is None
    tuning.save("gpu", "op", {"a": first}, directory=tmp_path)
    path = tuning.save("gpu", "op", {"b": second, "c": first}, directory=tmp_path)
    tuning.save("gpu", "op", {"a": second}, directory=tmp_path)
    assert [tuning.lookup("gpu", "op", key, directory=tmp_path) for key in "abc"] == [
        {"entries": 8}, {"entries": 8}, {"entries": 2},
    ]  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == ["op.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": {"config": 2}}'])
def test_a_broken_table_is_named(tmp_path, text):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "op.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"op\.json is no tuning table .* restore it, or move it elsewhere and"
    ):
        tuning.lookup("gpu", "op", "a", directory=tmp_path)


def check_panel(key, fields):
    """An entry holds whole stages, which keep the laws among each other on top of the heuristic."""
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32 if "32bit" in key else jnp.bfloat16)
    options = FFNOptions(format=Panel(tokens=int(key.rpartition("p")[2])))
    config = panel_configs._with_entry(panel_configs.heuristic(x, options.layout.tokens, HOPPER), fields)
    stages = {name: dataclasses.asdict(getattr(config, name)) for name in fields if name != "chunk"}
    assert fields == stages | ({"chunk": config.chunk} if "chunk" in fields else {})


def test_the_tables_that_ship_hold_valid_configs():
    for path in tuning.DIRECTORY.glob("*/*.json"):
        for key, entry in json.loads(path.read_text()).items():
            if path.stem == "panel":
                check_panel(key, entry["config"])
            else:
                KINDS[path.stem](**entry["config"])
            assert entry["ms"] > 0, key


def test_a_panel_entry_that_breaks_a_law_is_noticed():
    stage = {"tile": 256, "tile_k": 32, "num_warps": 8, "num_stages": 6, "per_core": 0}
    tied = dict.fromkeys(("up", "up_keep", "dh"), stage)
    check_panel("m65536-d2048-f4096-16bit-p128", tied | {"chunk": 256})
    with pytest.raises(ValueError, match=r"PanelConfig\.dh\.tile must be chunk=256 or twice that; got 128"):
        check_panel(
            "m65536-d2048-f4096-16bit-p128",
            {"chunk": 256, "up": stage, "up_keep": stage, "dh": stage | {"tile": 128}},
        )


MAKE_INPUTS = partial(ffn_inputs, activity=Activity(4.0), tokens=32, d_model=32, d_ff=64, dtype=jnp.bfloat16)
OPTIONS = FFNOptions(format=Twell(tile=64, compression=2), backend="interpret")


@pytest.mark.parametrize("gated", [True, False])
def test_the_search_writes_a_table_for_each_kernel(tmp_path, monkeypatch, gated):
    only: dict[str, Any] = {"twell_gate_pack": GatePackConfig(32, 16), "twell_up_down": RowsConfig(2)}
    monkeypatch.setattr(configs, "search_space", lambda *arguments: [[config] for config in only.values()])
    monkeypatch.setattr(search, "_ROUNDS", 1)
    line = search.tune_twell(partial(MAKE_INPUTS, gated=gated), OPTIONS, directory=tmp_path)
    inputs = jax.eval_shape(MAKE_INPUTS, jax.random.key(0))
    for op, key in configs.buckets(inputs["x"], inputs["w_up"], OPTIONS.layout).items():
        found = tuning.lookup("cpu", op, key, directory=tmp_path)
        assert found == dataclasses.asdict(only[op])
        assert str(only[op]) in line


def test_the_search_wants_the_fastest_that_compiles_and_is_right(monkeypatch):
    milliseconds = {"slow": 3.0, "right": 2.0, "wrong": 1.0}
    monkeypatch.setattr(
        search.timing,
        "measure",
        lambda calls, **_: {name: Timing((milliseconds[name],), 1) for name in calls},
    )
    programs: dict[str, Any] = {
        name: (partial(jnp.add, 2 if name == "wrong" else 1), (1,)) for name in milliseconds
    }
    programs["broken"] = (jnp.dot, (jnp.ones(2), jnp.ones(3)))
    assert search._fastest(programs, lambda output: output == 2) == ("right", 2.0, 2)
    with pytest.raises(RuntimeError, match="of 4 candidates 3 compiled and none gave the right result"):
        search._fastest(programs, lambda output: output == 7)


def test_an_entry_is_for_what_the_same_slices_divide():
    """A rest of D takes a slice's shared memory again: 960 is 15 slices of 64, 1000 is not."""
    weight = jax.ShapeDtypeStruct((2816, 1), "bfloat16")
    keys = [
        panel_configs.bucket(jax.ShapeDtypeStruct((4096, d_model), "bfloat16"), weight, Panel.tokens)
        for d_model in (1024, 960, 1000, 1152)
    ]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]
