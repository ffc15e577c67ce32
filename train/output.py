"""Tables for people and JSON files for machines, as the commands write them."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from pallas_kernels.bench import json_file
from train.errors import UserError

_UNLIMITED = 1000


def print_table(console: Console, table: Table) -> None:
    """Prints all of a table: rich would cut its cells to 80 columns where the output is no terminal."""
    needed = Measurement.get(console, console.options.update(width=_UNLIMITED), table).maximum
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width


class JsonFile(json_file.JsonFile):
    """As there; a path that cannot be written is the user's to mend."""

    unwritable = UserError
