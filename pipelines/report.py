"""The report of a run: `report.json` for machines, `report.html` for people, `figures/*.png`, a table for the terminal.

`docs/report.md` is the schema of `report.json`. Everything but that file is made from it, from the samples in
`evaluate/` and from the stages' `metrics.jsonl`, so `rebuild` can make it again at any time.
"""

import base64
import importlib.resources
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import jinja2
import numpy as np
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines import figures

SCHEMA_VERSION = 1
_REFERENCE_KEYS: dict[str, type] = {"real_fid": float, "halves_fid": float, "num_reference": int, "fid_features": str}
_SOLVER_NAMES = {
    "euler": "Euler", "heun": "Heun", "dpm_solver_2": "DPM-Solver-2", "dpmpp_2m": "DPM-Solver++(2M)",
    "dpmpp_3m": "DPM-Solver++(3M)", "ipndm": "iPNDM", "flow_map": "flow map",
}  # fmt: skip
_GENERATOR_NAMES = {"hd": "HD", "sfd": "SFD"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One generator at one number of network calls."""

    generator: str
    """Label: teacher, sketch, hd, sfd, or another label that a stage of the recipe gives itself."""
    stage: str
    """The recipe's stage that made it; empty for the teacher."""
    solver: str
    """Solver of the teacher's flow (euler, dpmpp_3m, ...); flow_map for a student."""
    nfe: int
    """Network calls a picture."""
    num_samples: int
    """Pictures that the metrics are measured on."""
    fid: float
    """Frechet distance between the features of these pictures and of the reference."""
    fid_features: str
    """Name of the feature net: digits, inception, ..."""
    precision: float
    """Share of the pictures that lie among the reference, 0 to 1."""
    recall: float
    """Share of the reference that lies among the pictures, 0 to 1."""
    images_per_second: float
    """Sampling speed on the machine of the run."""
    gflops_per_image: float
    """1e9 floating-point operations for one picture, all network calls together."""
    train_seconds: float
    """Training of the whole chain of stages that made it; 0 for the teacher."""
    samples: str
    """Name of the npz file under RUN_DIR/evaluate that holds `images` uint8 (k, h, w, c) and `labels` (k,); the same
    noises and labels for every row. Empty: none were kept."""

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"nfe of {self.generator} is {self.nfe}; a picture takes at least one network call")

    @property
    def generator_name(self) -> str:
        """The generator as people write it."""
        first, _, rest = self.generator.partition("_")
        name = _GENERATOR_NAMES.get(first, first[:1].upper() + first[1:])
        return f"{name} {rest.replace('_', ' ')}".rstrip()

    @property
    def solver_name(self) -> str:
        """The solver as people write it."""
        return _SOLVER_NAMES.get(self.solver, self.solver)

    @property
    def label(self) -> str:
        """Generator, solver where there is a choice, and calls: `Teacher, Euler, 8 calls`."""
        names = [self.generator_name] if self.stage else [self.generator_name, self.solver_name]
        return ", ".join([*names, _calls(self.nfe)])


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a run."""

    name: str
    """start, precompute, a stage's name, evaluate, ..."""
    wall_seconds: float
    """Seconds that this run spent in it."""
    reused: bool
    """Whether an earlier run had finished it and this one only found it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did and what was lost."""

    schema_version: int = SCHEMA_VERSION
    """Version of the layout of report.json."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    fingerprint: str
    """Fingerprint of the recipe."""
    rows: list[Row]
    """One for each generator and number of calls, in the order of the table."""
    phases: list[Phase]
    """Where the seconds went, in order."""
    reference: dict[str, Any]
    """`real_fid`: FID of the real training images against the held-out reference; `halves_fid`: of one half of the real
    images against the other; `num_reference`: images in the reference; `fid_features`: the feature net."""
    environment: dict[str, Any]
    """Versions, processor count and the like."""
    created: str
    """ISO 8601 time with offset."""


# report.json


def write_report(report: Report, run_dir: Path) -> None:
    """Writes RUN_DIR/report.json, then RUN_DIR/figures and RUN_DIR/report.html, each file whole or not at all.

    Raises ValueError, with nothing written, when a number is NaN or infinite or a value has not the documented type.
    """
    content = to_json(report)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_atomic(run_dir / "report.json", content.encode())
    _render(report, run_dir)


def read_report(path: Path) -> Report:
    """The report in a report.json. ValueError names the file and what is wrong with it."""
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a run writes it at its end; finish it with `hdistill run`") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def rebuild(run_dir: Path) -> Report:
    """Makes report.html and figures again from RUN_DIR/report.json, which stays as it is. ValueError without it."""
    report = read_report(run_dir / "report.json")
    _render(report, run_dir)
    return report


def to_json(report: Report) -> str:
    """The text of report.json. ValueError names the field when it would not be a valid one."""
    record = asdict(report)
    _parse(record)
    try:
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"report: recipe, reference or environment does not fit into JSON: {error}") from None


def _parse(record: Any) -> Report:
    if not isinstance(record, dict) or "schema_version" not in record:
        raise ValueError("not a report: schema_version is missing")
    if record["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {record['schema_version']!r}; this hdistill reads {SCHEMA_VERSION}")
    values = _checked(record, Report, "")
    for key, kind in _REFERENCE_KEYS.items():
        _check_value(values["reference"], key, kind, "reference.")
    rows = [Row(**_checked(row, Row, f"rows[{place}].")) for place, row in enumerate(values.pop("rows"))]
    phases = [Phase(**_checked(phase, Phase, f"phases[{place}].")) for place, phase in enumerate(values.pop("phases"))]
    return Report(**values, rows=rows, phases=phases)


def _checked(record: Any, cls: type, where: str) -> dict[str, Any]:
    """The fields of `cls` in `record`, their types checked; other keys are left to later versions."""
    if not isinstance(record, dict):
        raise ValueError(f"{where.rstrip('.')} must be an object, not {type(record).__name__}")
    kinds = get_type_hints(cls)
    return {field.name: _check_value(record, field.name, kinds[field.name], where) for field in fields(cls)}


def _check_value(record: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    if key not in record:
        raise ValueError(f"{where}{key} is missing")
    value, kind = record[key], get_origin(kind) or kind
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}{key} must be {kind.__name__}, not {value!r:.60}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where}{key} is {value}; only finite numbers can be reported")
    return value


def _write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# The terminal.


def print_table(report: Report, console: Console, *, run_dir: Path | None = None) -> None:
    """Prints the rows, then what was reused and, given the run directory, where the report is.

    On a narrow terminal solvers take their short names, then quality and cost take a table each; no number is cut.
    """
    wide = console.options.update(max_width=10_000)
    for tables in ([_table(report, True)], [_table(report, False)], _split(report)):
        widths = [table.__rich_measure__(console, wide).maximum for table in tables]
        if max(widths) <= console.width:
            break
    for table, width in zip(tables, widths, strict=True):
        table.width = width
        console.print(table, crop=False, no_wrap=True)
    reused = ", ".join(phase.name for phase in report.phases if phase.reused)
    seconds = sum(phase.wall_seconds for phase in report.phases)
    lines = [f"Took {seconds:,.0f} s. " + (f"Reused: {reused}." if reused else "Nothing was reused.")]
    if run_dir is not None:
        lines += [f"Report    {run_dir / 'report.html'}", f"Pictures  {run_dir / 'figures'}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(report: Report, long_names: bool, columns: Sequence[str] = ()) -> Table:
    """A rich table of the rows, a rule between generators; `columns` keeps only those."""
    kept = [column for column in _columns(report.rows) if not columns or column.name in columns]
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("Generator", no_wrap=True)
    table.add_column("Solver", no_wrap=True)
    for column in kept:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for place, row in enumerate(report.rows):
        if place and _group(row) != _group(report.rows[place - 1]):
            table.add_section()
        cells = [Text(column.texts[place], "bold green" if column.is_best(place) else "") for column in kept]
        table.add_row(Text(row.generator_name), Text(row.solver_name if long_names else row.solver), *cells)
    return table


def _split(report: Report) -> list[Table]:
    quality, cost = (
        ("nfe", "fid", "precision", "recall"),
        ("nfe", "images_per_second", "gflops_per_image", "train_seconds"),
    )
    return [_table(report, False, quality), _table(report, False, cost)]


def _group(row: Row) -> tuple[str, str]:
    return row.generator, row.solver


@dataclass(frozen=True, kw_only=True)
class _Column:
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


def _columns(rows: Sequence[Row]) -> list[_Column]:
    def column(name: str, heading: str, write: Callable[[float], str], best: Callable[..., Any] | None) -> _Column:
        values = [getattr(row, name) for row in rows]
        best_text = write(best(values)) if best and len(set(map(write, values))) > 1 else ""
        return _Column(name=name, heading=heading, texts=[write(value) for value in values], best=best_text)

    return [
        column("nfe", "Calls\n(NFE)", str, None),
        column("fid", "FID", _digits([row.fid for row in rows]), min),
        column("precision", "Precision", "{:.3f}".format, max),
        column("recall", "Recall", "{:.3f}".format, max),
        column("images_per_second", "Images\n/s", _digits([row.images_per_second for row in rows], 0), max),
        column("gflops_per_image", "GFLOPs\n/image", _digits([row.gflops_per_image for row in rows]), min),
        column("train_seconds", "Train\ns", lambda value: f"{value:,.0f}" if value else "-", None),
    ]


def _digits(values: Sequence[float], least: int = 1, most: int = 4) -> Callable[[float], str]:
    """A writer with as many decimals as give the smallest positive value three digits."""
    smallest = min((value for value in values if value > 0), default=1.0)
    decimals = min(max(2 - math.floor(math.log10(smallest)), least), most)
    return lambda value: f"{value:,.{decimals}f}"


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


# report.html and figures/*.png


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A figure of the page, PNG bytes for a light and a dark page."""

    name: str
    """File name under figures, without its ending."""
    title: str
    """What it shows; also the text for who cannot see it."""
    caption: str = ""
    """A sentence below the title."""
    light: bytes
    """What is written to figures."""
    dark: bytes = b""
    """Empty: the light one suits both."""


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """The kept pictures of one row."""

    row: Row
    """Whose they are."""
    images: figures.Images
    """uint8 (k, h, w, c)."""
    labels: figures.Labels
    """Class indices (k,)."""


