"""The page of a sweep, `sweep.html`, and the pictures on it."""

from pathlib import Path

from pipelines.artifacts import write_text
from pipelines.figures import DARK, LIGHT
from pipelines.page import Picture, template, write_pictures
from pipelines.tuning import sweep_charts
from pipelines.tuning.sweep_report import SweepReport, values_text
from pipelines.tuning.work import METRICS, Work


def render_sweep(report: SweepReport, work: Work, folder: Path) -> list[Path]:
    """Write the page and its pictures; returns the pictures' paths."""
    pictures = _pictures(report, work)
    write_pictures(pictures, folder)
    page = template("sweep.html.j2").render(
        report=report, verdict=report.verdict(), pictures={one.name: one for one in pictures}, values_text=values_text
    )
    write_text(folder / "sweep.html", page)
    return [folder / "figures" / f"{one.name}.png" for one in pictures]


def _pictures(report: SweepReport, work: Work) -> list[Picture]:
    parameters, mode = work.space.parameters, METRICS[work.metric]
    drawn = [one for one in report.trials if one.score is not None and set(one.values) == set(parameters)]
    drawings = {
        "finalists": ("Finalists", bool(report.finalists), sweep_charts.finalist_intervals, (report.finalists,)),
        "history": ("How the search went", bool(drawn), sweep_charts.history, (report.trials, report.metric, mode)),
        "importances": ("What matters", bool(report.importances), sweep_charts.importance_bars, (report.importances,)),
        "parallel_coordinates": (
            "Which values did well",
            len(drawn) > 1,
            sweep_charts.parallel_coordinates,
            (drawn, parameters, report.metric),
        ),
    }
    return [
        Picture(name=name, title=title, light=draw(*data, theme=LIGHT), dark=draw(*data, theme=DARK))
        for name, (title, there, draw, data) in drawings.items()
        if there
    ]
