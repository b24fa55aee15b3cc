"""The page of a run, `report.html`, and the pictures on it, `figures/*.png`."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines import charts, figures, stage_charts
from pipelines.artifacts import read_json, write_text
from pipelines.page import Picture, template, write_pictures
from pipelines.report_columns import columns, digits, line_of, measures
from pipelines.storage import local_copy
from pipelines.weight_sheet import Looks, read_looks, weight_sheet

if TYPE_CHECKING:
    from pipelines.report import Report, Row


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The kept pictures of one row."""

    row: "Row"
    """Whose they are."""
    images: figures.Images
    """uint8 (k, h, w, c)."""
    labels: figures.Labels
    """Class indices (k,), or the numbers of prompts."""
    prompts: tuple[str, ...] = ()
    """The prompt of each picture, where it was made from text."""


def render(report: "Report", run_dir: Path) -> None:
    """Writes the figures and the page; what has no data is left out, with a note on the page."""
    samples, notes = load_samples(report.rows, run_dir / "evaluate")
    sheets, grids = _sheet(samples), [_grid(kept) for kept in samples]
    curves = _load_curves(run_dir, list(report.recipe.get("stages") or ()))
    drawn, stability = _charts(report, curves), _stability(curves)
    weights, unread = _weights(run_dir, report.recipe)
    write_pictures([*sheets, *grids, *drawn.values(), *stability, *weights], run_dir)
    notes += unread
    context = {
        "stability": stability,
        "readings": _readings(curves),
        "weights": weights,
        "title": report.recipe.get("name") or run_dir.resolve().name,
        "report": report,
        "columns": columns(report.rows),
        "measures": measures(report.rows),
        "groups": [list(group) for _, group in groupby(enumerate(report.rows), key=lambda item: line_of(item[1]))],
    }
    page = template("report.html.j2").render(
        context, sheets=sheets, grids=grids, charts=drawn, notes=notes, **_headlines(report.rows)
    )
    write_text(run_dir / "report.html", page)


def render_stages(run_dir: Path) -> list[str]:
    """Writes the figures of the stages alone, as for a run that was stopped before its report; their file names."""
    recipe = read_json(run_dir / "recipe.json") or {}
    pictures = [*_stability(_load_curves(run_dir, list(recipe.get("stages") or ()))), *_weights(run_dir, recipe)[0]]
    write_pictures(pictures, run_dir)
    return [f"{picture.name}.png" for picture in pictures]


def _headlines(rows: Sequence["Row"]) -> dict[str, Any]:
    """The teacher's best row, each student's best row, and the teacher's best at each number of calls."""
    teacher = [row for row in rows if row.generator == "teacher"]
    students = [min(group, key=_fid) for group in _by(rows, lambda row: row.generator if row.stage else "").values()]
    equals = {nfe: min(group, key=_fid) for nfe, group in _by(teacher, lambda row: row.nfe).items()}
    return {
        "teacher": min(teacher, key=_fid, default=None),
        "students": [s for s in students if s.stage],
        "equals": equals,
    }


def load_samples(rows: Sequence["Row"], folder: Path) -> tuple[list[Samples], list[str]]:
    """The samples that can be read, and a line about each that cannot."""
    loaded, notes = [], []
    for row in (row for row in rows if row.samples):
        try:
            loaded.append(_load(row, folder))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
            notes.append(f"No pictures of {row.label}: cannot read evaluate/{row.samples} ({reason}).")
    return loaded, notes


def _load(row: "Row", folder: Path) -> Samples:
    if Path(row.samples).name != row.samples:
        raise ValueError("not a plain file name")
    with local_copy(folder / row.samples) as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
        prompts = tuple(map(str, arrays["prompts"])) if "prompts" in arrays.files else ()
    figures.check_samples(images, labels)
    return Samples(row=row, images=images, labels=labels, prompts=prompts)


