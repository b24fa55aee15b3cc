"""The page of a sweep, `sweep.html`, and the pictures on it."""

from pathlib import Path

from pipelines.artifacts import write_text
from pipelines.page import Picture, template, write_pictures
from pipelines.tuning import sweep_charts
from pipelines.tuning.sweep_report import SweepReport, values_text
from pipelines.tuning.work import Work


def render_sweep(report: SweepReport, work: Work, folder: Path) -> list[Path]:
    """Write the page and its pictures; returns the pictures' paths."""
    pictures = _pictures(report, work)
    write_pictures(pictures, folder)
    shown = {"report": report, "pictures": pictures, "values_text": values_text}
    write_text(folder / "sweep.html", template("sweep.html.j2").render(shown))
    return [folder / "figures" / f"{one.name}.png" for one in pictures]


def _pictures(report: SweepReport, work: Work) -> list[Picture]:
    """The charts that there is data for."""
    parameters = work.space.parameters
    drawn = [one for one in report.trials if one.score is not None and set(one.values) == set(parameters)]
    searched = (report.trials, report.metric, work.mode)
    found = []
    if report.finalists:
        found.append(Picture.drawn("finalists", "Finalists", sweep_charts.finalist_intervals, report.finalists))
    if work.pauses and any(one.kind == "search" and one.points for one in report.trials):
        found.append(Picture.drawn("population", "The population", sweep_charts.population_paths, *searched))
    elif drawn:
        found.append(Picture.drawn("history", "How the search went", sweep_charts.history, *searched))
    if report.importances:
        found.append(Picture.drawn("importances", "What matters", sweep_charts.importance_bars, report.importances))
    if len(drawn) > 1:
        draw, data = sweep_charts.parallel_coordinates, (drawn, parameters, report.metric)
        found.append(Picture.drawn("parallel_coordinates", "Which values did well", draw, *data))
    return found
