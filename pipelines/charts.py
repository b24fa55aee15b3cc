"""Charts of a run, as PNG bytes: FID against network calls, training curves, seconds by phase.

Nothing here keeps state: no pyplot, no figure outlives its call. Every line has its own marker and its name beside it,
so that none is told by its colour alone.
"""

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from pipelines.figures import LIGHT, Theme

if TYPE_CHECKING:
    from pipelines.report import Phase, Row

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "p", "h", "d", "8", "H")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_CURVE_COLUMNS = 4
_CURVE_POINTS = 1500
_DOTS_PER_INCH = 180


def fid_against_nfe(rows: Sequence["Row"], *, real_fid: float | None = None, theme: Theme = LIGHT) -> bytes:
    """A PNG of FID against network calls, both logarithmic: a line for each generator and solver, named beside it."""
    if not rows:
        raise ValueError("there is no row to draw FID against network calls from")
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figure.add_subplot(
            xlabel="network calls a picture (NFE)", ylabel=f"FID ({rows[0].fid_features} features)"
        )
        lines = _fid_lines(axes, rows, theme)
        _fid_axes(axes, rows, real_fid)
        if real_fid is not None and real_fid > 0:
            axes.axhline(real_fid, color=theme.muted, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
            lines.append(("real training images", theme.muted, np.array([[x, real_fid] for x in axes.get_xlim()])))
        _place_labels(figure, axes, lines)
        return to_png(figure)


def training_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], *, theme: Theme = LIGHT) -> bytes:
    """A PNG with a panel for each loss of each stage: every logged value in the back, their running mean in front.

    `curves` maps a stage to its records; a record is {"step": ..., "loss/NAME": ..., ...}. ValueError without a loss.
    """
    panels = [(stage, key) for stage, records in curves.items() for key in _loss_keys(records)]
    if not panels:
        raise ValueError("no stage has logged a value named loss/...")
    num_rows, stages = math.ceil(len(panels) / _CURVE_COLUMNS), list(curves)
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 0.3 + 1.75 * num_rows), layout="constrained")
        for place, (stage, key) in enumerate(panels):
            axes = figure.add_subplot(num_rows, _CURVE_COLUMNS, place + 1)
            axes.set_title(f"{stage}: {key.removeprefix('loss/')}", loc="left", fontsize=9, color=theme.ink)
            color = theme.students[stages.index(stage) % len(theme.students)]
            _draw_curve(axes, *curve(curves[stage], key), color)
        figure.supxlabel("optimiser step", fontsize=9, color=theme.muted)
        return to_png(figure)


def seconds_by_phase(phases: Sequence["Phase"], *, theme: Theme = LIGHT) -> bytes:
    """A PNG with a bar for each phase, in order, its seconds at the end; a reused phase is hollow and says so."""
    if not phases:
        raise ValueError("there is no phase to draw the seconds of")
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 0.75 + 0.3 * len(phases)), layout="constrained")
        axes = figure.add_subplot(xlabel="seconds")
        places, seconds = range(len(phases)), [phase.wall_seconds for phase in phases]
        faces = ["none" if phase.reused else "#56B4E9" for phase in phases]
        axes.barh(places, seconds, height=0.62, color=faces, edgecolor="#56B4E9", linewidth=1.2)
        axes.set_yticks(places, [phase.name for phase in phases])
        axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * max(*seconds, 1e-3))
        for place, phase in enumerate(phases):
            text = f"{phase.wall_seconds:,.1f}" + (" (reused)" if phase.reused else "")
            axes.annotate(
                text, (phase.wall_seconds, place), (5, 0), textcoords="offset points", va="center_baseline", fontsize=9
            )
        return to_png(figure)


def style(theme: Theme) -> dict[Any, Any]:
    """Settings of matplotlib for a chart of a page."""
    return {
        "font.family": "DejaVu Sans", "font.size": 10, "figure.dpi": _DOTS_PER_INCH,
        "figure.facecolor": theme.paper, "savefig.facecolor": theme.paper, "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.muted, "axes.labelcolor": theme.muted, "text.color": theme.ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": theme.rule, "grid.linewidth": 0.8,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "xtick.labelsize": 9, "ytick.labelsize": 9,
    }  # fmt: skip


def to_png(figure: Figure) -> bytes:
    """A drawn figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()


def _fid_lines(axes: Axes, rows: Sequence["Row"], theme: Theme) -> list[tuple[str, str, np.ndarray]]:
    """Draws the lines; returns (name, colour, points (n, 2) by rising NFE) of each."""
    students = list(dict.fromkeys(row.generator for row in rows if row.stage))
    lines, num_solvers = [], dict.fromkeys((row.generator for row in rows), 0)
    for place, ((generator, name), group) in enumerate(itertools.groupby(_by_line(rows), key=_line)):
        points = np.array(sorted((row.nfe, row.fid) for row in group))
        color = theme.students[students.index(generator) % len(theme.students)] if generator in students else theme.ink
        style, marker = LINES[num_solvers[generator] % len(LINES)], MARKERS[place % len(MARKERS)]
        size = 8 if len(points) == 1 else 6
        axes.plot(*points.T, color=color, linestyle=style, marker=marker, markersize=size, linewidth=1.8)
        num_solvers[generator] += 1
        lines.append((name, color, points))
    return lines


def _line(row: "Row") -> tuple[str, str]:
    return row.generator, row.line_name


def _by_line(rows: Sequence["Row"]) -> list["Row"]:
    """The rows with each line's together, lines in order of appearance."""
    order = list(dict.fromkeys(_line(row) for row in rows))
    return sorted(rows, key=lambda row: order.index(_line(row)))


