"""``sparse-lm evaluate``."""

import dataclasses
from pathlib import Path

from train.cli.options import UsageError, parse_options
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvaluateData:
    """The text to evaluate on.

    Attributes:
      paths: where the corpus of the training is now, or another corpus (default: where it was in training).
      text_field: field of a JSONL document, or column of Parquet, that holds its text (default: as in
        training).
      every_document: evaluate on all documents of paths, not only on those that training would hold out: for
        text that it never had.
    """

    paths: tuple[str, ...] = ()
    text_field: str | None = None
    every_document: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measures a checkpoint on documents that its training held out.

    Attributes:
      checkpoint: a run's work directory, or one checkpoint in it.
      tokens: most tokens to evaluate (default: as in training).
      batch_size: sequences of a batch (default: as in training); changes no figure.
      json: also write the figures as JSON to this file; - writes them to stdout and the table to stderr.
      debug: show the traceback of an error.
    """

    checkpoint: str
    data: EvaluateData = dataclasses.field(default_factory=EvaluateData)
    tokens: int | None = None
    batch_size: int | None = None
    json: str | None = None
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(EvaluateOptions, argv, "evaluate")
    if not options.data.paths and options.data != EvaluateData():
        option = "every-document" if options.data.every_document else "text-field"
        raise UsageError(f"--data.{option} needs --data.paths; got none")

    from rich.console import Console

    from train.evaluate import evaluate_checkpoint

    report = evaluate_checkpoint(
        options.checkpoint,
        tokens=options.tokens,
        batch_size=options.batch_size,
        paths=options.data.paths,
        text_field=options.data.text_field,
        every_document=options.data.every_document,
    )
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
