"""``sparse-lm evaluate``."""

import dataclasses
from pathlib import Path

from train.cli.options import parse_options
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measures a checkpoint on the documents that its training held out.

    Attributes:
      checkpoint: a run's work directory, or one checkpoint in it.
      batches: most batches to evaluate (default: as in training).
      batch_size: sequences of a batch (default: as in training).
      json: also write the figures as JSON to this file; - writes them to stdout and the table to stderr.
      debug: show the traceback of an error.
    """

    checkpoint: str
    batches: int | None = None
    batch_size: int | None = None
    json: str | None = None
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(EvaluateOptions, argv, "evaluate")

    from rich.console import Console

    from train.evaluate import evaluate_checkpoint

    report = evaluate_checkpoint(options.checkpoint, batches=options.batches, batch_size=options.batch_size)
    Console(stderr=options.json == "-", highlight=False, soft_wrap=True).print(report.table())
    if options.json == "-":
        print(report.to_json())
    elif options.json is not None:
        try:
            Path(options.json).write_text(report.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json must name a file that can be written; {options.json}: {error.strerror}"
            ) from error
