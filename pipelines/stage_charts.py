"""How a stage's training went, as a PNG: the discriminator's verdicts, the gradients, and what the probes saw.

A panel is drawn only where its values were logged. Every line ends in its name and has its own dashes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.charts import curve, mark_values, running_mean, style, to_png
from pipelines.figures import LIGHT, Theme

Records = Sequence[Mapping[str, float]]

_COLUMNS = 3
_POINTS = 1500
_SPARSE = 25  # a line of so few values shows each of them
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
_MARKERS = "os^"
_NAMES_APART = 0.115  # of a panel's height
_PROBES = ("probe/fid", "probe/diversity", "probe/fake_score_lag")
_VERDICTS = ("real_logit", "fake_logit", "accuracy_real", "accuracy_fake", "token_entropy")


@dataclass(frozen=True, kw_only=True)
class Level:
    """A value that a panel's lines are read against."""

    value: float
    """Where it is drawn."""
    name: str
    """What it is."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of a stage's chart."""

    title: str
    """What it shows."""
    lines: Mapping[str, str]
    """Logged name to the name beside its line; a line without a name needs none."""
    reading: str
    """How to tell a healthy training from a collapsing one."""
    log: bool = False
    """Whether the axis is logarithmic; values of 0 are left out there."""
    level: Level | None = None
    """What to read the lines against."""
    range: tuple[float, float] | None = None
    """Least range of the axis."""
    lowest: bool = False
    """Whether the lowest value is marked and told in the title."""
    changing: bool = False
    """Whether it is left out while its values stay the same."""


PANELS = (
    Panel(
        title="logits",
        lines={"real_logit": "real", "fake_logit": "generated"},
        level=Level(value=0, name=""),
        reading="The discriminator's mean verdict, large for real. Healthy: real a little above generated, the gap"
        " steady. A gap that keeps growing is a discriminator that runs away; no gap, one that sees no difference.",
    ),
    Panel(
        title="accuracy",
        lines={"accuracy_real": "on real", "accuracy_fake": "on generated"},
        level=Level(value=0.5, name="chance"),
        range=(0, 1),
        reading="Share of verdicts that are right. Healthy: both between a half and about 0.9. Both at 1: the"
        " discriminator has won, and its gradient says little; one high and one low: it calls everything the same.",
    ),
    Panel(
        title="entropy of the token weights",
        lines={"token_entropy": ""},
        level=Level(value=1, name="uniform"),
        range=(0, 1.04),
        reading="Healthy: it starts at 1, where all tokens weigh the same, and falls slowly, if at all. Near 0 the"
        " discriminator looks at a single token, and the student need only please it there.",
    ),
    Panel(
        title="gradient at the sample",
        lines={"gradient/matching": "matching", "gradient/adversarial": "adversarial"},
        log=True,
        reading="What each term asks of a generated picture, weights included. Healthy: both level, the adversarial"
        " one below the matching one or near it. Collapsing: the adversarial one grows far above the other.",
    ),
    Panel(
        title="gradient norms of the players",
        lines={
            "gradient_norm/student": "student",
            "gradient_norm/fake_score": "fake score",
            "gradient_norm/discriminator": "discriminator",
        },
        log=True,
        reading="Before any clipping. Healthy: level or slowly falling. A rise by orders of magnitude is a training"
        " that breaks up; a discriminator's that dies away has won, or sees nothing.",
    ),
    Panel(
        title="probe FID",
        lines={"probe/fid": ""},
        log=True,
        lowest=True,
        reading="Of a small sample at fixed noises, against the training images or those of data.validation; lower is"
        " better, the best is ringed."
        " Healthy: it falls, then stays. Rising for good after the best: collapse, or a learning rate too high.",
    ),
    Panel(
        title="diversity within a class",
        lines={"probe/diversity": ""},
        level=Level(value=1, name="the data's"),
        reading="Spread of the probe's pictures of one class over that of the data's. Healthy: it comes to 1 and"
        " stays. Falling: the pictures of a class become alike; far above 1: noise or broken pictures.",
    ),
    Panel(
        title="lag of the fake score",
        lines={"probe/fake_score_lag": ""},
        level=Level(value=0, name="converged"),
        reading="The fake score's loss over a converged one's, minus 1. Healthy: near 0. Rising: it follows a"
        " generator of the past, so that the matching gradient points the wrong way.",
    ),
    Panel(
        title="weight of the adversarial term",
        lines={"adversarial_weight": ""},
        log=True,
        changing=True,
        reading="Where it is matched to the other term's gradient. Healthy: it settles. Rising or falling without end:"
        " one of the two gradients dies away, and the weight only covers that up.",
    ),
    Panel(
        title="rows left out as not finite",
        lines={"non_finite_rows": "matching", "non_finite_adversarial_rows": "adversarial"},
        changing=True,
        reading="Share of generated pictures whose gradient was infinite or not a number. Healthy: none. Any that stay"
        " are a precision too low or pictures that blow up.",
    ),
)