def _render(report: Report, run_dir: Path) -> None:
    """Writes the figures and the page; what has no data is left out, with a note on the page."""
    samples, notes = _load_samples(report.rows, run_dir / "evaluate")
    sheets, grids = _sheet(samples), [_grid(kept) for kept in samples]
    charts = _charts(report, _load_curves(run_dir, list(report.recipe.get("stages") or ())))
    (run_dir / "figures").mkdir(exist_ok=True)
    for picture in [*sheets, *grids, *charts.values()]:
        _write_atomic(run_dir / "figures" / f"{picture.name}.png", picture.light)
    context = {
        "title": report.recipe.get("name") or run_dir.resolve().name,
        "report": report,
        "columns": _columns(report.rows),
    }
    context["groups"] = [list(group) for _, group in groupby(enumerate(report.rows), key=lambda item: _group(item[1]))]
    page = _template().render(
        context, sheets=sheets, grids=grids, charts=charts, notes=notes, **_headlines(report.rows)
    )
    _write_atomic(run_dir / "report.html", page.encode())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(base64=lambda png: base64.b64encode(png).decode(), flat=_flat, calls=_calls)
    environment.filters.update(times=lambda ratio: f"{ratio:.3g} times" if ratio < 100 else f"{ratio:,.0f} times")
    environment.filters.update(digits=lambda value: _digits([value], 0)(value))
    return environment.from_string(importlib.resources.files("pipelines").joinpath("report.html.j2").read_text("utf-8"))


