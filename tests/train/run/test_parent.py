"""``sparse-lm train --from``: a run that begins with another one's weights."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import programs
import pytest
import tiny_runs
from flax import nnx

from train import cli
from train.run import convert
from train.run.checkpoint_reading import load_for_inference

# No weight changes in f32 by such steps, so that a child still has its parent's weights after some.
FROZEN = ("--lr", "1e-30", "--optimizer.warmup-steps", "0")


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory):
    """The work directory of a dense run: two steps with SiLU."""
    workdir = tmp_path_factory.mktemp("parents") / "dense"
    words = programs.train(corpus, workdir, "--steps", "2", "--model.activation", "silu", "--l1", "0")
    assert cli.main(words) == 0
    return workdir


@pytest.fixture
def child(tmp_path):
    return tmp_path / "child"


def words(corpus: Path, workdir: Path, *options: str) -> list[str]:
    """A child's command, which says nothing of sizes and tokenizer."""
    common = ("--batch-size", "4", "--steps", "2", "--report.evaluate-tokens", "64", "--report.every", "1")
    return ["train", *common, "--data.paths", str(corpus), "--workdir", str(workdir), *FROZEN, *options]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    """Parameters of the newest checkpoint, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(
        nnx.to_pure_dict(nnx.state(load_for_inference(directory)[0]))
    )
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = weights_of(first), weights_of(second)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_child_begins_with_the_weights_of_its_parent_and_goes_on_without_it(
    corpus, dense, child, tmp_path, capsys
):
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    before = files_of(source)
    ramp = ("--model.sparsity.schedule", "linear", "--model.sparsity.ramp-steps", "4", "--l1", "0.4")
    assert cli.main(words(corpus, child, "--from", str(source), *ramp)) == 0
    said = capsys.readouterr().out
    assert files_of(source) == before
    assert_same_weights(source, child)

    manifest = json.loads((child / "manifest.json").read_text())
    parent = manifest["parent"]
    assert (parent["path"], parent["step"]) == (str(source / "checkpoints" / "2"), 2)
    assert f"from     {parent['path']} (step 2, fingerprint {parent['fingerprint'][:12]})\n" in said
    assert manifest["config"]["model"]["activation"] == "relu"
    assert manifest["config"]["model"]["d_ff"] == 32  # the preset has 512
    steps = [record for record in tiny_runs.read_records(child) if "ce" in record]
    assert [record["l1_coefficient"] for record in steps] == pytest.approx([0, 0.1])
    assert all(0 < record["l0"] < 32 for record in steps)  # which is all, in the parent

    # The optimizer's state is the child's own: it has seen two gradients, and not four.
    with ocp.StandardCheckpointer() as checkpointer:
        rest = checkpointer.restore(child / "checkpoints" / "2" / "rest")
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(rest) if "count" in str(path[-1])]
    assert counts
    assert all(count == 2 for count in counts)

    again = words(corpus, child, "--steps", "3", *ramp)
    shutil.rmtree(source)
    assert cli.main(again) == 0
    assert "resuming after step 2 of 3\n" in capsys.readouterr().out
    assert cli.main([*again, "--steps", "4", "--from", str(source)]) == 0
    assert "resuming after step 3 of 4\n" in capsys.readouterr().out
    assert json.loads((child / "manifest.json").read_text())["parent"] == parent

    assert cli.main([*again, "--steps", "5", "--from", str(dense)]) == 0  # the same weights elsewhere
    capsys.readouterr()
    assert cli.main([*again, "--steps", "6", "--from", str(child)]) == 1
    assert f"--from must name what the run in {child} began from, {parent['path']}" in capsys.readouterr().err

    # Killed before its first checkpoint, a run begins again with its parent, and with nothing else.
    shutil.rmtree(child / "checkpoints")
    assert cli.main(again) == 1
    assert f"there is none at {parent['path']}\n" in capsys.readouterr().err
    shutil.copytree(dense, source)
    assert cli.main([*again, "--dry-run"]) == 0
    assert f"from     {parent['path']} (step 2" in capsys.readouterr().out
    with (source / "checkpoints" / "2" / "params" / "_METADATA").open("a") as file:
        file.write(" ")
    assert cli.main(again) == 1
    assert "has no checkpoint yet; found" in capsys.readouterr().err


def test_a_converted_model_is_a_parent(corpus, finished, child, tmp_path, capsys):
    """Out to Hugging Face's form and back: trained weights as safetensors, bit for bit those of the run."""
    convert.to_hf(str(finished.workdir), tmp_path / "hf")
    convert.from_hf(str(tmp_path / "hf"), tmp_path / "ours")
    before = files_of(tmp_path / "ours")
    options = ("--from", str(tmp_path / "ours"), "--model.activation", "relu2")
    assert cli.main(words(corpus, child, *options)) == 0
    assert files_of(tmp_path / "ours") == before
    assert_same_weights(finished.workdir, child)
    manifest = json.loads((child / "manifest.json").read_text())
    assert manifest["parent"]["path"] == str(tmp_path / "ours")
    assert manifest["config"]["model"]["activation"] == "relu2"

    inside = words(corpus, tmp_path / "ours" / "child", *options)
    assert cli.main(inside) == 1
    assert f"workdir must lie outside of what --from names, {tmp_path / 'ours'}" in capsys.readouterr().err
    assert files_of(tmp_path / "ours") == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--model.d-ff", "64"),
            "--from takes the model as it is at {dense}/checkpoints/2: model.d-ff is 32 there",
        ),
        (("--data.tokenizer", "bpe"), "{dense}/checkpoints/2 was trained with another tokenizer"),
        (
            ("--workdir", "{dense}"),
            "--from needs the workdir of a new run, or of one that began from {dense}",
        ),
        (("--workdir", "{dense}/checkpoints"), "workdir must lie outside of what --from names, {dense}"),
        (("--from", "{nowhere}"), "a checkpoint must be a directory; there is none at {nowhere}"),
        (("--from", "{empty}"), "{empty} must hold a checkpoint; found none"),
        (("--model.dtype", "float16"), "model.dtype must be bfloat16 or float32 in training"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(
    corpus, dense, child, tmp_path, capsys, options, sentence
):
    (tmp_path / "empty").mkdir()
    places = {"dense": dense, "nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty"}
    before = files_of(dense)
    filled = [option.format(**places) for option in options]
    assert cli.main(words(corpus, child, "--from", str(dense), *filled)) == 1
    error = capsys.readouterr().err
    assert error.startswith("sparse-lm: " + sentence.format(**places))
    assert error.count("\n") == 1
    assert files_of(dense) == before
    assert not (child / "manifest.json").exists()


def test_a_sparse_parent_has_no_silu_child(corpus, finished, child, capsys):
    silu = ("--from", str(finished.workdir), "--model.activation", "silu", "--l1", "0")
    assert cli.main(words(corpus, child, *silu)) == 1
    assert "model.activation must have silent neurons, as it has at" in capsys.readouterr().err
