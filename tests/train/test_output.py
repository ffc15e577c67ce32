"""Tables lose nothing, wherever they are printed."""

import io

from rich.console import Console
from rich.table import Table

from train.output import print_table


def test_a_table_is_printed_whole_where_there_is_no_terminal():
    """By itself rich would cut every cell to fit 80 columns."""
    table = Table()
    for number in range(12):
        table.add_column(f"a long heading {number}", no_wrap=True)
    file = io.StringIO()
    print_table(Console(file=file), table)
    assert all(f"a long heading {number}" in file.getvalue() for number in range(12))
