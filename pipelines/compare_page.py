"""The page of a comparison, `compare.html`, one file that can be sent on, and the pictures on it, `figures/*.png`."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from pipelines.artifacts import write_text
from pipelines.compare_charts import fid_against, points_of
from pipelines.compare_columns import LEGEND, marked_columns, measured
from pipelines.comparison import Compared, Comparison, Group
from pipelines.figures import comparison_sheet
from pipelines.page import Picture, template, write_pictures
from pipelines.report import Row
from pipelines.report_columns import digits
from pipelines.report_page import Samples, load_samples

_CHARTS = {
    "fid_against_nfe": ("FID against network calls", ("nfe",)),
    "fid_against_training": ("FID against seconds of training", ("train_seconds",)),
    "fid_against_cost": ("FID against cost", ("worker_seconds", "network_calls")),
}


def render(found: Comparison, folder: Path) -> None:
    """Write FOLDER/compare.html and FOLDER/figures; what has no data is left out, with a note on the page."""
    groups = [(group.shown(), _charts(group, place)) for place, group in enumerate(found.groups, 1)]
    sheets, notes = _sheets(found.runs)
    write_pictures([*(picture for _, drawn in groups for picture in drawn), *sheets], folder)
    page = template("compare.html.j2").render(
        title=" against ".join(run.name for run in found.runs) if len(found.runs) < 4 else f"{len(found.runs)} runs",
        found=found,
        groups=[(group, marked_columns(group), drawn) for group, drawn in groups],
        sheets=sheets,
        notes=[*found.notes, *notes],
        legend=LEGEND,
        measured=measured,
        costs=[(run.name, phase) for run in found.runs for phase in run.report.phases if phase.total_seconds],
    )
    write_text(folder / "compare.html", page)


def _charts(group: Group, place: int) -> list[Picture]:
    """The charts that a group has data for; those of later groups are numbered."""
    end = "" if place == 1 else f"_{place}"
    drawn = []
    for name, (title, keys) in _CHARTS.items():
        if any(points_of(group, key) for key in keys):
            drawn.append(Picture.drawn(name + end, title, fid_against, group, keys))
    return drawn


def _sheets(runs: Sequence[Compared]) -> tuple[list[Picture], list[str]]:
    """A sheet for each set of runs that share their noises, and a line about what has no pictures."""
    kept: list[tuple[Compared, Samples]] = []
    notes = [f"No pictures of {run.name}: only its report is known." for run in runs if run.folder is None]
    for run in (run for run in runs if run.folder):
        assert run.folder
        loaded, missing = load_samples(_pictured(run), run.folder / "evaluate")
        kept += [(run, samples) for samples in loaded]
        notes += [f"{run.name}: {line}" for line in missing]
    sets = [list(some) for _, some in groupby(sorted(kept, key=_noises), key=_noises)]
    if len(sets) > 1:
        notes.append("Not all runs have the same seed or classes, so not all pictures start from the same noises.")
    return [_sheet(some, place) for place, some in enumerate(sets, 1)], notes


def _pictured(run: Compared) -> list[Row]:
    """The students' rows, after the teacher's best."""
    rows = run.report.rows
    teacher = min((row for row in rows if row.generator == "teacher" and row.samples), key=_fid, default=None)
    return [*([teacher] if teacher else []), *(row for row in rows if row.generator != "teacher" and row.samples)]


def _fid(row: Row) -> float:
    return row.fid


def _noises(one: tuple[Compared, Samples]) -> tuple[str, tuple[int, ...], bytes]:
    """What two rows of pictures share that start from the same noises."""
    run, samples = one
    return str(run.report.recipe.get("seed", 0)), samples.images.shape[1:], samples.labels.tobytes()


def _sheet(kept: Sequence[tuple[Compared, Samples]], place: int) -> Picture:
    write = digits([samples.row.fid for _, samples in kept])
    entries = [(f"{run.name}: {one.row.label}", f"FID {write(one.row.fid)}", one.images) for run, one in kept]
    title = f"The same noises through {', '.join(dict.fromkeys(run.name for run, _ in kept))}"
    name = f"same_noises{'' if place == 1 else f'_{place}'}"
    return Picture.drawn(name, title, comparison_sheet, entries, kept[0][1].labels)
