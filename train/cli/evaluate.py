"""``sparse-lm evaluate``."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.cli.options import UsageError, parse_options
from train.data.holdout import TextChoice
from train.errors import UserError

# What to print, and what to write as JSON.
Measure = Callable[[], tuple[Any, Mapping[str, Any] | Sequence[Mapping[str, Any]]]]


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measures a checkpoint on the documents that its training held out, or with --tasks on benchmarks.

    Attributes:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      tokens: most tokens to evaluate (default: as in training).
      batch_size: sequences of a batch (default: as in training); changes no figure.
      tasks: tasks of the lm-evaluation-harness, with commas between them, or paper for the seven of
        arXiv 2603.23198; needs the extra eval.
      include_path: a directory with task files of your own, for --tasks.
      limit: most documents of each task.
      num_fewshot: examples before each question (default: as the task says).
      json: also write the figures as JSON to this file; - writes them to stdout and the table to stderr.
      debug: show the traceback of an error.
    """

    checkpoint: str
    data: TextChoice = dataclasses.field(default_factory=TextChoice)
    tokens: int | None = None
    batch_size: int | None = None
    tasks: str | None = None
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    json: str | None = None
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(EvaluateOptions, argv, "evaluate")
    for name, least in (("tokens", 1), ("batch_size", 1), ("limit", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    measure = _heldout(options) if options.tasks is None else _tasks(options)

    from rich.console import Console

    from train.output import JsonFile

    to_stdout = options.json == "-"
    file = JsonFile(None if to_stdout else options.json)  # what cannot be written is said before the work
    table, figures = measure()
    Console(stderr=to_stdout, highlight=False, soft_wrap=True).print(table)
    if to_stdout:
        print(json.dumps(figures))
    file.write(figures)


def check_text(choice: TextChoice) -> None:
    """Raises UsageError for what says something of --data.paths where there are none."""
    if not choice.paths and choice != TextChoice():
        option = "every-document" if choice.every_document else "text-field"
        raise UsageError(f"--data.{option} needs --data.paths; got none")


def _heldout(options: EvaluateOptions) -> Measure:
    """The held-out figures, once the options have been checked."""
    check_text(options.data)
    for name in ("include_path", "limit", "num_fewshot"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for --tasks; found no --tasks")

    def measure() -> tuple[Any, Mapping[str, Any]]:
        from train.evaluate import evaluate_checkpoint

        report = evaluate_checkpoint(
            options.checkpoint,
            tokens=options.tokens,
            batch_size=options.batch_size,
            paths=options.data.paths,
            text_field=options.data.text_field,
            every_document=options.data.every_document,
        )
        return report.table(), report.to_dict()

    return measure


def _tasks(options: EvaluateOptions) -> Measure:
    """The harness's figures, once the options have been checked."""
    assert options.tasks is not None
    if options.tokens is not None:
        raise UsageError("--tokens is for the held-out text; --tasks has --limit")
    if options.data != TextChoice():
        raise UsageError("--data is for the held-out text; --tasks bring their own")
    names = [name.strip() for name in options.tasks.split(",")]
    if not all(names):
        raise UsageError(f"--tasks must be names with commas between them; got {options.tasks!r}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs the lm-evaluation-harness: pip install 'sparse-lm[eval]'")

    def measure() -> tuple[Any, Sequence[Mapping[str, Any]]]:
        from train import harness

        figures = harness.evaluate_tasks(
            options.checkpoint,
            names,
            include_path=options.include_path,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
        )
        return harness.table(figures), [dataclasses.asdict(figure) for figure in figures]

    return measure