def panels(records: Records) -> list[Panel]:
    """The panels that there is data for; none for a stage without a discriminator and without probes."""
    if not any(len(curve(records, name)[0]) for name in (*_PROBES, *_VERDICTS)):
        return []
    return [panel for panel in PANELS if _worth_drawing(panel, records)]


def stability_chart(records: Records, *, theme: Theme = LIGHT) -> bytes:
    """A PNG of a stage's records {"step": ..., "real_logit": ..., ...}. ValueError where there is no panel."""
    drawn = panels(records)
    if not drawn:
        raise ValueError("no probe and no discriminator was logged; there is nothing to draw")
    rows = math.ceil(len(drawn) / _COLUMNS)
    steps = [record["step"] for record in records]
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(9, 0.3 + 1.75 * rows), layout="constrained")
        for place, panel in enumerate(drawn):
            axes = figure.add_subplot(rows, _COLUMNS, place + 1)
            axes.set_xlim(min(steps), max(min(steps) + 1, *steps))
            _draw_panel(axes, panel, records, theme)
        figure.supxlabel("iteration", fontsize=9, color=theme.muted)
        return to_png(figure)


def _worth_drawing(panel: Panel, records: Records) -> bool:
    drawn = [_values(panel, records, name)[1] for name in panel.lines]
    return any(len(values) and (not panel.changing or np.ptp(values) > 0) for values in drawn)


def _values(panel: Panel, records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one line, as far as its axis can show them."""
    steps, values = curve(records, name)
    shown = values > 0 if panel.log else np.ones(len(values), dtype=bool)
    return steps[shown], values[shown]


def _draw_panel(axes: Axes, panel: Panel, records: Records, theme: Theme) -> None:
    ends: list[tuple[str, str, float]] = []
    for place, (key, name) in enumerate(panel.lines.items()):
        steps, values = _values(panel, records, key)
        if len(steps):
            color = theme.students[place]
            ends.append((name, color, _draw_line(axes, steps, values, color, place)))
    if panel.level:
        axes.axhline(panel.level.value, color=theme.muted, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        ends.append((panel.level.name, theme.muted, panel.level.value))
    _set_axis(axes, panel)
    axes.set_title(_title(axes, panel, records, theme), loc="left", fontsize=9, color=theme.ink)
    _name_ends(axes, [end for end in ends if end[0]])


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, place: int) -> float:
    """A line of few values with a dot at each, of many as a running mean before the values; returns where it ends."""
    if len(steps) <= _SPARSE:
        axes.plot(steps, values, color=color, linestyle=_DASHES[place], linewidth=1.6, clip_on=False)
        axes.plot(steps, values, _MARKERS[place], color=color, markersize=3, clip_on=False)
        return float(values[-1])
    every, means = max(1, len(steps) // _POINTS), running_mean(values)
    axes.plot(steps[::every], values[::every], color=color, linewidth=0.6, alpha=0.35)
    axes.plot(steps[::every], means[::every], color=color, linestyle=_DASHES[place], linewidth=1.8)
    return float(means[-1])


def _set_axis(axes: Axes, panel: Panel) -> None:
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=8)
    axes.set_yscale("log" if panel.log else "linear")
    if panel.range:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, panel.range[0]), max(high, panel.range[1]))
    mark_values(axes)


def _title(axes: Axes, panel: Panel, records: Records, theme: Theme) -> str:
    """The panel's title; the lowest value is ringed and told in it, where that is asked for."""
    if not panel.lowest:
        return panel.title
    steps, values = _values(panel, records, next(iter(panel.lines)))
    best = int(values.argmin())
    axes.plot(steps[best], values[best], "o", markersize=9, fillstyle="none", color=theme.ink, clip_on=False)
    return f"{panel.title}: best {values[best]:.3g} at {steps[best]:.0f}"


def _name_ends(axes: Axes, ends: Sequence[tuple[str, str, float]]) -> None:
    """Writes (name, colour, value) at the right of the panel, at the height of the value or as near as is free."""
    axes.get_ylim()  # brings the transforms up to date with what was drawn
    ends = sorted(ends, key=lambda end: end[2])
    pixels = np.array([axes.transData.transform((0, value)) for *_, value in ends]).reshape(-1, 2)
    heights = names_apart(axes.transAxes.inverted().transform(pixels)[:, 1])
    for (name, color, _), height in zip(ends, heights, strict=True):
        axes.text(1.02, height, name, transform=axes.transAxes, color=color, fontsize=8, va="center")


def names_apart(heights: np.ndarray, gap: float = _NAMES_APART) -> np.ndarray:
    """Rising heights, those nearer to each other than a gap pushed apart evenly."""
    heights = heights.copy()
    for _ in range(100 * len(heights)):
        for low in range(len(heights) - 1):
            missing = max(0.0, gap - (heights[low + 1] - heights[low]))
            heights[low : low + 2] += -missing / 2, missing / 2
    return heights
