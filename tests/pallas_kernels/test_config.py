"""Tile sizes: their laws, the choice on every kind of GPU, and what the tuner may try."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Twell, tuning
from pallas_kernels.common.row_config import RowsConfig
from pallas_kernels.dense import backup_rows
from pallas_kernels.device import Device
from pallas_kernels.twell import config as configs
from pallas_kernels.twell.config import GatePackConfig

H200 = Device("gpu", "NVIDIA H200", 90, 132)
DEVICES = (
    H200,
    Device("gpu", "NVIDIA A100-SXM4-80GB", 80, 108),
    Device("gpu", "NVIDIA A10G", 86, 80),
    Device("gpu", "NVIDIA L4", 89, 58),
    Device("gpu", "NVIDIA B200", 100, 148),
    Device("gpu", "NVIDIA GeForce RTX 5090", 120, 170),
    Device("cpu", "cpu", 0, 0),
)


@pytest.fixture(autouse=True)
def empty_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "DIRECTORY", tmp_path)


def problem(tokens=65536, d_model=2048, d_ff=5632, dtype=jnp.bfloat16) -> tuple[Any, Any]:
    return jax.ShapeDtypeStruct((tokens, d_model), dtype), jax.ShapeDtypeStruct((d_ff, d_model), dtype)


@pytest.mark.parametrize(
    ("kind", "fields", "law"),
    [
        (GatePackConfig, {"tile_m": 48}, "tile_m must be a power of two from 16 to 128"),
        (GatePackConfig, {"tile_m": 256}, "hit counts of a tile are bytes"),
        (GatePackConfig, {"tile_k": 8}, "tile_k must be a power of two from 16"),
        (GatePackConfig, {"num_warps": 6}, "num_warps must be a power of two"),
        (GatePackConfig, {"num_stages": 0}, "num_stages must be at least 1; got 0"),
        (GatePackConfig, {"group_m": 0}, "group_m must be at least 1; got 0"),
        (RowsConfig, {"entries": 3}, "entries must be a power of two from 1 to 32; got 3"),
        (RowsConfig, {"num_warps": 64}, "num_warps must be a power of two from 1 to 32; got 64"),
    ],
)
def test_fields_outside_their_range_are_errors(kind, fields, law):
    with pytest.raises(ValueError, match=law):
        kind(**fields)


def test_misfit_counts_shared_memory_and_registers():
    assert GatePackConfig(num_stages=4).misfit(256, 2, H200) is None  # 192 of 227 KiB: ran
    assert "shared memory" in str(GatePackConfig(num_stages=5).misfit(256, 2, H200))
    assert "shared memory" in str(GatePackConfig().misfit(256, 2, DEVICES[3]))
    assert "registers" in str(GatePackConfig(num_warps=4, tile_k=32).misfit(256, 2, H200))


def test_hopper_gets_what_was_measured_to_be_fastest():
    chosen = configs.choose(*problem(), Twell(), H200)
    assert chosen.gate_pack == GatePackConfig(128, 64, 8, 3, 8)
    assert chosen.up_down == RowsConfig(2, 2)
    assert configs.choose(*problem(), Twell(tile=128), H200).gate_pack == GatePackConfig(128, 64, 8, 3, 16)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
def test_every_choice_fits_its_device(device):
    sizes = itertools.product((1, 7, 16, 300, 16385), (1, 100, 4096), (3, 5632), (jnp.bfloat16, jnp.float32))
    for (tokens, d_model, d_ff, dtype), tile in itertools.product(sizes, (64, 128, 256)):
        x, w = problem(tokens, d_model, d_ff, dtype)
        chosen = configs.choose(x, w, Twell(tile=tile), device).gate_pack
        assert chosen.misfit(tile, x.dtype.itemsize, device) is None
        assert chosen.tile_m <= max(16, 2 * tokens)


def test_few_tokens_get_short_tiles():
    heights = [configs.choose(*problem(m), Twell(), H200).gate_pack.tile_m for m in (1, 512, 4096)]
    assert heights == [16, 64, 128]


def test_f32_gets_smaller_tiles_than_bf16():
    narrow, wide = (configs.choose(*problem(dtype=t), Twell(), H200) for t in (jnp.bfloat16, jnp.float32))
    assert wide.gate_pack.tile_m * wide.gate_pack.tile_k < narrow.gate_pack.tile_m * narrow.gate_pack.tile_k
    assert wide.up_down.num_warps > narrow.up_down.num_warps


def test_a_tile_that_no_config_holds_is_an_error():
    with pytest.raises(ValueError, match=r"tile=16384 is too wide for NVIDIA H200, choose a smaller one"):
        configs.choose(*problem(), Twell(tile=16384), H200)


def test_a_tuned_entry_goes_before_the_heuristic():
    x, w = problem()
    ops = configs.buckets(x, w, Twell())
    tuned = {"tile_m": 64, "tile_k": 32, "num_warps": 4, "num_stages": 2, "group_m": 4}
    tuning.save(H200.table_name, "twell_gate_pack", {ops["twell_gate_pack"]: {"config": tuned, "ms": 1.0}})
    chosen = configs.choose(x, w, Twell(), H200)
    assert chosen.gate_pack == GatePackConfig(**tuned)
    assert chosen.up_down == RowsConfig()
    assert configs.choose(*problem(60000), Twell(), H200) == chosen
    assert configs.choose(x, w, Twell(tile=128), H200).gate_pack != chosen.gate_pack
    assert configs.choose(x, w, Twell(), DEVICES[1]).gate_pack != chosen.gate_pack


@pytest.mark.parametrize("device", DEVICES[:-1], ids=lambda device: device.kind)
def test_the_search_space_holds_the_heuristic_and_nothing_that_cannot_run(device):
    for tokens, dtype in itertools.product((16, 4096), (jnp.bfloat16, jnp.float32)):
        x, w = problem(tokens, dtype=dtype)
        gate_packs, up_downs = configs.search_space(x, w, Twell(), device)
        chosen = configs.choose(x, w, Twell(), device)
        assert chosen.gate_pack in gate_packs
        assert chosen.up_down in up_downs
        assert len(gate_packs) == len(set(gate_packs)) < 100
        assert all(config.misfit(256, x.dtype.itemsize, device) is None for config in gate_packs)


def test_backup_rows_are_few_in_memory():
    assert [backup_rows.bound(m) for m in (1, 65536, 1 << 20)] == [128, 4096, 8192]
