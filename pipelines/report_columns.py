"""The numbers of a report as text, the same in the terminal and on the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.report import Row


def line_of(row: "Row") -> tuple[str, str, float]:
    """What a row shares with its neighbours of other numbers of calls: rows of one line stand together."""
    return row.generator, row.solver, row.guidance_scale


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
        known = [value for value in values if value is not None]
        best_text = write(best(known)) if best and len(set(map(write, known))) > 1 else ""
        texts = ["-" if value is None else write(value) for value in values]
        return Column(name=name, heading=heading, texts=texts, best=best_text)

    second = second_net(rows)
    of_second = digits([row.second_fid for row in rows if row.second_fid is not None])
    return [
        column("nfe", "Calls\n(NFE)", str, None),
        column("fid", f"FID\n({rows[0].fid_features})" if second else "FID", digits([row.fid for row in rows]), min),
        *([column("second_fid", f"FID\n({second})", of_second, min)] if second else []),
        column("precision", "Precision", "{:.3f}".format, max),
        column("recall", "Recall", "{:.3f}".format, max),
        column("images_per_second", "Images\n/s", digits([row.images_per_second for row in rows], 0), max),
        column("gflops_per_image", "GFLOPs\n/image", digits([row.gflops_per_image for row in rows]), min),
        column("train_seconds", "Train\ns", lambda value: f"{value:,.0f}" if value else "-", None),
    ]


def second_net(rows: Sequence["Row"]) -> str:
    """Name of the second feature net; empty where no row has one."""
    return next((row.second_features for row in rows if row.second_features), "")


def digits(values: Sequence[float], least: int = 1, most: int = 4) -> Callable[[float], str]:
    """A writer with as many decimals as give the smallest positive value three digits."""
    smallest = min((value for value in values if value > 0), default=1.0)
    decimals = min(max(2 - math.floor(math.log10(smallest)), least), most)
    return lambda value: f"{value:,.{decimals}f}"


def calls(count: int) -> str:
    """A number of network calls in words."""
    return "1 call" if count == 1 else f"{count} calls"
