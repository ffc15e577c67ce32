"""``sparse-lm analyze``: the analysis of a checkpoint as a directory of figures, a report and numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.analyze import analysis, figures, report
from train.analyze.analysis import Analysis
from train.data.holdout import TextChoice
from train.errors import UserError
from train.output import JsonFile, print_table, work_bar
from train.picture import check_matplotlib
from train.run.checkpoint_files import find_checkpoint

REPORT, NUMBERS = "report.html", "analysis.json"


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """Reports how a checkpoint's neurons are active on text: one pass, tables, figures and numbers.

    Attributes:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      out: the directory to write to: report.html, which needs no other file, the figures as .png and the
        numbers as analysis.json.
      data: the text to run over.
      tokens: most tokens, in whole sequences.
      call_tokens: tokens of one forward: so many are put in order, probed and timed at a time.
      debug: show the traceback of an error.
    """

    checkpoint: str
    out: str
    data: TextChoice = dataclasses.field(default_factory=TextChoice)
    tokens: int = 65_536
    call_tokens: int = 16_384
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "call_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")


def run(options: AnalyzeOptions, *, console: Console | None = None) -> Analysis:
    """Analyzes, writes the directory, and prints a row a layer.

    Raises:
      UserError: matplotlib is missing, no such checkpoint, the corpus is gone, or ``out`` cannot be written
        or holds the analysis of another checkpoint.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    check_matplotlib("analyze")
    out = Path(options.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must name a directory; {out} is a file: choose another")
    _check_unused(out, find_checkpoint(options.checkpoint))
    numbers = JsonFile(out / NUMBERS, option="--out", kind="directory")
    with work_bar(console) as show:
        found = analysis.analyze(
            options.checkpoint, tokens=options.tokens, call=options.call_tokens, text=options.data,
            on_progress=show,
        )  # fmt: skip
        numbers.write(found.to_dict())  # first: they say whose the other files are
        show("drawing", 0, 1)
        pictures = figures.draw(found, out)
        show("drawing", 1, 1)
    page = out / REPORT
    try:
        page.write_text(report.write_html(found, pictures), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out must name a directory that can be written; {page}: {error.strerror}"
        ) from error
    for note in (*found.notes, report.headline(found)):
        console.print(note, markup=False)
    print_table(console, table(found))
    for sentence in (found.times_note, found.training_note):
        console.print(sentence, markup=False)
    console.print(f"report: {page}", markup=False)
    return found


def _check_unused(out: Path, checkpoint: Path) -> None:
    """Raises UserError where ``out`` holds the analysis of another checkpoint, or files that are of no
    analysis and have the names of its own: they would be lost."""
    try:
        there: Any = json.loads((out / NUMBERS).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        for name in (NUMBERS, REPORT, *figures.FILE_NAMES):
            if (out / name).exists():
                raise UserError(
                    f"--out {out} holds a {name} that is of no analysis and would be lost: choose another "
                    "directory"
                ) from None
        return
    if there != str(checkpoint):
        raise UserError(f"--out {out} holds the analysis of {there}: choose another directory")


def table(found: Analysis) -> Table:
    """For people: a row a layer."""
    shown = Table()
    names = ["layer", "mean nnz", f"% of {found.d_ff}", "largest", "silent", "held by top 10 %"]
    auto = found.auto
    extra = (["auto, forward"] if auto else []) + ([] if found.speedups is None else ["of dense's speed"])
    for name in (*names, *extra):
        shown.add_column(name, justify="right")
    for nth, layer in enumerate(found.layers):
        row = [
            str(nth), f"{layer.mean_nnz:.1f}", f"{layer.mean_nnz / found.d_ff:.1%}", str(layer.max_nnz),
            f"{layer.silent_share:.1%}", f"{layer.held_by_top[-1]:.1%}",
        ]  # fmt: skip
        if auto:
            row.append(report.decision(auto.layers[nth].panel_forward))
        if found.speedups is not None:
            row.append(f"{found.speedups[nth]:.2f}")
        shown.add_row(*row)
    return shown
