"""What a checkpoint holds, which ones are kept, and what is said of those that cannot be used."""

import dataclasses
import errno
import json
import os
import re
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_runs
from flax import nnx

from pallas_kernels import FFNOptions, Hybrid, Panel
from train import cli
from train.config import CheckpointConfig, ParallelConfig, TrainConfig
from train.data.corpus import CorpusIdentity
from train.data.tokenizer import ByteTokenizer, fit_bpe
from train.errors import UserError
from train.parallel import Layout
from train.run import checkpoint
from train.run.checkpoint import Checkpoints
from train.run.checkpoint_files import complete_steps, find_checkpoint, set_aside
from train.run.checkpoint_reading import SavedData, load_for_inference, read_saved_data
from train.run.loop import run
from train.state import build_program


@pytest.fixture
def copy(finished, tmp_path):
    """A run's workdir to break."""
    return shutil.copytree(finished.workdir, tmp_path / "copy")


@pytest.fixture(scope="module")
def first_state(finished):
    return jax.jit(build_program(finished.config).init)()


DATA = SavedData(48, CorpusIdentity("a hash", 1 << 63, 40, 1000, 100))


def test_newest_are_kept_and_the_best_besides(finished, first_state, tmp_path):
    saver = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=2))
    saver.open()
    for step, ce in enumerate((3.0, 1.0, 2.0, None, 2.5, None), start=1):
        saver.save(first_state, DATA, finished.config, ByteTokenizer(), step=step, heldout_ce=ce)
    saver.close()
    assert complete_steps(saver.directory) == [2, 5, 6]


def test_state_saved_in_pieces_is_restored_in_others(finished, tmp_path):
    """Saved by four devices under FSDP; restored whole, in halves, and as ZeRO-1 has it."""
    abstract = build_program(finished.config).abstract_state()
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: (100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), abstract)
    fsdp = Layout.over_all_devices(ParallelConfig(shard="fsdp"))
    saver = Checkpoints(tmp_path, CheckpointConfig())
    saver.open()
    placed = jax.device_put(values, fsdp.state_shardings(abstract))
    saver.save(placed, DATA, finished.config, ByteTokenizer(), step=1)
    for shard, devices in (("none", 1), ("fsdp", 2), ("zero1", 4)):
        layout = Layout.over_first_devices(ParallelConfig(shard=shard), devices)
        shardings = layout.state_shardings(abstract)
        wanted = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract, shardings,
        )  # fmt: skip
        saver.wait()
        restored = saver.restore(1, wanted)
        jax.tree.map(np.testing.assert_array_equal, restored, values)
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
    saver.close()


def test_run_keeps_the_newest_and_the_best(finished):
    records = tiny_runs.read_records(finished.workdir)
    best = min((r["evaluation"]["ce"], r["step"]) for r in records if "evaluation" in r)[1]
    assert complete_steps(finished.workdir / "checkpoints") == sorted({6, 8, best})


def test_saved_state_is_of_its_step_though_training_went_on(finished):
    """The next step reuses the buffers that a save in the background reads."""
    saver = Checkpoints(finished.workdir, finished.config.checkpoint)
    saver.open()
    for step in (6, 8):
        restored = saver.restore(step, finished_abstract(finished.config))
        jax.tree.map(np.testing.assert_array_equal, tiny_runs.snapshot(restored), finished.states[step])
    saver.close()


def finished_abstract(config: TrainConfig):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        build_program(config).abstract_state(),
    )


def test_configuration_survives_json(finished):
    saver = Checkpoints(finished.workdir, finished.config.checkpoint)
    assert saver.config(8) == finished.config


def test_a_format_is_saved_as_text(finished, first_state, tmp_path):
    ffn = FFNOptions(format=Panel(tokens=32, capacity=0.5))
    config = dataclasses.replace(finished.config, model=dataclasses.replace(finished.config.model, ffn=ffn))
    saver = Checkpoints(tmp_path, CheckpointConfig())
    saver.open()
    saver.save(first_state, DATA, config, ByteTokenizer(), step=1)
    saver.close()
    assert saver.config(1).model.ffn.format == "panel(tokens=32, capacity=0.5)"


def test_a_configuration_of_the_version_before_is_read(finished, copy):
    path = copy / "checkpoints" / "8" / "run" / "metadata"
    run = json.loads(path.read_text())
    run["config"]["model"]["ffn"] = {
        "format": "hybrid", "backend": "auto", "weight_gradients": "auto", "tile": 256, "compression": 8,
        "width": 64, "backup_rows": None, "panel": 128, "capacity": 0.25,
    }  # fmt: skip
    path.write_text(json.dumps(run))
    config = load_for_inference(copy)[2]
    assert config.model.ffn.layout == Hybrid(width=64)


