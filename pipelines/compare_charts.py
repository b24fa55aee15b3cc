"""Charts of several runs, as PNG bytes: FID against calls, training time and cost, with intervals as error bars.

A colour is a run, a marker is a generator, so that neither is told by colour alone; the teacher is drawn in the ink.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from pipelines.charts import LINES, MARKERS, style, to_png
from pipelines.comparison import Entry, Group
from pipelines.figures import LIGHT, Theme

_STEP_ASIDE = 1.025
_LOGARITHMIC = 4.0  # a range of less has too few round numbers on a logarithmic axis
_AXES = {
    "nfe": "network calls a picture (NFE)",
    "train_seconds": "seconds of training",
    "worker_seconds": "worker seconds of all that it needed",
    "network_calls": "network calls of all that it needed",
}


@dataclass(frozen=True, kw_only=True)
class _Looks:
    colors: dict[str, str]
    markers: dict[str, str]
    theme: Theme


def fid_against(group: Group, keys: Sequence[str], *, theme: Theme = LIGHT) -> bytes:
    """A PNG with a panel for each of ``keys``: nfe, train_seconds, worker_seconds or network_calls, against FID.

    Raises:
        ValueError: no generator has any of them.
    """
    keys = [key for key in keys if points_of(group, key)]
    if not keys:
        raise ValueError("there is nothing to draw FID against")
    looks = _looks(group, theme)
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 4.4), layout="constrained")
        first = None
        for place, key in enumerate(keys):
            axes = first = figure.add_subplot(1, len(keys), place + 1, sharey=first, xlabel=_AXES[key])
            _draw(axes, points_of(group, key), key, looks)
            axes.tick_params(labelleft=not place)
            if not place:
                axes.set_ylabel(f"FID ({group.measurement.fid_features} features)")
        handles = _legend(group, keys, looks)
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, labelcolor=theme.ink)
        return to_png(figure)


def points_of(group: Group, key: str) -> list[Entry]:
    """The entries that have a positive value to be drawn at; costs and training are the students'."""
    return [entry for entry in group.entries if (entry.value(key) or 0) > 0]


def _looks(group: Group, theme: Theme) -> _Looks:
    generators = dict.fromkeys(entry.row.line_name for entry in group.entries)
    return _Looks(
        colors=dict(zip(group.runs, itertools.cycle(theme.students))),
        markers=dict(zip(generators, itertools.cycle(MARKERS))),
        theme=theme,
    )


def _color(entry: Entry, looks: _Looks) -> str:
    return looks.colors[entry.runs[0]] if entry.row.stage else looks.theme.ink


def _draw(axes: Axes, entries: Sequence[Entry], key: str, looks: _Looks) -> None:
    lines: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        for run in entry.runs:
            lines.setdefault((run, entry.row.line_name), []).append(entry)
    for line in lines.values():
        _draw_line(axes, sorted(line, key=lambda entry: entry.value(key) or 0), key, looks)
    axes.set_xscale("log")
    fids = [entry.row.fid for entry in entries]
    if min(fids) > 0 and max(fids) > _LOGARITHMIC * min(fids):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, max(fids) / min(fids))
    values = [entry.value(key) or 1 for entry in entries]
    low, high = min(values), max(values)
    axes.set_xlim(low / 1.25, high * 1.25)
    _plain_numbers(axes.xaxis, high / low * 1.5)


def _draw_line(axes: Axes, line: Sequence[Entry], key: str, looks: _Looks) -> None:
    aside = _aside(line[0], looks)
    x, y = [aside * (entry.value(key) or 0) for entry in line], [entry.row.fid for entry in line]
    ends = [entry.row.intervals.get("fid") or [entry.row.fid] * 2 for entry in line]
    spread = [[max(0.0, fid - low), max(0.0, high - fid)] for fid, (low, high) in zip(y, ends, strict=True)]
    known = any(map(any, spread))
    student = bool(line[0].row.stage)
    place = list(looks.colors).index(line[0].runs[0]) if student else 0
    joined = LINES[place // len(looks.theme.students) % len(LINES)] if key == "nfe" else "none"
    width, front = (1.6, 3) if student else (1.1, 2)
    axes.errorbar(
        x, y, yerr=np.transpose(spread) if known else None,
        color=_color(line[0], looks), marker=looks.markers[line[0].row.line_name], markersize=6,
        linestyle=joined, linewidth=width, elinewidth=1.3, capsize=3, alpha=0.9, zorder=front,
    )  # fmt: skip


def _aside(entry: Entry, looks: _Looks) -> float:
    """A factor near 1 that keeps the error bars of runs and generators at one place apart."""
    run = list(looks.colors).index(entry.runs[0]) - (len(looks.colors) - 1) / 2
    return _STEP_ASIDE ** (run + 0.5 * (list(looks.markers).index(entry.row.line_name) % 2))


def _short_number(value: float) -> str:
    """As people write it: 300k, 1.5M."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def _plain_numbers(axis: object, ratio: float) -> None:
    """Numbers as people write them, as many as the range has room for."""
    subs = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 8 else (1, 2, 5) if ratio < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))  # pyright: ignore[reportAttributeAccessIssue]
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))  # pyright: ignore[reportAttributeAccessIssue]
    axis.set_minor_formatter(NullFormatter())  # pyright: ignore[reportAttributeAccessIssue]
    axis.set_minor_locator(NullLocator())  # pyright: ignore[reportAttributeAccessIssue]


def _legend(group: Group, keys: Sequence[str], looks: _Looks) -> list[Line2D]:
    """The colour of each run, then the marker of each generator."""
    drawn = {entry.row.line_name: entry for key in keys for entry in points_of(group, key)}
    runs = [Line2D([], [], color=color, linewidth=4, label=run) for run, color in looks.colors.items()]
    return runs + [
        Line2D([], [], color=looks.theme.muted if entry.row.stage else looks.theme.ink, marker=looks.markers[name],
               linestyle="none", label=name)
        for name, entry in drawn.items()
    ]  # fmt: skip
