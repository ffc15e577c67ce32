"""What a run says to people, through rich: plain lines where the output is no terminal."""

import contextlib
import datetime
import errno
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from sparse_lm import ModelConfig
from train.cli.options import PROGRAM
from train.config import TrainConfig
from train.data.tokenize import Progress
from train.output import tokenize_bar
from train.run.manifest import Manifest, quantity
from train.run.metrics import Record, model_flops_utilisation


class RunConsole(Console):
    """A console whose reader may leave: the run goes on without it."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe's reader, a terminal that hung up
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Silences this console, and what Python itself would still flush into the pipe at its exit."""
        self.quiet = True
        if self.file is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            os.write(2, b"standard output is closed: the run goes on, and metrics.jsonl has its figures\n")


class Reporter:
    """Prints the lines of a run; silent in all processes but the first.

    Args:
      config: the run.
      console: where to print.
      primary: whether this process speaks.
    """

    def __init__(self, config: TrainConfig, *, console: Console | None = None, primary: bool = True) -> None:
        self._config = config
        self._console = console or RunConsole(quiet=not primary, highlight=False, soft_wrap=True)

    def say(self, what: RenderableType) -> None:
        """Prints one sentence, or a table."""
        self._console.print(what, markup=False)

    def tokenizing(self) -> AbstractContextManager[Progress]:
        """Shows how far tokenizing is, on a terminal."""
        return tokenize_bar(self._console)

    def begin(self, manifest: Manifest, changes: Mapping[str, tuple[Any, Any]], jumps: Sequence[str]) -> None:
        """The lines before the first step: what runs, where it starts, what has changed on resume."""
        self.say(manifest.lines())
        if manifest.start:
            self.say(f"resuming after step {manifest.start} of {self._config.steps}")
        for name, (before, now) in changes.items():
            self.say(f"changed on resume: {name.replace('_', '-')} is {now!r}, was {before!r}")
        for sentence in jumps:
            self.say(sentence)

    def progress(
        self, record: Record, *, tokens_per_second: float | None, seconds_left: float | None
    ) -> None:
        """The progress line of one step."""
        self.say(progress_line(self._config, record, tokens_per_second, seconds_left))

    def next_commands(self) -> None:
        """The last lines: where the checkpoints are and what to type next."""
        program, workdir = program_as_typed(), self._config.workdir
        self.say(
            f"checkpoint: {workdir}\n"
            f"next:\n"
            f'  {program} generate --checkpoint {shlex.quote(workdir)} --prompt "The state of the"\n'
            f"  {program} evaluate --checkpoint {shlex.quote(workdir)}"
        )


def program_as_typed() -> str:
    """What starts this program from the current directory, as this process was started."""
    started = Path(sys.argv[0])
    if started.parts[-2:] == ("train", "__main__.py"):
        return f"{_shortest(sys.executable)} -m train"
    if started.name != PROGRAM or shutil.which(PROGRAM) == str(started):
        return PROGRAM
    return _shortest(str(started))


def _shortest(path: str) -> str:
    """A program's path for a shell: its bare name if that finds it, relative if it lies below,
    else as it is."""
    name, here = os.path.basename(path), os.path.join(os.getcwd(), "")
    return name if shutil.which(name) == path else shlex.quote(path.removeprefix(here))


def progress_line(
    config: TrainConfig, record: Record, tokens_per_second: float | None, seconds_left: float | None
) -> str:
    """One step in one line; speed, utilisation and time to go only where they are known.

    Args:
      config: the run.
      record: ``metrics.to_record`` of the step.
      tokens_per_second: over all devices.
      seconds_left: until the last step.
    """
    model = config.model
    neurons = model.num_layers * model.d_ff
    parts = [
        f"step {record['step']:>{len(str(config.steps))}}/{config.steps}",
        f"ce {record['ce']:.4f}",
        f"l1 {record['l1']:.4g}",
        f"l0 {record['l0']:.1f} ({record['l0'] / model.d_ff:.1%} of {model.d_ff})",
        f"dead {sum(record['dead_per_layer']) / neurons:.1%}",
    ]
    if tokens_per_second is not None:
        parts.append(f"{quantity(tokens_per_second)} tokens/s")
        parts += _utilisation(model, tokens_per_second)
    if seconds_left is not None:
        parts.append(f"eta {datetime.timedelta(seconds=round(seconds_left))}")
    if "plan" in record:
        dense = statistics.mean(record["dense_tokens_per_layer"]) / (config.batch_size * model.context_length)
        union = statistics.mean(record["union_per_layer"])
        parts.append(f"union {union:.0f}  dense tokens {dense:.1%}  layers {record['plan']}")
    return "  ".join(parts)


def _utilisation(model: ModelConfig, tokens_per_second: float) -> list[str]:
    share = model_flops_utilisation(model, tokens_per_second)
    return [] if share is None else [f"mfu {share:.1%}"]
