"""The numbers of a report as text, the same in the terminal and on the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.report import Row


def line_of(row: "Row") -> tuple[str, str]:
    """What a row shares with its neighbours of other numbers of calls: rows of one line stand together."""
    return row.generator, row.solver


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of numbers, as text."""

    name: str
    """Field of Row."""
    heading: str
    """What stands above it; a line break parts its two lines."""
    texts: list[str]
    """A text for each row."""
    best: str
    """The text of the best value; empty where best has no meaning."""

    def is_best(self, place: int) -> bool:
        """Whether a row's text is the column's best."""
        return self.texts[place] == self.best != ""


def columns(rows: Sequence["Row"]) -> list[Column]:
    """The numbers of the rows, in the order in which a table shows them."""

    def column(name: str, heading: str, write: Callable[[float], str], best: Callable[..., Any] | None) -> Column:
        values = [getattr(row, name) for row in rows]
        best_text = write(best(values)) if best and len(set(map(write, values))) > 1 else ""
        return Column(name=name, heading=heading, texts=[write(value) for value in values], best=best_text)

    return [
        column("nfe", "Calls\n(NFE)", str, None),
        column("fid", "FID", digits([row.fid for row in rows]), min),
        column("precision", "Precision", "{:.3f}".format, max),
        column("recall", "Recall", "{:.3f}".format, max),
        column("images_per_second", "Images\n/s", digits([row.images_per_second for row in rows], 0), max),
        column("gflops_per_image", "GFLOPs\n/image", digits([row.gflops_per_image for row in rows]), min),
        column("train_seconds", "Train\ns", lambda value: f"{value:,.0f}" if value else "-", None),
    ]


def digits(values: Sequence[float], least: int = 1, most: int = 4) -> Callable[[float], str]:
    """A writer with as many decimals as give the smallest positive value three digits."""
    smallest = min((value for value in values if value > 0), default=1.0)
    decimals = min(max(2 - math.floor(math.log10(smallest)), least), most)
    return lambda value: f"{value:,.{decimals}f}"


def calls(count: int) -> str:
    """A number of network calls in words."""
    return "1 call" if count == 1 else f"{count} calls"
