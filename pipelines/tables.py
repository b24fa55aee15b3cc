"""What the tables in the terminal share."""

from rich.console import Console
from rich.table import Table


def needed_width(table: Table, console: Console) -> int:
    """Columns of a terminal that a table takes with nothing cut or wrapped, however narrow the one there is."""
    return table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum
