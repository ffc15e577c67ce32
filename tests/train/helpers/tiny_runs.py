"""Runs small enough to do whole in a test; as a script, one such run in a process of its own."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparse_lm import ModelConfig, SparsityConfig
from train.config import CheckpointConfig, DataConfig, OptimizerConfig, ReportConfig, TrainConfig
from train.run.hooks import Hook
from train.run.loop import RunResult, run

MODEL = ModelConfig(
    vocab_size=257,
    d_model=32,
    d_ff=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    context_length=16,
    dtype="float32",
    init_std=0.2,
    # λ and the neurons brought back both follow from state that a resumed run must find again.
    sparsity=SparsityConfig(l1=1e-3, schedule="target", target_l0=16, dead_after=256, revive="reset"),
)
# A large eps keeps Adam's update smooth: with 1e-8 a gradient of pure rounding noise moves a weight by the
# whole learning rate, and two exact computations in another order of sums would look different.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, eps=1e-2, accumulation=2)
STEPS = 8


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """An uninterrupted run: what it returned, printed, and held after each step."""

    config: TrainConfig
    result: RunResult
    states: dict[int, Any]
    output: str
    compilations: dict[int, int]

    @property
    def workdir(self) -> Path:
        return Path(self.config.workdir)


def write_corpus(path: Path) -> Path:
    """A made JSONL corpus of 40 documents over a few words, the same each time."""
    rng = random.Random(0)
    words = ("the", "sum", "of", "our", "hopes", "is", "a", "long", "road", "we", "walk", "🙂")
    documents = (" ".join(rng.choices(words, k=40)) for _ in range(40))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def tiny_config(corpus: Path, workdir: Path, **changes: Any) -> TrainConfig:
    """8 steps of 8 × 16 tokens with a checkpoint every 2 steps; ``changes`` are fields of TrainConfig."""
    config = TrainConfig(
        steps=STEPS,
        batch_size=8,
        seed=3,
        workdir=str(workdir),
        model=MODEL,
        data=DataConfig(paths=(str(corpus),)),
        optimizer=OPTIMIZER,
        checkpoint=CheckpointConfig(every=2, keep=2),
        report=ReportConfig(every=1, evaluate_every=4, evaluate_tokens=128),
    )
    return dataclasses.replace(config, **changes)


def snapshot(tree: Any) -> Any:
    """Copies of all leaves on the host, which no donated buffer can change afterwards."""
    return jax.tree.map(lambda leaf: np.array(leaf), jax.device_get(tree))


def run_recording(config: TrainConfig) -> tuple[RunResult, dict[int, Any]]:
    """The run, and a snapshot of its state after every step."""
    states: dict[int, Any] = {}

    def record(step: int, state: Any) -> None:
        states[step] = snapshot(state)

    return run(config, hooks=(Hook(record, 1),)), states


def read_records(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def start_process(
    corpus: Path, workdir: Path, *, mode: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """This file as a script in a process of its own; ``mode`` is explained in ``main``."""
    return subprocess.Popen(
        [sys.executable, "-u", __file__, mode, str(corpus), str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **(environment or {}),
        },
    )


def main(mode: str, corpus: str, workdir: str) -> None:
    """``slow`` sleeps after each step, ``stuck`` hangs where the save of step 4 is about to be complete."""
    hooks = [Hook(lambda step, state: time.sleep(0.3), 1)] if mode == "slow" else []
    if mode == "stuck":
        rename = os.rename

        def stuck_rename(source: Any, target: Any, **options: Any) -> None:
            if str(target).endswith("checkpoints/4"):
                print("about to commit", flush=True)
                time.sleep(600)
            rename(source, target, **options)

        os.rename = stuck_rename
    run(tiny_config(Path(corpus), Path(workdir)), hooks=hooks)


if __name__ == "__main__":
    main(*sys.argv[1:])