def test_inference_loads_the_newest_of_a_run(finished):
    model, tokenizer, config, step = load_for_inference(finished.workdir)
    assert (step, config, tokenizer.fingerprint) == (8, finished.config, ByteTokenizer().fingerprint)
    params = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, params, finished.states[8].params)


def test_inference_loads_one_step_under_any_name(finished, tmp_path):
    shutil.copytree(finished.workdir / "checkpoints" / "6", tmp_path / "kept")
    model, *_, step = load_for_inference(tmp_path / "kept")
    assert step == 6
    params = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, params, finished.states[6].params)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is none at .*nowhere"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="must hold a checkpoint; found none: pass the workdir"):
        find_checkpoint(tmp_path)


def test_half_written_is_passed_over_for_a_complete_one(copy):
    shutil.rmtree(copy / "checkpoints" / "8" / "rest")
    (copy / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir()
    assert find_checkpoint(copy).name == "6"
    with pytest.raises(UserError, match=r"checkpoints/8 is a half-written checkpoint: choose a complete one"):
        find_checkpoint(copy / "checkpoints" / "8")


def test_half_written_ones_alone_are_named(copy):
    for step in complete_steps(copy / "checkpoints"):
        shutil.rmtree(copy / "checkpoints" / str(step) / "params")
    (copy / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(
        UserError, match=r"only half-written ones: 10.orbax-checkpoint-tmp, .*6, 8: train again"
    ):
        load_for_inference(copy)


def test_half_written_is_set_aside_for_the_next_save(copy):
    (copy / "checkpoints" / "8" / "run" / "metadata").unlink()
    for expected in ("8.half-written", "8.half-written1"):
        saver = Checkpoints(copy, CheckpointConfig())
        saver.open()
        assert saver.newest() == 6
        assert "8" in saver.ignored
        saver.close()
        assert (copy / "checkpoints" / expected / "params").is_dir()
        shutil.copytree(copy / "checkpoints" / expected, copy / "checkpoints" / "8")


def test_set_aside_takes_a_free_name_whatever_has_been_moved_away(copy):
    """A name by count alone could be taken: an empty directory would be lost, and any other stop the run."""
    steps = copy / "checkpoints"
    (steps / "8" / "run" / "metadata").unlink()
    (steps / "8.half-written1").mkdir()
    set_aside(steps)
    assert sorted(os.listdir(steps)) == ["6", "8.half-written", "8.half-written1"]
    shutil.copytree(steps / "8.half-written", steps / "8")
    set_aside(steps)
    assert sorted(os.listdir(steps)) == ["6", "8.half-written", "8.half-written1", "8.half-written2"]


def test_a_file_with_a_steps_name_is_set_aside_too(copy):
    """A save would replace it."""
    steps = copy / "checkpoints"
    (steps / "10").write_text("mine")
    set_aside(steps)
    assert (steps / "10.half-written").read_text() == "mine"
    assert complete_steps(steps) == [6, 8]


def test_a_name_that_no_save_gives_is_no_step(copy):
    (copy / "checkpoints" / "8").rename(copy / "checkpoints" / "08")
    assert complete_steps(copy / "checkpoints") == [6]


@pytest.mark.parametrize("saved", ["", "{}", "[]", '{"position": 3, "corpus": {"files": 2}}'])
def test_a_damaged_position_names_the_checkpoint_before(copy, saved):
    (copy / "checkpoints" / "8" / "data" / "metadata").write_text(saved)
    with pytest.raises(UserError, match=r"8 must be a whole checkpoint; .*: choose the one before it, .*/6,"):
        read_saved_data(copy / "checkpoints" / "8")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def largest_file(directory: Path) -> Path:
    return max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


@pytest.mark.parametrize("find", [lambda params: params / "_METADATA", largest_file])
def test_damaged_parameters_are_one_sentence(copy, find, capfd):
    cut(find(copy / "checkpoints" / "8" / "params"))
    assert cli.main(["generate", "--checkpoint", str(copy), "--prompt", "x"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"sparse-lm: .*checkpoints/8 must be a whole checkpoint; .* \(.*\); it was left as it is: choose the "
        r"one before it, .*checkpoints/6, from which training goes on once 8 has been moved out of "
        r".*/checkpoints\n",
        err,
    )


def edit_config(directory: Path, name: str, value: object) -> None:
    file = directory / "run" / "metadata"
    saved = json.loads(file.read_text())
    saved["config"]["model"][name] = value
    file.write_text(json.dumps(saved))


def test_parameters_of_another_shape_are_one_sentence(copy, capsys):
    edit_config(copy / "checkpoints" / "8", "d_ff", 96)
    assert cli.main(["generate", "--checkpoint", str(copy), "--prompt", "x"]) == 1
    assert re.search(r"damaged or of another shape \(Requested shape: .*96", capsys.readouterr().err)


def test_float16_on_a_cpu_is_one_sentence(copy, capsys):
    edit_config(copy / "checkpoints" / "8", "dtype", "float16")
    assert cli.main(["generate", "--checkpoint", str(copy), "--prompt", "x"]) == 1
    assert capsys.readouterr().err.endswith(
        "/checkpoints/8 computes in float16, whose matrix products a CPU does not have: run it on a GPU\n"
    )


def test_configuration_of_another_version_is_one_sentence(copy):
    edit_config(copy / "checkpoints" / "8", "unheard_of", 1)
    with pytest.raises(UserError, match=r"unheard_of.*: use the version that saved it"):
        load_for_inference(copy)


def test_tokenizer_that_the_model_has_no_room_for_is_one_sentence(copy):
    newest = find_checkpoint(copy)
    fit_bpe(["the sum of our hopes"], 260).save(newest / "tokenizer")
    saved = json.loads((newest / "run" / "metadata").read_text())
    del saved["tokenizer"]  # as earlier versions saved it
    (newest / "run" / "metadata").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"the tokenizer has 260 ids but model\.vocab-size is 257"):
        load_for_inference(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"d_ff": 96}}, r"model.d-ff is 64 there and 96 here"),
        ({"model": {"num_layers": 3}, "seed": 4}, r"seed is 3 there and 4 here; model.num-layers is 2 there"),
        ({"batch_size": 16}, r"batch-size is 8 there and 16 here"),
    ],
)
def test_resuming_with_another_shape_names_the_field(finished, changes, message):
    model = dataclasses.replace(finished.config.model, **changes.pop("model", {}))
    with pytest.raises(UserError, match=message) as error:
        run(dataclasses.replace(finished.config, steps=9, model=model, **changes))
    assert "Only steps, workdir, optimizer, " in str(error.value)
    assert finished.result.checkpoint.is_dir()


