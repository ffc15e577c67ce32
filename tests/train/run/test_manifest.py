"""What a run says of itself at its start, keeps in its directory, and compares when it is taken up."""

import json
import os
import re

import programs
import pytest
import tiny_runs

from train import cli
from train.config import TrainConfig
from train.config_file import write_config
from train.run import loop
from train.run.manifest import check_others
from train.run.metrics import FILE_NAME as METRICS


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def manifest_of(workdir):
    return json.loads((workdir / "manifest.json").read_text())


def test_a_run_from_its_first_start_to_a_changed_second(corpus, workdir, capsys):
    words = programs.train(corpus, workdir, "--steps", "4", "--optimizer.warmup-steps", "2")
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    first = manifest_of(workdir)
    assert first["parameters"] == 257 * 16 + 2 * 16 * (16 + 8) + 3 * 16 * 32 + 2 * 16 + 16
    assert first["tokens"] == first["tokens_to_come"] == 4 * 4 * 16
    assert first["epochs"] == pytest.approx(4 * 4 * 16 / first["corpus"]["tokens"])
    assert first["corpus"]["documents"] == 40
    # Three f32 copies of the parameters, the silence of 32 neurons, and scalars.
    assert 3 * 4 * first["parameters"] + 4 * 32 < first["state_bytes"] < 3 * 4 * first["parameters"] + 4 * 64
    assert f"fingerprint {first['corpus']['fingerprint'][:12]}" in said
    assert "kernels  runs dense on xla" in said
    assert first["kernels"][-1] in said
    assert [(start["step"], start["changes"]) for start in first["history"]] == [(0, {})]

    # The file gives every option its default; what is typed besides is what has changed.
    again = ["train", "--config", str(workdir / "config.json")]
    again += ["--model.layer-loop", "unrolled"]
    assert cli.main([*again, "--steps", "5", "--optimizer.beta1", "0.5", "--model.sparsity.l1", "1"]) == 0
    said = capsys.readouterr().out
    assert "resuming after step 4 of 5\n" in said
    assert "changed on resume: steps is 5, was 4\n" in said
    assert "changed on resume: optimizer.beta1 is 0.5, was 0.9\n" in said
    # A cosine from 2.5e-3 to 5 % of it: over at step 4 of 4, at two thirds of its way at step 4 of 5.
    assert "the learning rate jumps at step 5: 0.000719, where it was to be 0.000125\n" in said
    assert "the L1 coefficient λ jumps at step 5: 1, where it was to be 0.002\n" in said
    assert [record["l1_coefficient"] for record in tiny_runs.read_records(workdir) if "ce" in record][-1] == 1
    second = manifest_of(workdir)
    assert second["history"][0] == first["history"][0]
    assert second["history"][1]["step"] == 4
    assert second["history"][1]["changes"]["optimizer.beta1"] == {"before": 0.9, "now": 0.5}
    assert second["config"]["steps"] == 5

    # λ is steered on from where it was, unless another one is asked for.
    target = [*again, "--model.sparsity.schedule", "target", "--model.sparsity.target-l0", "1", "--l1", "0.5"]
    assert cli.main([*target, "--steps", "6"]) == 0
    assert "the L1 coefficient λ is steered anew, from 0.5\n" in capsys.readouterr().out
    assert cli.main([*target, "--steps", "7"]) == 0
    assert "λ" not in capsys.readouterr().out
    steered = [record["l1_coefficient"] for record in tiny_runs.read_records(workdir) if "ce" in record][-2:]
    assert steered[0] == 0.5
    assert 0.5 < steered[1] <= 0.5 * 1.01**2

    # What would make another run of it is refused, and changes nothing.
    before = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    assert cli.main([*again, "--steps", "8", "--seed", "1"]) == 1
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in workdir.glob("*.json*")} == before