def _load_curves(run_dir: Path, stages: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Records of each stage's metrics.jsonl, in the recipe's order."""
    return {stage: _records(path) for stage, path in _stage_files(run_dir, "metrics.jsonl", stages).items()}


def _stage_files(run_dir: Path, name: str, stages: Sequence[str]) -> dict[str, Path]:
    """RUN_DIR/STAGE/name or RUN_DIR/*/STAGE/name by stage, in the recipe's order."""
    paths = [*run_dir.glob(f"*/{name}"), *run_dir.glob(f"*/*/{name}")]
    found = {path.parent.name: path for path in sorted(paths) if not stages or path.parent.name in stages}
    return {stage: found[stage] for stage in stages if stage in found} or found


def _records(path: Path) -> list[dict[str, float]]:
    """The numbers of each line; a line that is not whole, as a killed run leaves its last, is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append({key: value for key, value in record.items() if isinstance(value, int | float)})
    return records


def _sheet(samples: Sequence[Samples]) -> list[Picture]:
    """The same noises through every generator; rows with other labels than the first's stay out."""
    same = [kept for kept in samples if np.array_equal(kept.labels, samples[0].labels)]
    if len(same) < 2:
        return []
    write = digits([kept.row.fid for kept in same])
    entries = [(kept.row.label, f"FID {write(kept.row.fid)}", kept.images) for kept in same]
    title, draw = "The same noises through every generator", figures.comparison_sheet
    return [Picture.drawn("same_noises", title, draw, entries, same[0].labels, caption=_prompts(same[0]))]


def _prompts(samples: Samples) -> str:
    """What the numbers above the sheet's columns stand for; empty where they are classes."""
    picks = figures.spread_over_classes(samples.labels, figures.SHEET_COLUMNS) if samples.prompts else []
    return "; ".join(f"{samples.labels[pick]}: {samples.prompts[pick]}" for pick in picks)


def _grid(samples: Samples) -> Picture:
    row = samples.row
    name = f"samples_{Path(row.samples).stem}"
    caption = f"FID {digits([row.fid], 0)(row.fid)}, precision {row.precision:.2f}, recall {row.recall:.2f}"
    return Picture(
        name=name, title=row.label, caption=caption, light=figures.sample_grid(samples.images, samples.labels)
    )


def _charts(report: "Report", curves: Mapping[str, Any]) -> dict[str, Picture]:
    """The charts that there is data for, by name."""
    against_nfe, found = partial(charts.fid_against_nfe, real_fid=report.reference["real_fid"]), []
    if report.rows:
        found.append(Picture.drawn("fid_against_nfe", "FID against network calls", against_nfe, report.rows))
    if charts.has_losses(curves):
        found.append(Picture.drawn("training_curves", "Training curves", charts.training_curves, curves))
    if report.phases:
        found.append(Picture.drawn("seconds_by_phase", "Seconds by phase", charts.seconds_by_phase, report.phases))
    return {picture.name: picture for picture in found}


def _stability(curves: Mapping[str, stage_charts.Records]) -> list[Picture]:
    """A chart for each stage that has a discriminator or probes."""
    return [
        Picture.drawn(f"stability-{stage}", stage, stage_charts.stability_chart, records)
        for stage, records in curves.items()
        if stage_charts.panels(records)
    ]


def _readings(curves: Mapping[str, stage_charts.Records]) -> list[stage_charts.Panel]:
    """Each panel that some stage has, once."""
    there = {panel.title for records in curves.values() for panel in stage_charts.panels(records)}
    return [panel for panel in stage_charts.PANELS if panel.title in there]


def _weights(run_dir: Path, recipe: Mapping[str, Any]) -> tuple[list[Picture], list[str]]:
    """A sheet for each stage whose discriminator's tokens fill a square, and a line about each that cannot be read."""
    pictures, notes = [], []
    for stage, path in _stage_files(run_dir, "token_weights.npz", list(recipe.get("stages") or ())).items():
        try:
            looks = read_looks(path)
        except ValueError as error:
            notes.append(f"No token weights of {stage}: cannot read {path.relative_to(run_dir)} ({error}).")
        else:
            pictures += [_weight_picture(stage, looks, _tapped(recipe, stage))] if looks.grid_side else []
    return pictures, notes


def _weight_picture(stage: str, looks: Looks, tapped: Sequence[object]) -> Picture:
    count = looks.fake.weights.shape[1]
    names = [f"block {block}" for block in tapped] if len(tapped) == count else []
    names = names or [f"layer {place + 1}" for place in range(count)]
    entropies = [
        f"{name}: {fake:.3f} on generated, {real:.3f} on real pictures"
        for name, fake, real in zip(names, looks.fake.entropy, looks.real.entropy, strict=True)
    ]
    caption = f"Entropy of the weights: {'; '.join(entropies)}."
    return Picture.drawn(f"weights-{stage}", stage, weight_sheet, looks, names, caption=caption)


def _tapped(recipe: Mapping[str, Any], stage: str) -> Sequence[object]:
    """The teacher's blocks that a stage's discriminator looks through; empty where the recipe does not say."""
    value: Any = recipe
    for name in ("stages", stage, "discriminator", "layers"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, list | tuple) else ()


def _by(rows: Sequence["Row"], key: Callable[["Row"], Any]) -> dict[Any, list["Row"]]:
    """The rows in groups, in order of appearance."""
    return {value: [row for row in rows if key(row) == value] for value in dict.fromkeys(map(key, rows))}


def _fid(row: "Row") -> float:
    return row.fid
