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

    def column(
        name: str,
        heading: str,
        write: Callable[[float], str],
        best: Callable[..., Any] | None,
        read: Callable[["Row"], float | None] | None = None,
    ) -> Column:
        values = [read(row) if read else getattr(row, name) for row in rows]
        known = [value for value in values if value is not None]
        best_text = write(best(known)) if best and len(set(map(write, known))) > 1 else ""
        texts = ["-" if value is None else write(value) for value in values]
        return Column(name=name, heading=heading, texts=texts, best=best_text)

    second, has_kid = second_net(rows), any(row.kid is not None for row in rows)
    has_clip = any(row.clip_score is not None for row in rows)
    of_fid, of_second = digits([row.fid for row in rows]), digits(_known([row.second_fid for row in rows]))
    return [
        column("nfe", "Calls\n(NFE)", str, None),
        column("fid", f"FID\n({rows[0].fid_features})" if second else "FID", of_fid, min),
        *([column("fid_spread", "±", of_fid, None, half_width)] if any(map(half_width, rows)) else []),
        *([column("second_fid", f"FID\n({second})", of_second, min)] if second else []),
        *([column("kid", "KID", digits(_known([row.kid for row in rows])), min)] if has_kid else []),
        column("precision", "Precision", "{:.3f}".format, max),
        column("recall", "Recall", "{:.3f}".format, max),
        *([column("clip_score", "CLIP\nscore", "{:.2f}".format, max)] if has_clip else []),
        column("images_per_second", "Images\n/s", digits(_known([row.images_per_second for row in rows]), 0), max),
        column("gflops_per_image", "GFLOPs\n/image", digits(_known([row.gflops_per_image for row in rows])), min),
        column("train_seconds", "Train\ns", lambda value: f"{value:,.0f}" if value else "-", None),
    ]


def half_width(row: "Row", metric: str = "fid") -> float | None:
    """Half the width of a metric's interval; ``None`` where it has none."""
    low, high = row.intervals.get(metric) or (0.0, 0.0)
    return (high - low) / 2 or None


MEASURES = {
    "FID": "fid",
    "FID∞": "fid_infinity",
    "second FID": "second_fid",
    "KID": "kid",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "inception score": "inception_score",
    "CLIP score": "clip_score",
}
"""Every metric of a row by what it is called."""


def measures(rows: Sequence["Row"]) -> dict[str, str]:
    """The metrics that some row has, where some row has intervals."""
    told = any(row.intervals for row in rows)
    return {name: key for name, key in MEASURES.items() if told and any(getattr(row, key) is not None for row in rows)}


def with_interval(row: "Row", key: str) -> str:
    """A metric's value and interval, as text."""
    value, interval = getattr(row, key), row.intervals.get(key)
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


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
