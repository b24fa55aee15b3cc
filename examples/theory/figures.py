"""The four pictures, as PNG files. Every line has its own marker and its name beside it."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from examples.theory.experiment import Exam, Refined, Sketched
from examples.theory.measures import Measures
from examples.theory.pgd import HALVINGS, HEUN, RESIDUAL
from pipelines.figures import LIGHT

LINES: dict[str, tuple[str, str, Any]] = {
    "random": (LIGHT.students[0], "s", (0, (4, 1.5))),
    "velocity network": (LIGHT.students[3], "^", (0, (1, 1.2))),
    "sketch": (LIGHT.students[2], "o", "-"),
    HALVINGS: (LIGHT.students[2], "o", "-"),
    HEUN: (LIGHT.students[1], "D", (0, (4, 1.5))),
    RESIDUAL: (LIGHT.students[0], "^", (0, (1, 1.2))),
}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "figure.facecolor": LIGHT.paper, "axes.edgecolor": LIGHT.muted,
    "axes.labelcolor": LIGHT.muted, "text.color": LIGHT.ink, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LIGHT.rule, "grid.linewidth": 0.8,
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.titlecolor": LIGHT.ink,
    "xtick.color": LIGHT.muted, "ytick.color": LIGHT.muted, "lines.linewidth": 1.8, "lines.markersize": 5,
}  # fmt: skip
_BARE: dict[Any, Any] = {**_STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
_CLOUD = 3000


def save(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours, which these pictures are not seen to miss."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def capacity(sketches: Sequence[Sketched], exact: Measures, path: Path) -> None:
    """Error, distance and recall of sketches against their parameters; every seed and the mean."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        first, second, third = figure.subplots(1, 3)
        _over_parameters(first, sketches, "endpoint_rmse", LIGHT.students[2], "o")
        first.set(title="distance to the exact end", yscale="log")
        _over_parameters(second, sketches, "sliced_w2", LIGHT.students[2], "o")
        second.axhline(exact.sliced_w2, color=LIGHT.muted, linestyle=(0, (2, 2)), linewidth=1.2)
        second.annotate("exact flow", (0.02, exact.sliced_w2), (0, 3), ("axes fraction", "data"), "offset points")
        second.set(title="sliced W2 to data", yscale="log")
        last = sketches[-1]
        names = {"coarse_recall": "clusters found", "fine_recall": "modes found", "precision": "points on a mode"}
        for place, (key, name) in enumerate(names.items()):
            color, marker = LIGHT.students[place], ("s", "o", "^")[place]
            _over_parameters(third, sketches, key, color, marker)
            _name_at_end(third, last.parameters, _mean(last.measures, key), name, color)
        third.set(title="structure kept", ylim=(-0.03, 1.05), xlim=(0.7 * sketches[0].parameters, 60 * last.parameters))
        for axes in (first, second, third):
            axes.set(xscale="log", xlabel="parameters of the one-step student")
        for axes in (first, second):
            _plain_numbers(axes)
        save(figure, path)


def starts(exam: Exam, sketches: Sequence[Sketched], result: Refined, small: int, path: Path) -> None:
    """Points of the target, of sketches, and of the small width before and after its refinement."""
    before = result.before
    panels = {
        "target": exam.data.flatten(1).numpy(),
        f"sketch, width {sketches[0].width}": sketches[0].points,
        f"sketch, width {small}": before["sketch"],
        f"sketch, width {sketches[-1].width}": sketches[-1].points,
        f"velocity network, width {small}": before["velocity network"],
        **{f"DMD from {start}": points for start, points in result.after.items()},
    }
    with matplotlib.rc_context(_BARE):
        figure = Figure(figsize=(10, 5.4), layout="constrained")
        for axes, (name, points) in zip(figure.subplots(2, 4).flat, panels.items(), strict=True):
            axes.plot(*points[:_CLOUD].T, linestyle="", marker=".", markersize=1.3, color=LIGHT.ink, alpha=0.7)
            axes.set(title=name, xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), xticks=[], yticks=[], aspect="equal")
        save(figure, path)


def start_curves(result: Refined, path: Path) -> None:
    """The refinement from each start: mean over seeds, and from the least to the greatest."""
    titles = {"sliced_w2": "sliced W2 to data", "fine_recall": "modes found", "precision": "points on a mode"}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            for start, looks in result.curves.items():
                color, marker, line = LINES[start]
                values = np.array([[getattr(one, key) for one in look] for look in looks])
                axes.plot(result.steps, values.mean(1), color=color, marker=marker, linestyle=line)
                axes.fill_between(result.steps, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
                # Two that end near each other; precision has them the other way round.
                side = {"velocity network": -6, "random": 5}.get(start, 0) * (-1 if key == "precision" else 1)
                _name_at_end(axes, result.steps[-1], values[-1].mean(), start, color, up=side)
            axes.set(title=title, xlabel="DMD iterations", xlim=(0, 1.6 * result.steps[-1]))
            axes.set_xticks([0, result.steps[-1] // 2, result.steps[-1]])
            if key == "sliced_w2":
                axes.set_yscale("log")
                _plain_numbers(axes)
        save(figure, path)


def pgd(tables: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Errors against the steps that were composed, a panel for each target."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for axes, (title, errors) in zip(figure.subplots(1, len(tables)), tables.items(), strict=True):
            steps = 2.0 ** np.arange(len(errors[HALVINGS]))
            for name, values in errors.items():
                color, marker, line = LINES[name]
                axes.plot(steps, values, color=color, marker=marker, linestyle=line)
                _name_at_end(axes, steps[-1], values[-1], name, color)
            guide = np.array([steps[2], steps[-1]])
            axes.plot(guide, 2.5 * errors[HALVINGS][2] * guide[0] / guide, color=LIGHT.muted, linewidth=1)
            axes.annotate("1 / steps", (guide[0], 2.5 * errors[HALVINGS][2]), (4, 2), textcoords="offset points")
            axes.set(title=title, xlabel="steps composed (two to the halvings)", xlim=(0.8, 40 * steps[-1]))
            axes.set(xscale="log", yscale="log", ylabel="error of the mean velocity")
        save(figure, path)


def _over_parameters(axes: Axes, sketches: Sequence[Sketched], key: str, color: str, marker: str) -> None:
    parameters = [one.parameters for one in sketches]
    axes.plot(parameters, [_mean(one.measures, key) for one in sketches], color=color, marker=marker)
    for one in sketches:
        axes.plot([one.parameters] * len(one.measures), [getattr(m, key) for m in one.measures], "_", color=color)


def _plain_numbers(axes: Axes) -> None:
    """Ticks of a logarithmic side at 1, 2 and 5, without powers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _mean(measures: Sequence[Measures], key: str) -> float:
    return float(np.mean([getattr(one, key) for one in measures]))


def _name_at_end(axes: Axes, x: float, y: float, name: str, color: str, up: float = 0) -> None:
    axes.annotate(name, (x, y), (6, up), textcoords="offset points", color=color, va="center", fontsize=8.5)
