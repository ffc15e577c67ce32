"""Kills a tiny run again and again at random instants and checks what each kill has cost.

As a program, ``python tests/train/helpers/kill_runs.py --kills 100`` prints a table; a test kills a few
times. A run that was killed must go on from its newest complete checkpoint, may lose no checkpoint that was
complete, and in the end must have taken the very steps of a run that nobody killed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parent)]

import programs
import tiny_runs

from train.run.checkpoint_files import complete_steps

# A learning rate that does not depend on the number of steps, so that the lengths of runs make no difference.
OPTIONS = (
    "--optimizer.final-fraction", "1", "--optimizer.warmup-steps", "0", "--report.evaluate-every", "0",
    "--checkpoint.every", "3", "--checkpoint.keep", "2", "--report.every", "1",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
      during: ``"start"``, before the first step; ``"save"``, which it left half-written; or ``"steps"``.
      reached: last step in the metrics file.
      kept: step of the newest complete checkpoint, 0 without one.
      lost_checkpoints: checkpoints that were complete before this life and should still be there, but are
      not.
    """

    during: str
    reached: int
    kept: int
    lost_checkpoints: int


def kill_again_and_again(corpus: Path, workdir: Path, kills: int, seed: int = 0) -> list[Kill]:
    """Starts the run ``kills`` times and kills each life at a random instant.

    Raises:
      AssertionError: a life did not take up the newest complete checkpoint.
    """
    rng = random.Random(seed)
    words = programs.train(corpus, workdir, *OPTIONS, "--steps", "1000000")
    found: list[Kill] = []
    for _ in range(kills):
        before = complete_steps(workdir / "checkpoints")
        with programs.start(words) as life:
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, 4))
                said: Sequence[str] = ()
            else:
                said = programs.wait_for_line(life, "  ce ")
                for _ in range(rng.randint(0, 11)):
                    programs.wait_for_line(life, "  ce ")
                time.sleep(rng.uniform(0, 0.2))
            life.kill()
            life.stdout.close()
            errors = life.stderr.read()
        assert "Traceback" not in errors, errors
        if said and before:
            assert any(f"resuming after step {before[-1]} of" in line for line in said), (before, said)
        after = complete_steps(workdir / "checkpoints")
        partial = list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        reached = [record["step"] for record in records(workdir)]
        found.append(
            Kill(
                during="save" if partial else "steps" if said else "start",
                reached=reached[-1] if reached else 0,
                kept=after[-1] if after else 0,
                lost_checkpoints=sum(step >= 1 for step in before[-1:] if not after or after[-1] < step),
            )
        )
    return found


def records(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, of which a kill may cut off the last."""
    with contextlib.suppress(FileNotFoundError):
        lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
        return [record for record in map(json.loads, lines) if "ce" in record]
    return []


def assert_same_as_never_killed(corpus: Path, workdir: Path, reference: Path) -> int:
    """Finishes the run, does it once more without a kill, and compares every figure of every step.

    Returns:
      How many steps both runs took.
    """
    steps = max(complete_steps(workdir / "checkpoints"), default=0) + 4
    for directory in (workdir, reference):
        with programs.start(programs.train(corpus, directory, *OPTIONS, "--steps", str(steps))) as process:
            _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    killed, whole = figures(workdir), figures(reference)
    assert killed == whole
    assert [record["step"] for record in whole] == list(range(1, steps + 1))
    return steps


def figures(workdir: Path) -> list[dict[str, Any]]:
    """Every figure of every step but its speed."""
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in records(workdir)
    ]


def table(kills: Sequence[Kill]) -> str:
    """For people: a row for what a kill came in."""
    lines = [f"{'killed in':<10}{'times':>6}{'checkpoints lost':>18}{'steps to do again, most':>25}"]
    for during in ("start", "steps", "save"):
        these = [kill for kill in kills if kill.during == during]
        again = max((kill.reached - kill.kept for kill in these), default=0)
        lost = sum(kill.lost_checkpoints for kill in these)
        lines.append(f"{during:<10}{len(these):>6}{lost:>18}{again:>25}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        corpus = tiny_runs.write_corpus(root / "corpus.jsonl")
        kills = kill_again_and_again(corpus, root / "run", options.kills, options.seed)
        print(table(kills))
        steps = assert_same_as_never_killed(corpus, root / "run", root / "reference")
        print(f"every figure of {steps} steps is that of a run that nobody killed")


if __name__ == "__main__":
    main()
