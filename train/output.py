"""Tables for people and JSON files for machines, as the commands write them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from pallas_kernels.bench import json_file
from train.data.tokenize import Progress
from train.errors import UserError

_UNLIMITED = 1000


def print_table(console: Console, table: Table) -> None:
    """Prints all of a table: rich would cut its cells to 80 columns where the output is no terminal."""
    needed = Measurement.get(console, console.options.update(width=_UNLIMITED), table).maximum
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width


@contextmanager
def tokenize_bar(console: Console) -> Iterator[Progress]:
    """A progress bar, on a terminal; what it yields goes to ``tokenize`` as ``on_progress``."""
    columns = (
        TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(), DownloadColumn(),
        TransferSpeedColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=None, tokens=0, visible=False)

        def show(read: int, total: int, tokens: int) -> None:
            bar.update(task, completed=read, total=total, tokens=tokens, visible=True)

        yield show


@contextmanager
def work_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for work in several parts, on a terminal; what it yields is told what is being done,
    how much of it is done, and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield show


class JsonFile(json_file.JsonFile):
    """As there; a path that cannot be written is the user's to mend."""

    unwritable = UserError
