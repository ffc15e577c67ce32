"""What a run lives through, and what stops it before any work, seen through the program."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import kill_runs
import programs
import pytest
import tiny_runs

from train import cli
from train.run import lock
from train.run.checkpoint_files import complete_steps

FOR_EVER = ("--steps", "1000000", "--checkpoint.every", "1000000")


def complaint(capsys, words):
    """The sentence of a program that fails before it prints anything else."""
    status = cli.main(words)
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("sparse-lm: ")
    assert err.count("\n") == 1
    return err.removeprefix("sparse-lm: ").rstrip()


@pytest.mark.timeout(120)
def test_a_held_directory_a_reader_that_leaves_and_a_hang_up(corpus, tmp_path, capsys):
    """One run through all three: it is alone in its directory, outlives its reader, and saves at SIGHUP."""
    words = programs.train(corpus, tmp_path, *FOR_EVER)
    with programs.start(words) as first:
        programs.wait_for_line(first, "step       1/1000000")
        metrics = tmp_path / "metrics.jsonl"
        programs.wait_until(lambda: metrics.stat().st_size > 2000)
        before = metrics.read_bytes()

        said = complaint(capsys, programs.train(corpus, tmp_path, "--seed", "1", "--steps", "2"))
        assert said.startswith(
            f"{tmp_path} is held by another run (process {first.pid} on {socket.gethostname()}, "
        )
        assert f"--workdir {tmp_path}" in said
        assert said.endswith("): wait for it to end, or choose another directory with --workdir")

        first.stdout.close()
        size = metrics.stat().st_size
        programs.wait_until(lambda: metrics.stat().st_size > size + 20_000)
        assert metrics.read_bytes().startswith(before)

        first.send_signal(signal.SIGHUP)
        error = first.stderr.read()
        assert first.wait(30) == 0, error
    assert "standard output is closed: the run goes on" in error
    assert "SIGHUP: saving after this step" in error
    assert "Traceback" not in error
    records = tiny_runs.read_records(tmp_path)
    steps = [record["step"] for record in records if "evaluation" not in record]
    assert steps == list(range(1, steps[-1] + 1))
    assert complete_steps(tmp_path / "checkpoints") == [steps[-1]]
    assert not (tmp_path / lock.FILE_NAME).exists()


def sign(workdir, host, age):
    """A lock file as a run on ``host`` leaves it that was killed ``age`` seconds ago."""
    holder = {"host": host, "pid": 7, "started": "2026-01-02T03:04:05+0000", "command": "sparse-lm train"}
    path = workdir / lock.FILE_NAME
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - age,) * 2)


def test_a_run_on_another_host_lives_while_it_touches_its_lock(corpus, tmp_path, capsys):
    sign(tmp_path, "elsewhere", age=10)
    said = complaint(capsys, programs.train(corpus, tmp_path, "--steps", "1"))
    assert "is held by another run (process 7 on elsewhere, started 2026-01-02T03:04:05+0000 as: " in said
    assert said.endswith("; if it has died, try again in 120 seconds")
    assert os.listdir(tmp_path) == [lock.FILE_NAME]


@pytest.mark.parametrize(("host", "age"), [("elsewhere", 200), (socket.gethostname(), 0)])
def test_a_lock_without_a_living_run_is_taken(corpus, tmp_path, capsys, host, age):
    sign(tmp_path, host, age)
    assert cli.main(programs.train(corpus, tmp_path, "--steps", "1")) == 0
    assert f"the run that held this directory has died (process 7 on {host}, " in capsys.readouterr().out
    assert not (tmp_path / lock.FILE_NAME).exists()


def test_a_refused_start_leaves_nothing_behind(tmp_path, capsys):
    said = complaint(capsys, programs.train(tmp_path / "none.jsonl", tmp_path / "a" / "b"))
    assert "there is no file" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "s3://bucket/run"])
def test_a_bucket_is_refused_before_any_work(corpus, tmp_path, capsys, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    said = complaint(capsys, [*programs.train(corpus, tmp_path), "--workdir", workdir])
    assert said.startswith(f"workdir must be a directory that this machine has mounted; got {workdir}: mount")
    said = complaint(capsys, ["evaluate", "--checkpoint", workdir])
    assert said.startswith(f"checkpoint must be a directory that this machine has mounted; got {workdir}: ")
    assert os.listdir(tmp_path) == []


def test_float16_is_not_trained(corpus, tmp_path, capsys):
    said = complaint(capsys, programs.train(corpus, tmp_path / "run", "--model.dtype", "float16"))
    assert said.startswith("model.dtype must be bfloat16 or float32 in training; got float16")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_device_that_is_not_there_is_one_sentence(corpus, finished, tmp_path, command):
    words = {
        "train": programs.train(corpus, tmp_path / "run"),
        "generate": ["generate", "--checkpoint", str(finished.workdir), "--prompt", "x"],
    }[command]
    with programs.start(words, JAX_PLATFORMS="cuda") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith(
        "sparse-lm: JAX_PLATFORMS=cuda must name a device that is there; JAX found none"
    )
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(corpus, tmp_path, capsys):
    """The absurd rate of step 2 leaves a finite state from which no step can go on."""
    options = ("--steps", "9", "--lr", "1e30", "--optimizer.skip-nonfinite", "2", "--checkpoint.every", "4")
    assert cli.main(programs.train(corpus, tmp_path, *options)) == 1
    out, err = capsys.readouterr()
    left_out = re.findall(r"^step (\d) is left out: .* \(in a row: (\d) of at most 2\)$", out, re.MULTILINE)
    assert left_out == [("3", "1"), ("4", "2")]
    assert "training stopped at step 5: the loss is " in err
    # What was saved after a step that was left out is the state before it.
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '4'}: lower" in err
    records = tiny_runs.read_records(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_checkpoints_by_time(corpus, tmp_path):
    options = (
        "--steps",
        "4",
        "--checkpoint.every",
        "100",
        "--checkpoint.minutes",
        "1e-9",
        "--checkpoint.keep",
        "9",
    )
    assert cli.main(programs.train(corpus, tmp_path, *options)) == 0
    assert complete_steps(tmp_path / "checkpoints") == [1, 2, 3, 4]


def test_kill_during_the_removal_of_a_checkpoint(corpus, tmp_path, capsys):
    """The next start removes the rest of it, and nothing that somebody else may have put there."""
    code = """if True:
        import shutil, sys, time
        from pathlib import Path
        from train import cli

        def stuck(path, **options):
            next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
            # In one write: the run prints beside it, and what stands between two words is another line.
            sys.stdout.write(f"removing {Path(path).relative_to(Path(path).parents[2])}\\n")
            time.sleep(600)

        shutil.rmtree = stuck
        sys.exit(cli.main(sys.argv[1:]))
    """
    words = programs.train(corpus, tmp_path, "--checkpoint.every", "1", "--checkpoint.keep", "1")
    with programs.start_python(["-c", code, *words, "--steps", "2", *FLAT]) as process:
        programs.wait_for_line(process, "removing checkpoints/deleting/1")
    checkpoints = tmp_path / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["2", "deleting"]
    shutil.copytree(checkpoints / "2", checkpoints / "20", ignore=shutil.ignore_patterns("params"))
    shutil.copytree(checkpoints / "2", checkpoints / "19.half-written")
    (checkpoints / "deleting" / "notes").mkdir()

    assert cli.main([*words, "--steps", "3", *FLAT]) == 0
    said = capsys.readouterr().out
    assert "ignoring half-written checkpoints: 19.half-written, 20\n" in said
    assert "removing what a killed run left of checkpoints: deleting/1\n" in said
    assert "resuming after step 2 of 3\n" in said
    left = ["19.half-written", "20.half-written", "3", "deleting"]
    assert sorted(os.listdir(checkpoints)) == left
    assert os.listdir(checkpoints / "deleting") == ["notes"]


def lose(victim, count, words, workdir):
    """Kills one of ``count`` processes once there is a checkpoint; what it leaves of the others."""
    with programs.start_together(words, count) as processes:
        programs.wait_until(lambda: bool(complete_steps(workdir / "checkpoints")), seconds=120)
        processes[victim].kill()
        began = time.monotonic()
        for index, process in enumerate(processes):
            _, errors = process.communicate(timeout=120)
            if index != victim:
                assert time.monotonic() - began < 60
                assert process.returncode == 1, errors
                assert errors.count("\n") == 1, errors
                assert errors.startswith(
                    f"sparse-lm: process {index} of {count} has lost another process of the run ("
                )
    return complete_steps(workdir / "checkpoints")[-1]


# A learning rate that does not depend on the number of steps.
FLAT = ("--optimizer.final-fraction", "1", "--optimizer.warmup-steps", "0", "--report.evaluate-every", "0")


@pytest.mark.timeout(240)
def test_a_lost_process_ends_the_other_and_one_process_goes_on_bit_for_bit(corpus, tmp_path):
    """With two devices in all there is one way of adding them up."""
    lost = programs.train(corpus, tmp_path / "lost", *FOR_EVER, *FLAT, "--checkpoint.every", "5")
    newest = lose(1, 2, lost, tmp_path / "lost")
    steps = ("--steps", str(newest + 3))
    for name in ("lost", "whole"):
        with programs.start(
            programs.train(corpus, tmp_path / name, *FLAT, *steps),
            XLA_FLAGS=programs.xla_flags(devices=2),
        ) as process:
            out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert (f"resuming after step {newest} of {newest + 3}\n" in out) == (name == "lost")
    found, expected = (kill_runs.figures(tmp_path / name) for name in ("lost", "whole"))
    assert len(expected) == newest + 3
    assert found == expected


@pytest.mark.timeout(240)
def test_the_first_of_three_processes_is_lost_and_two_go_on(corpus, tmp_path):
    """The first one holds the directory, and the service through which all of them know of each other."""
    words = programs.train(corpus, tmp_path, *FOR_EVER, "--checkpoint.every", "5", "--batch-size", "6")
    newest = lose(0, 3, words, tmp_path)
    words[words.index("1000000")] = str(newest + 1)
    with programs.start_together(words, 2) as processes:
        outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "the run that held this directory has died (process " in outputs[0][0]
    assert f"resuming after step {newest} of {newest + 1}\n" in outputs[0][0]
    assert complete_steps(tmp_path / "checkpoints")[-1] == newest + 1


def test_processes_that_do_not_find_each_other(corpus, tmp_path):
    """JAX would abort for want of the first process, with a stack dump."""
    code = """if True:
        import sys
        from train import cli, parallel
        parallel._JOIN_SECONDS = 1
        sys.exit(cli.main(sys.argv[1:]))
    """
    process = subprocess.run(
        [sys.executable, "-c", code, *programs.train(corpus, tmp_path / "run")],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_COORDINATOR_ADDRESS": "localhost:1",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        "sparse-lm: the first process of the run must answer at localhost:1 within 1 seconds, and all others "
        "must ask for it; not all did: see that every process runs and can reach that one\n"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.timeout(120)
def test_a_shard_cut_short_under_a_run_and_ctrl_c(corpus, tmp_path, capsys):
    """The first start ends with one sentence, and the second, with the shard restored, at Ctrl-C."""
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert cli.main(["tokenize", "--out", str(shards), "--data.paths", str(corpus), "--processes", "1"]) == 0
    file = shards / "train-00000.tokens"
    whole = file.read_bytes()
    words = programs.train(shards, run, *FOR_EVER, "--checkpoint.every", "20")
    with programs.start(words) as process:
        programs.wait_until(lambda: bool(complete_steps(run / "checkpoints")))
        os.truncate(file, 1000)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == (
        f"sparse-lm: the token shard {file} must be whole; found that it ends after 1,000 bytes: restore the "
        f"file, or move {shards} elsewhere: a run makes again what is missing in its cache, sparse-lm "
        "tokenize all else\n"
    )
    newest = complete_steps(run / "checkpoints")[-1]

    file.write_bytes(whole)
    with programs.start(words) as process:
        programs.wait_for_line(process, f"step {newest + 1:>7}/1000000")
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "SIGINT: saving after this step; once more to exit at once\n")
    stopped = complete_steps(run / "checkpoints")[-1]
    assert stopped > newest
    assert f"stopped by a signal after step {stopped} of 1000000, saved at " in out