def test_a_dry_run_shows_the_run_and_begins_none(corpus, workdir, capsys):
    assert cli.main(programs.train(corpus, workdir, "--steps", "4", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "256 tokens to come" in said
    assert re.search(
        r"^memory   \S+ GiB on a device \(state \S+ GiB, temporary \S+ GiB\)$", said, re.MULTILINE
    )
    assert said.endswith("dry run: no step was taken\n")
    assert os.listdir(workdir) == ["cache"]


def test_kernels_that_cannot_run_are_refused_before_the_first_step(corpus, workdir, capsys):
    assert cli.main(programs.train(corpus, workdir, "--model.ffn.format", "twell")) == 1
    assert capsys.readouterr().err.startswith("sparse-lm: backend='triton' needs an NVIDIA GPU of compute")
    assert os.listdir(workdir) == ["cache"]


def test_a_manifest_of_something_else_is_left_alone(corpus, workdir, capsys):
    workdir.mkdir()
    (workdir / "manifest.json").write_text('{"name": "an extension"}')
    assert cli.main(programs.train(corpus, workdir, "--steps", "4")) == 1
    assert "manifest.json must be the manifest of a run; found another file" in capsys.readouterr().err
    assert (workdir / "manifest.json").read_text() == '{"name": "an extension"}'
    assert METRICS not in os.listdir(workdir)
    assert "cache" not in os.listdir(workdir)


def test_a_configuration_of_ones_own_is_not_replaced(corpus, workdir, capsys):
    """One that was written by hand may stand where a run is to write its own; one of a run is the same."""
    workdir.mkdir()
    mine = workdir / "config.json"
    mine.write_text('{"steps": 4}')
    words = programs.train(corpus, workdir, "--config", str(mine), "--steps", "4", "--dry-run")
    assert cli.main(words) == 1
    assert re.search(
        r"a run writes its whole configuration to .*config\.json, and the file there is none that a run "
        r"wrote: give it another name, under which --config takes it, or choose another --workdir\n",
        capsys.readouterr().err,
    )
    assert mine.read_text() == '{"steps": 4}'
    write_config(TrainConfig(), mine)
    check_others(workdir)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "config must be a preset or a JSON file; {file}: No such file or directory"),
        ("{", "config must be a preset or a JSON file; {file}: Expecting property name"),
        ("[]", "{file}: the whole must be an object of fields; got []"),
        pytest.param(
            "[" * 100_000,
            "config must be a preset or a JSON file; {file}: maximum recursion depth exceeded",
            id="too deep",
        ),
        ('{"stepz": 3}', "{file}: a run has no field stepz; did you mean steps?"),
        ('{"model": {"sparsity": {"l2": 3}}}', "{file}: model.sparsity has no field l2; did you mean l1?"),
        ('{"steps": "many"}', '{file}: steps must be int; got "many"'),
        ('{"steps": true}', "{file}: steps must be int; got true"),
        ('{"data": {"paths": "c.jsonl"}}', '{file}: data.paths must be tuple[str, ...]; got "c.jsonl"'),
        ('{"parallel": {"mode": "spmd"}}', "{file}: parallel.mode must be Literal['jit', 'pmap']; got"),
        ('{"steps": 0}', "{file}: steps must be at least 1 and under 2^31; got 0"),
    ],
)
def test_mistakes_in_a_configuration_file(tmp_path, capsys, text, sentence):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["train", "--config", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparse-lm: " + sentence.format(file=file))
    assert "must end with .json" not in err


def test_sequences_per_device_make_the_accumulation(corpus, workdir, capsys):
    """Four devices, as everywhere in these tests."""
    words = programs.train(corpus, workdir, "--batch-size", "16", "--steps", "2", "--batch-per-device", "2")
    assert cli.main(words) == 0
    assert "2 sequences on each at a time, accumulation 2\n" in capsys.readouterr().out
    assert manifest_of(workdir)["config"]["optimizer"]["accumulation"] == 2
    # On another number of devices it would be another, so the file leaves that open.
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["accumulation"] == 1

    again = ["train", "--config", str(workdir / "config.json"), "--steps", "3", "--batch-per-device"]
    assert cli.main([*again, "4"]) == 0
    said = capsys.readouterr().out
    assert "4 sequences on each at a time, accumulation 1\n" in said
    assert "changed on resume: optimizer.accumulation is 1, was 2\n" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--batch-per-device", "3"),
            "batch-size must be a multiple of devices × parallel.batch-per-device = 4 × 3 = 12; got 16: "
            "choose 12 or 24, or another number of sequences per device\n",
        ),
        (
            ("--batch-per-device", "2", "--accumulation", "4"),
            "optimizer.accumulation must be batch-size / (devices × parallel.batch-per-device = 4 × 2 = 8) "
            "= 2 where parallel.batch-per-device is given; got 4: leave one of the two out\n",
        ),
    ],
)
def test_sequences_per_device_that_do_not_divide_the_batch(corpus, workdir, capsys, options, sentence):
    assert cli.main(programs.train(corpus, workdir, "--batch-size", "16", *options)) == 1
    assert capsys.readouterr().err == f"sparse-lm: {sentence}"
    assert not workdir.exists()


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_a_step_that_does_not_fit_is_refused_before_the_first(corpus, workdir, capsys, monkeypatch, mode):
    words = programs.train(corpus, workdir, "--batch-size", "16", "--steps", "2", "--parallel.mode", mode)
    monkeypatch.setattr(loop, "device_limit", lambda: 1 << 16)
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "sparse-lm: a step must fit into the memory that a device gives; it would take 0.000"
    )
    fsdp = " or set --parallel.shard fsdp" if mode == "jit" else ""
    assert " GiB of 6.1e-05 GiB on a device (state " in said
    assert said.endswith(f"): set --parallel.batch-per-device 2 (now 4) or set --model.remat full{fsdp}\n")
    assert os.listdir(workdir) == ["cache"]
    monkeypatch.setattr(loop, "device_limit", lambda: 1 << 30)
    assert cli.main(words) == 0
    memory = manifest_of(workdir)["step_memory"]
    assert memory["limit"] == 1 << 30
    assert memory["state"] > manifest_of(workdir)["state_bytes"]  # and the tokens
    assert memory["temporary"] > 0
