"""The numbers of a comparison as text, the same in the terminal and on the page, and which of them lead."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.comparison import BETTER, COSTS, Comparison, Group, Measurement, leaders
from pipelines.report_columns import columns
from pipelines.tables import needed_width

Mark = Literal["best", "tied"]
QUALITY = ("nfe", "fid", "fid_spread", "second_fid", "kid", "precision", "recall")
COST = ("nfe", "images_per_second", "train_seconds", *COSTS)
LEGEND = (
    "Marked by number of calls: the best of a column, or with ≈ all whose intervals overlap that of the best, which are"
    " then not told apart."
)
_HEADINGS = {"worker_seconds": "Worker\ns", "network_calls": "Network\ncalls"}
_STYLES = {"best": "bold green", "tied": "green"}


@dataclass(frozen=True, kw_only=True)
class MarkedColumn:
    """One column of a group's table."""

    name: str
    """Field of Row, or a cost."""
    heading: str
    """What stands above it; a line break parts its two lines."""
    texts: list[str]
    """A text for each entry."""
    marks: dict[int, Mark]
    """The entries that lead at their number of calls."""


def marked_columns(group: Group) -> list[MarkedColumn]:
    """The columns of a group's entries, in order."""
    told = {column.name: (column.heading, column.texts) for column in columns([entry.row for entry in group.entries])}
    told |= {name: (_HEADINGS[name], _cost_texts(group, name)) for name in COSTS}
    names = [name for name in dict.fromkeys(QUALITY + COST) if name in told and set(told[name][1]) != {"-"}]
    return [MarkedColumn(name=n, heading=told[n][0], texts=told[n][1], marks=_marks(group, n)) for n in names]


def measured(measurement: Measurement) -> str:
    """How a group was measured, in words."""
    against = measurement.source or "held-out images"
    return (
        f"FID of {measurement.num_samples:,} samples under {measurement.fid_features} features, against"
        f" {measurement.num_reference:,} {against}"
    )


def print_comparison(found: Comparison, console: Console) -> None:
    """Print each group's table and leaders, then what differs, then what to mind."""
    for group in (group.shown() for group in found.groups):
        _say(console, f"\n{measured(group.measurement)}:")
        _print_tables(group, console)
        for place in group.places():
            _say(console, place.text)
    _say(console, LEGEND)
    _print_differences(found, console)
    for note in found.notes:
        _say(console, f"Mind: {note}")


def _cost_texts(group: Group, name: str) -> list[str]:
    values = [entry.value(name) for entry in group.entries]
    return ["-" if value is None else f"{value:,.0f}" for value in values]


def _marks(group: Group, name: str) -> dict[int, Mark]:
    if name not in BETTER or name in group.unmarked:
        return {}
    found: dict[int, Mark] = {}
    for places in _sections(group):
        ahead = [places[place] for place in leaders([group.entries[place] for place in places], name)]
        if len({group.entries[place].value(name) for place in places}) == 1:
            continue  # all the same
        overlap = len({group.entries[place].value(name) for place in ahead}) > 1
        found |= dict.fromkeys(ahead, "tied" if overlap else "best")
    return found


def _sections(group: Group) -> Iterator[list[int]]:
    start = 0
    for _, entries in group.by_calls():
        yield list(range(start, start + len(entries)))
        start += len(entries)


def _print_tables(group: Group, console: Console) -> None:
    """One table, or where the terminal is narrow one of quality and one of cost."""
    every = marked_columns(group)
    parts = [[column for column in every if column.name in names] for names in (QUALITY, COST)]
    tables = [_table(group, every)]
    if needed_width(tables[0], console) > console.width:
        tables = [_table(group, part) for part in parts]
    for table in tables:
        table.width = needed_width(table, console)
        console.print(table, crop=False, no_wrap=True)


def _table(group: Group, kept: Sequence[MarkedColumn]) -> Table:
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("Run", "Generator"):
        table.add_column(heading, no_wrap=True)
    for column in kept:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for places in _sections(group):
        table.add_section()
        for place in places:
            entry = group.entries[place]
            solver = "" if entry.row.stage else f", {entry.row.solver}"
            cells = [_cell(column, place) for column in kept]
            table.add_row(Text(group.run_text(entry)), Text(entry.row.generator_name + solver), *cells)
    return table


def _cell(column: MarkedColumn, place: int) -> Text:
    mark = column.marks.get(place)
    return Text(("≈" if mark == "tied" else "") + column.texts[place], _STYLES.get(mark or "", ""))


def _print_differences(found: Comparison, console: Console) -> None:
    if not found.differences:
        _say(console, "\nTheir recipes are the same in everything that may change a result.")
    else:
        table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0), header_style="bold", title="What differs in the recipes")
        for heading in ("Field", *(run.name for run in found.runs)):
            table.add_column(heading, overflow="fold")
        for key, texts in found.differences.items():
            table.add_row(Text(key), *map(Text, texts))
        console.print(table)
    if found.other_differences:
        _say(console, f"Also different, and without effect on results: {', '.join(found.other_differences)}.")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