def test_resuming_with_another_tokenizer_is_refused(finished):
    config = dataclasses.replace(
        finished.config, steps=9, data=dataclasses.replace(finished.config.data, tokenizer="bpe")
    )
    with pytest.raises(UserError, match=r"was trained with another tokenizer: data.tokenizer has 257 ids"):
        run(config)


def test_another_tokenizer_in_a_checkpoint_is_found(finished, copy):
    """Also where it has as many tokens, so that nothing but the texts would differ."""
    newest = find_checkpoint(copy)
    fit_bpe(["one text", "another"], 257).save(newest / "tokenizer")
    words = r"tokenizer must hold the tokenizer that the model was trained with \(fingerprint \w{12}\); found"
    with pytest.raises(UserError, match=words):
        load_for_inference(copy)
    with pytest.raises(UserError, match=words):
        run(dataclasses.replace(finished.config, steps=9, workdir=str(copy)))


def test_save_that_the_disk_has_no_room_for_is_not_begun(copy, finished, first_state, monkeypatch):
    saver = Checkpoints(copy, finished.config.checkpoint)
    saver.open()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match=r"the disk is full: .*MB wanted, 0.0 MB free\), earlier ones are intact"
    ):
        saver.save(first_state, DATA, finished.config, ByteTokenizer(), step=9)
    saver.close()
    assert complete_steps(copy / "checkpoints")[-1] == 8
    load_for_inference(copy)


def test_disk_that_fills_up_during_a_save_is_one_sentence(copy, finished, corpus, monkeypatch):
    """The write fails in orbax's background thread; the run must hear of it,
    and what was saved must stand."""

    async def full_disk(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full_disk)
    with pytest.raises(UserError, match=r"the disk is full: .*had no room for a checkpoint \(No space left"):
        run(tiny_runs.tiny_config(corpus, copy, steps=12))
    assert complete_steps(copy / "checkpoints")[-1] == 8
    monkeypatch.undo()
    assert load_for_inference(copy)[-1] == 8
