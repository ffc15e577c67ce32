"""Checkpoints in the lm-evaluation-harness: ``sparse-lm evaluate --tasks``, and ``--model sparse_lm``.

The harness finds models by what is registered in its own process, and looks for no plug-ins. So its program
with this model in it is ``python -m train.harness``, with all of its options:

    python -m train.harness run --model sparse_lm --model_args checkpoint=runs/tiny --tasks piqa
"""

import dataclasses
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from rich.table import Table

from sparse_lm.harness import PAPER_TASKS, SparseHarness, task_paths
from train.cli.options import PROGRAM, did_you_mean
from train.errors import UserError
from train.run.checkpoint_reading import load_for_inference

PAPER = "paper"


@register_model("sparse_lm")
class CheckpointHarness(SparseHarness):
    """The model of a checkpoint; the harness makes it from ``--model_args``.

    Args:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      batch_size: most texts of a batch.
      max_batch_size: must be None; no batch size is searched for.
      device: not read. The harness's program names torch's first GPU whoever the model is; JAX has its device
        already, and ``JAX_PLATFORMS`` chooses it.
    """

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Raises UserError: no such checkpoint, or an argument that it does not take."""
        if max_batch_size is not None:
            raise UserError(
                f"max_batch_size must be left out, no batch size is searched for; got {max_batch_size!r}"
            )
        if batch_size is not None and not (str(batch_size).isdecimal() and int(batch_size)):
            raise UserError(f"batch-size must be a whole number of at least 1; got {batch_size!r}")
        model, tokenizer, _, _ = load_for_inference(checkpoint)
        super().__init__(model, tokenizer, batch_size=32 if batch_size is None else int(batch_size))


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One figure of one task.

    Attributes:
      task: its name.
      metric: ``acc``, ``acc_norm``, ``word_perplexity``, …
      value: of the metric.
      stderr: its standard error, where the harness has one.
      samples: documents measured.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


def evaluate_tasks(
    checkpoint: str,
    tasks: Sequence[str] = (PAPER,),
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
) -> list[TaskResult]:
    """Runs the harness with the model of a checkpoint.

    Args:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      tasks: names of the harness's tasks, or ``"paper"`` for the seven of arXiv 2603.23198.
      include_path: a directory with task files of the user's.
      limit: documents of each task at most.
      num_fewshot: examples before each question; by default what the task says.
      batch_size: most texts of a batch.

    Raises:
      UserError: a task that does not exist or whose data cannot be had, or no such checkpoint.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(
            f"--include-path must be a directory with task files; there is none at {include_path}"
        )
    names = [name for given in tasks for name in (PAPER_TASKS if given == PAPER else [given])]
    manager = TaskManager(include_path=list(task_paths(include_path)))
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        raise UserError(
            f"--tasks must name tasks of the lm-evaluation-harness or of --include-path, or be {PAPER}; got "
            f"{unknown!r}{did_you_mean(unknown, manager.all_tasks)}"
        )
    model = CheckpointHarness(checkpoint, batch_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the harness and its libraries: not the user's to mend
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=names,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            "the data of a task must be on this machine or come from the Hugging Face hub; the harness "
            f"says: {reason}"
        ) from error
    return _figures(results)


def _figures(results: Mapping[str, Any]) -> list[TaskResult]:
    """The harness names its figures ``metric,filter`` and their errors ``metric_stderr,filter``."""
    figures = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            samples = results["n-samples"].get(task, {}).get("effective", 0)
            error = float(stderr) if isinstance(stderr, float | int) else None
            figures.append(TaskResult(task, name, float(value), error, samples))
    return figures


def table(figures: Sequence[TaskResult]) -> Table:
    """For people: a row a figure."""
    shown = Table()
    shown.add_column("task")
    shown.add_column("metric")
    for name in ("value", "± standard error", "documents"):
        shown.add_column(name, justify="right")
    for one in figures:
        error = "" if one.stderr is None else f"{one.stderr:.4f}"
        shown.add_row(one.task, one.metric, f"{one.value:.4f}", error, str(one.samples or ""))
    return shown


def main() -> int:
    """The harness's own program, with ``--model sparse_lm`` in it."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
