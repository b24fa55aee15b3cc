"""Charts of a sweep, as PNG bytes: how the search went, what matters, which values did well, and the finalists."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.charts import mark_values, style, to_png
from pipelines.figures import LIGHT, Theme
from pipelines.tuning.results import HAND_SET, Finalist, Interval
from pipelines.tuning.trial import Trial
from pipelines.tuning.work import Mode, rank
from tune_spaces.space import Choice, Distribution, Uniform

_KINDS = {"search": "o", "random": "^"}
_COLOURS = "viridis_r"
_SPREAD = 3.0
"""How many times the least score the greatest is where an axis becomes logarithmic."""


def history(trials: Sequence[Trial], metric: str, mode: str, *, theme: Theme = LIGHT) -> bytes:
    """A PNG of the scores in the order in which trials ended, with the best so far, for the search and for chance."""
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.add_subplot(xlabel="trials that have ended", ylabel=metric)
        for kind, marker, colour in zip(_KINDS, _KINDS.values(), theme.students, strict=False):
            ended = sorted((one for one in trials if one.kind == kind), key=lambda one: one.ended)
            _draw_history(axes, [one for one in ended if one.score is not None], mode, marker, colour)
        own = next((one.score for one in trials if HAND_SET in one.name.split(" = ")), None)
        if own is not None:
            axes.axhline(own, color=theme.muted, linestyle=(0, (2, 2)), linewidth=1.2, label="the recipe as it is")
        _scale(axes, [score for one in trials if (score := one.score) is not None])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9)
        return to_png(figure)


def _draw_history(axes: Axes, trials: Sequence[Trial], mode: str, marker: str, colour: str) -> None:
    if not trials:
        return
    scores = [one.score or 0.0 for one in trials]
    places = np.arange(1, len(scores) + 1)
    early = np.array([one.state == "stopped" for one in trials])
    known: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": "none", "markersize": 5}
    axes.plot(places[~early], np.array(scores)[~early], label=trials[0].kind, **known)
    if early.any():
        axes.plot(places[early], np.array(scores)[early], label="stopped early", fillstyle="none", **known)
    axes.plot(places, list(accumulate(scores, min if mode == "min" else max)), color=colour, linewidth=1.8)


def population_paths(trials: Sequence[Trial], metric: str, mode: Mode, *, theme: Theme = LIGHT) -> bytes:
    """A PNG of the scores of a population from rung to rung; a copy's path leaves that of the trial which it copies.

    The path of the one that ends best stands out, with those that it comes from. What did far worse than the others is
    at the edge, with its score.
    """
    known = {one.key: one for one in trials if one.kind == "search" and one.points}
    ends = [one for one in known.values() if one.state == "done"]
    line = _ancestors(min(ends, key=lambda one: rank(one.score, mode)), known) if ends else {}
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.add_subplot(xlabel="iteration", ylabel=metric)
        axes.set_ylim(*_window([score for one in known.values() for _, score in one.points], mode))
        for one in known.values():
            until = line.get(one.key, -1.0)
            _draw_path(axes, [point for point in one.points if point[0] >= one.since], theme.muted, 0.55)
            _draw_path(axes, [point for point in one.points if one.since <= point[0] <= until], theme.students[0], 1.0)
            if one.parent:
                axes.plot(one.since, next(score for at, score in one.points if at == one.since), "o", color=theme.ink)
        _draw_ends(axes, [one.points[-1] for one in known.values() if one.state == "stopped"], theme.muted)
        axes.plot([], [], color=theme.students[0], label="the best, and what it comes from")
        axes.plot([], [], "o", color=theme.ink, linestyle="none", label="copied, with other numbers")
        axes.plot([], [], "x", color=theme.muted, linestyle="none", label="replaced")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9)
        return to_png(figure)


def _window(scores: Sequence[float], mode: Mode) -> tuple[float, float]:
    """The heights that hold all scores but the worst seventh."""
    low, high = np.quantile(scores, (0, 6 / 7) if mode == "min" else (1 / 7, 1))
    edge = 0.08 * float(high - low) or 1.0
    return float(low) - edge, float(high) + edge


def _draw_ends(axes: Axes, points: Sequence[Sequence[float]], colour: str) -> None:
    """A cross for each; beyond an edge one at the edge for all of a step, with their scores beside it."""
    beyond = dict[tuple[float, float], list[float]]()
    for step, score in points:
        height = float(np.clip(score, *axes.get_ylim()))
        axes.plot(step, height, "x", color=colour, markersize=6, clip_on=False)
        if height != score:
            beyond.setdefault((step, height), []).append(score)
    for place, scores in beyond.items():
        text = ", ".join(f"{score:.3g}" for score in sorted(scores))
        axes.annotate(text, place, (6, -3), textcoords="offset points", color=colour, fontsize=8)


def _scale(axes: Axes, scores: Sequence[float]) -> None:
    """Logarithmic, where a few bad scores would leave no height to the others."""
    if scores and 0 < _SPREAD * min(scores) < max(scores):
        axes.set_yscale("log")
    mark_values(axes)


def _ancestors(one: Trial, known: Mapping[str, Trial]) -> dict[str, float]:
    """A trial and those that it comes from, by key, each with the iteration up to which it is part of that line."""
    found, until = dict[str, float](), float("inf")
    while True:
        found[one.key], until = until, one.since
        if one.parent not in known:
            return found
        one = known[one.parent]


def _draw_path(axes: Axes, points: Sequence[Sequence[float]], colour: str, alpha: float) -> None:
    if points:
        axes.plot(
            [at for at, _ in points],
            [score for _, score in points],
            color=colour,
            alpha=alpha,
            linewidth=1.6,
            zorder=2 + alpha,
        )


def importance_bars(found: Mapping[str, float], *, theme: Theme = LIGHT) -> bytes:
    """A PNG with a bar for the share of the scores' variance that each parameter explains."""
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 0.8 + 0.3 * len(found)), layout="constrained")
        axes = figure.add_subplot(xlabel="share of the scores' variance")
        places = range(len(found))
        axes.barh(places, list(found.values()), height=0.62, color="#56B4E9")
        axes.set_yticks(places, list(found))
        axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(found.values()))
        for place, share in enumerate(found.values()):
            axes.annotate(f"{share:.2f}", (share, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
        return to_png(figure)


def parallel_coordinates(
    trials: Sequence[Trial], parameters: Mapping[str, Distribution], metric: str, *, theme: Theme = LIGHT
) -> bytes:
    """A PNG with an axis for each parameter and a line for each draw, coloured by its score."""
    drawn = [one for one in trials if one.score is not None and set(one.values) == set(parameters)]
    scores = np.array([one.score for one in drawn])
    scale = Normalize(scores.min(), np.quantile(scores, 0.9))  # a few bad draws must not take all the colours
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps[_COLOURS]
        for one, score in sorted(zip(drawn, scores, strict=True), key=lambda pair: -pair[1]):
            heights = [_height(parameter, one.values[name]) for name, parameter in parameters.items()]
            axes.plot(heights, color=colours(scale(score)), linewidth=1.3, alpha=0.85)
        _name_axes(axes, parameters, theme)
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, pad=0.02, label=metric)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return to_png(figure)


def _height(parameter: Distribution, value: Any) -> float:
    """Where a value stands on its axis, 0 to 1."""
    if isinstance(parameter, Choice):
        return list(parameter.values).index(value) / (len(parameter.values) - 1)
    if isinstance(parameter, Uniform) and parameter.log:
        low, high, value = np.log([parameter.low, parameter.high, value])
        return float((value - low) / (high - low))
    return (value - parameter.low) / (parameter.high - parameter.low)


def _name_axes(axes: Axes, parameters: Mapping[str, Distribution], theme: Theme) -> None:
    axes.set_xlim(-0.3, len(parameters) - 0.7)
    axes.set_ylim(-0.06, 1.06)
    short = [name.rpartition(".")[2] for name in parameters]
    axes.set_xticks(range(len(parameters)), short, rotation=20 if len(parameters) > 5 else 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    for place, parameter in enumerate(parameters.values()):
        axes.axvline(place, color=theme.rule, linewidth=1, zorder=0)
        for height, text in _marks(parameter):
            axes.annotate(text, (place, height), (4, 0), textcoords="offset points", fontsize=7.5, color=theme.muted)


def _marks(parameter: Distribution) -> list[tuple[float, str]]:
    if isinstance(parameter, Choice):
        return [(_height(parameter, value), str(value)) for value in parameter.values]
    return [(0.0, f"{parameter.low:.3g}"), (1.0, f"{parameter.high:.3g}")]


def finalist_intervals(found: Sequence[Finalist], *, theme: Theme = LIGHT) -> bytes:
    """A PNG of the finalists, the best on top: FID minus that of the recipe as it is, seed by seed, mean and interval.

    Where the recipe as it is was not trained, FID itself.
    """
    told = any(one.against for one in found)
    colours: dict[str, str] = dict(zip(("search", "random", "baseline"), (*theme.students[:2], theme.ink), strict=True))
    own = next((one.fids for one in found if one.against is None), {}) if told else {}
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 0.9 + 0.3 * len(found)), layout="constrained")
        what = "FID minus that of the recipe as it is" if told else "FID"
        axes = figure.add_subplot(xlabel=f"{what} (dots: seeds; line: 95% interval)")
        for place, one in enumerate(found):
            _draw_finalist(axes, place, one, own, colours[one.kind])
        axes.set_yticks(range(len(found)), [f"{one.name}   {one.score.mean:.2f}" for one in found])
        axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axes.invert_yaxis()
        return to_png(figure)


def _draw_finalist(axes: Axes, place: int, one: Finalist, own: Mapping[int, float], colour: str) -> None:
    values = [fid - own[seed] if own else fid for seed, fid in one.fids.items() if not own or seed in own]
    interval = (one.against or Interval(mean=0.0, half=None)) if own else one.score
    axes.plot(values, [place] * len(values), "o", markersize=4, alpha=0.5, color=colour)
    spread = [[interval.half or 0.0]] * 2
    axes.errorbar([interval.mean], [place], xerr=spread, marker="|", markersize=12, color=colour)