def _fid_axes(axes: Axes, rows: Sequence["Row"], real_fid: float | None) -> None:
    """Logarithmic axes with plain numbers: calls that were measured below, 1-2-5 at the side."""
    calls = sorted({row.nfe for row in rows})
    axes.set_xscale("log")
    axes.set_xlim(calls[0] / 1.18, calls[-1] * 1.18)
    axes.xaxis.set_major_locator(FixedLocator(_ticks_apart(calls)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    values = [row.fid for row in rows] + ([real_fid] if real_fid else [])
    if min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.35, max(values) * 1.35)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())


def _ticks_apart(calls: Sequence[int]) -> list[int]:
    """The calls that can be labelled on a logarithmic axis without their numbers touching."""
    apart, kept = max(math.log(calls[-1] / calls[0]), 1e-9) / 22, [calls[0]]
    for call in calls[1:]:
        if math.log(call / kept[-1]) >= apart:
            kept.append(call)
    return kept


def _place_labels(figure: Figure, axes: Axes, lines: Iterable[tuple[str, str, np.ndarray]]) -> None:
    """Writes each line's name next to one of its points, where it covers the least and is nearest to its own line."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is placed in pixels must not move
    lines = [(name, color, axes.transData.transform(points)) for name, color, points in lines]
    drawn = [_samples_along(points) for _, _, points in lines]
    boxes: list[Bbox] = []
    for place, (name, color, points) in enumerate(lines):
        others = np.concatenate([[[-1e4, -1e4]], *drawn[:place], *drawn[place + 1 :]])
        text = axes.annotate(name, (0, 0), xycoords="figure pixels", color=color, fontsize=9.5)
        size = text.get_window_extent()
        spots = [spot for point in points[::-1] for spot in _spots(point, size.width, size.height)]
        inside = axes.get_window_extent()
        best = min(spots, key=lambda box: _clutter(box, drawn[place], others, boxes, inside))
        boxes.append(best)
        text.set_position((best.x0, best.y0 - size.y0))


def _spots(point: np.ndarray, width: float, height: float) -> list[Bbox]:
    """Boxes in pixels around a point, best first: right, then to the right and up or down, above, below, left."""
    x, y, gap = point[0], point[1], 0.1 * _DOTS_PER_INCH
    right, middle, left = x + gap, x - width / 2, x - width - gap
    level, above, below = y - height / 2, y + gap, y - gap - height
    corners = [(right, level), (right, above), (right, below), (middle, above), (middle, below)]
    corners += [(left, level), (left, above), (left, below)]
    corners += [(right, level + lines * 1.2 * height) for lines in (-1, 1, -2, 2, -3, 3)]
    return [Bbox.from_bounds(*corner, width, height) for corner in corners]


def _clutter(box: Bbox, own: np.ndarray, others: np.ndarray, boxes: Sequence[Bbox], inside: Bbox) -> float:
    """How bad a place is for a name: outside, on another name, on a line, nearer to another line than to its own."""
    wide = box.padded(0.03 * _DOTS_PER_INCH)
    outside = box.x0 < inside.x0 or box.x1 > inside.x1 + 4 or box.y0 < inside.y0 or box.y1 > inside.y1
    crossed = [np.count_nonzero(_distances(wide, points) == 0) for points in (own, others)]
    nearer = _distances(box, own).min() > 0.7 * _distances(box, others).min()
    return 500.0 * outside + 50 * wide.count_overlaps(boxes) + sum(crossed) + 5 * nearer


def _distances(box: Bbox, points: np.ndarray) -> np.ndarray:
    """Pixels from each of the points (m, 2) to a box; 0 inside."""
    return np.hypot(*np.maximum(0, np.maximum(box.min - points, points - box.max)).T)


def _samples_along(points: np.ndarray, every_pixels: float = 5) -> np.ndarray:
    """Points (m, 2) along the straight pieces between `points` (n, 2), in pixels."""
    pieces = [points]
    for start, end in itertools.pairwise(points):
        count = max(2, int(np.hypot(*(end - start)) / every_pixels))
        pieces.append(start + np.linspace(0, 1, count)[:, None] * (end - start))
    return np.concatenate(pieces)


def _loss_keys(records: Sequence[Mapping[str, float]]) -> list[str]:
    """Names that begin with loss, in order of appearance."""
    return [key for key in dict.fromkeys(key for record in records for key in record) if key.startswith("loss")]


def has_losses(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bool:
    """Whether `training_curves` has anything to draw."""
    return any(_loss_keys(records) for records in curves.values())


def curve(records: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one logged name; where a step was logged twice the later stands."""
    last = {record["step"]: record[key] for record in records if key in record and math.isfinite(record[key])}
    steps = sorted(last)
    return np.array(steps, dtype=float), np.array([last[step] for step in steps], dtype=float)


def _draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    every = max(1, len(steps) // _CURVE_POINTS)
    axes.plot(steps[::every], values[::every], color=color, linewidth=0.7, alpha=0.35)
    axes.plot(steps[::every], running_mean(values)[::every], color=color, linewidth=1.8)
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=8)


def mark_values(axes: Axes) -> None:
    """Three to six plain numbers on the axis of values, be it linear or logarithmic."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(_marks(math.log10(high / low) if axes.get_yscale() == "log" else 0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _marks(decades: float) -> Locator:
    """Where they are on an axis over some powers of ten, 0 for a linear one."""
    if decades < 0.8:
        return MaxNLocator(4, steps=[1, 2, 5, 10])
    if decades < 2.5:
        return LogLocator(subs=(1, 2, 5) if decades < 1.4 else (1, 3))
    return LogLocator(numticks=5)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the values, narrower at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    begin = np.clip(np.arange(len(values)) - half, 0, None)
    end = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    return (sums[end] - sums[begin]) / (end - begin)