def _headlines(rows: Sequence[Row]) -> dict[str, Any]:
    """The teacher's best row, each student's best row, and the teacher's best at each number of calls."""
    teacher = [row for row in rows if not row.stage]
    students = [min(group, key=_fid) for group in _by(rows, lambda row: row.generator if row.stage else "").values()]
    equals = {calls: min(group, key=_fid) for calls, group in _by(teacher, lambda row: row.nfe).items()}
    return {
        "teacher": min(teacher, key=_fid, default=None),
        "students": [s for s in students if s.stage],
        "equals": equals,
    }


def _load_samples(rows: Sequence[Row], folder: Path) -> tuple[list[_Samples], list[str]]:
    """The samples that can be read, and a line about each that cannot."""
    loaded, notes = [], []
    for row in (row for row in rows if row.samples):
        try:
            loaded.append(_load(row, folder))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
            notes.append(f"No pictures of {row.label}: cannot read evaluate/{row.samples} ({reason}).")
    return loaded, notes


def _load(row: Row, folder: Path) -> _Samples:
    if Path(row.samples).name != row.samples:
        raise ValueError("not a plain file name")
    with np.load(folder / row.samples, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    figures.check_samples(images, labels)
    return _Samples(row=row, images=images, labels=labels)


def _load_curves(run_dir: Path, stages: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Records of RUN_DIR/STAGE/metrics.jsonl or RUN_DIR/*/STAGE/metrics.jsonl by stage, in the recipe's order."""
    paths = [*run_dir.glob("*/metrics.jsonl"), *run_dir.glob("*/*/metrics.jsonl")]
    found = {path.parent.name: path for path in sorted(paths) if not stages or path.parent.name in stages}
    order = [stage for stage in stages if stage in found] or list(found)
    return {stage: _records(found[stage]) for stage in order}


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


def _sheet(samples: Sequence[_Samples]) -> list[_Picture]:
    """The same noises through every generator; rows with other labels than the first's stay out."""
    same = [kept for kept in samples if np.array_equal(kept.labels, samples[0].labels)]
    if len(same) < 2:
        return []
    write = _digits([kept.row.fid for kept in same])
    entries = [(kept.row.label, f"FID {write(kept.row.fid)}", kept.images) for kept in same]
    light, dark = (figures.comparison_sheet(entries, same[0].labels, theme=t) for t in (figures.LIGHT, figures.DARK))
    return [_Picture(name="same_noises", title="The same noises through every generator", light=light, dark=dark)]


def _grid(samples: _Samples) -> _Picture:
    row = samples.row
    name = f"samples_{Path(row.samples).stem}"
    caption = f"FID {_digits([row.fid], 0)(row.fid)}, precision {row.precision:.2f}, recall {row.recall:.2f}"
    return _Picture(
        name=name, title=row.label, caption=caption, light=figures.sample_grid(samples.images, samples.labels)
    )


def _charts(report: Report, curves: Mapping[str, Any]) -> dict[str, _Picture]:
    """The charts that there is data for, by name."""
    real_fid = report.reference["real_fid"]
    drawings = {
        "fid_against_nfe": (
            "FID against network calls",
            lambda t: figures.fid_against_nfe(report.rows, real_fid=real_fid, theme=t),
        ),
        "training_curves": ("Training curves", lambda t: figures.training_curves(curves, theme=t)),
        "seconds_by_phase": ("Seconds by phase", lambda t: figures.seconds_by_phase(report.phases, theme=t)),
    }  # fmt: skip
    there = {
        "fid_against_nfe": report.rows,
        "training_curves": figures.has_losses(curves),
        "seconds_by_phase": report.phases,
    }
    return {
        name: _Picture(name=name, title=title, light=draw(figures.LIGHT), dark=draw(figures.DARK))
        for name, (title, draw) in drawings.items()
        if there[name]
    }


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as JSON) of everything in nested mappings."""
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _by(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows in groups, in order of appearance."""
    return {value: [row for row in rows if key(row) == value] for value in dict.fromkeys(map(key, rows))}


def _fid(row: Row) -> float:
    return row.fid
