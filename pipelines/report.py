"""The report of a run: `report.json` for machines, `report.html` for people, `figures/*.png`, a table for the terminal.

`docs/report.md` is the schema of `report.json`. Everything but that file is made from it, from the samples in
`evaluate/` and from the stages' `metrics.jsonl` and `token_weights.npz`, so `rebuild` can make it again at any time.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.artifacts import write_text
from pipelines.report_columns import calls, columns, line_of
from pipelines.report_page import render, render_stages
from pipelines.tables import needed_width

SCHEMA_VERSION = 4
_READABLE_VERSIONS = (1, 2, 3, 4)
_REFERENCE_KEYS: dict[str, type] = {"real_fid": float, "halves_fid": float, "num_reference": int, "fid_features": str}
_SECOND_KEYS: dict[str, type] = {"second_real_fid": float, "second_halves_fid": float, "second_features": str}
"""Keys of the reference that are there only where there was a second feature net."""
_SOLVER_NAMES = {
    "euler": "Euler", "heun": "Heun", "dpm_solver_2": "DPM-Solver-2", "dpmpp_2m": "DPM-Solver++(2M)",
    "dpmpp_3m": "DPM-Solver++(3M)", "ipndm_2": "iPNDM (2)", "ipndm_3": "iPNDM (3)", "ipndm_4": "iPNDM",
    "flow_map": "flow map", "pipeline": "its pipeline", "pictures": "its pictures",
}  # fmt: skip
_GENERATOR_NAMES = {"hd": "HD", "sfd_v": "SFD-v", "sfd": "SFD"}
"""By how a label starts, the longer first."""


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
    images_per_second: float | None
    """Sampling speed on the machine of the run; None: not known, as of pictures that were given."""
    gflops_per_image: float | None
    """1e9 floating-point operations for one picture, all network calls together; None: not known."""
    train_seconds: float
    """Training of the whole chain of stages that made it; 0 for the teacher."""
    samples: str
    """Name of the npz file under RUN_DIR/evaluate that holds `images` uint8 (k, h, w, c) and `labels` (k,); the same
    noises and labels for every row. Empty: none were kept."""
    second_fid: float | None = None
    """FID under a second feature net; None where there was none."""
    second_features: str = ""
    """Name of that net; empty where there was none."""
    guidance_scale: float = 1.0
    """Guidance: of the teacher, or with which a student was sampled."""
    fid_infinity: float | None = None
    """FID in the limit of ever more samples; None where there are too few to tell."""
    kid: float | None = None
    """Kernel distance of the features, unbiased; about 0 for perfect samples, and then negative half the time."""
    density: float | None = None
    """Real balls around a picture, over the number of neighbours, on average."""
    coverage: float | None = None
    """Share of real balls with a picture inside, 0 to 1."""
    inception_score: float | None = None
    """From 1 to the number of the net's classes; None where the feature net knows none."""
    clip_score: float | None = None
    """100 times the cosine of picture and prompt under CLIP, cut at 0, on average; None where it was not asked for."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """By metric, low and high end of the 95% interval over draws of as many samples."""

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"nfe of {self.generator} is {self.nfe}; a picture takes at least one network call")

    @property
    def generator_name(self) -> str:
        """The generator as people write it."""
        known = next((start for start in _GENERATOR_NAMES if f"{self.generator}_".startswith(f"{start}_")), "")
        first = known or self.generator.partition("_")[0]
        name = _GENERATOR_NAMES.get(known, first[:1].upper() + first[1:])
        rest = self.generator[len(first) :].replace("_", " ").rstrip()
        return name + rest + (f", guided {self.guidance_scale:g}" if self.guided else "")

    @property
    def guided(self) -> bool:
        """Whether a student was sampled with guidance."""
        return bool(self.stage) and self.guidance_scale != 1

    @property
    def solver_name(self) -> str:
        """The solver as people write it."""
        return _SOLVER_NAMES.get(self.solver, self.solver)

    @property
    def line_name(self) -> str:
        """Generator, and solver where there is a choice: `Teacher, Euler`."""
        return self.generator_name if self.stage else f"{self.generator_name}, {self.solver_name}"

    @property
    def label(self) -> str:
        """The same with the number of calls: `Teacher, Euler, 8 calls`."""
        return f"{self.line_name}, {calls(self.nfe)}"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a run."""

    name: str
    """start, precompute, a stage's name, evaluate, ..."""
    wall_seconds: float
    """Seconds that this run spent in it."""
    reused: bool
    """Whether an earlier run had finished it and this one only found it."""
    total_seconds: float = 0.0
    """Seconds that it took in all lives of the run, in every process that worked on it; so are the fields below."""
    worker_seconds: float = 0.0
    """Seconds of its workers together: actors, training workers, or the one process."""
    idle_share: float = 0.0
    """Share of these that training workers waited for data, 0 to 1."""
    network_calls: int = 0
    """Passes of a network over one row; a backward pass counts as two forward ones."""
    bytes_written: int = 0
    """Bytes of the files that it left."""
    bytes_read: int = 0
    """Bytes of the shards that it read."""
    restarts: int = 0
    """Times that it began anew because a process, or one of a group of workers, had ended before it."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """An artifact, and what it was made from."""

    name: str
    """teacher, real images, trajectories, latents, prompts, or a stage."""
    made_from: list[str] = field(default_factory=list)
    """Names of others."""
    sha256: str
    """Of its contents: of weights, of pixels, of the hashes of a set's files."""
    detail: str
    """What it is, for people."""


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
    """`real_fid`: FID of the real training images against the held-out reference; `halves_fid`: of one half of that
    reference against the other; `num_reference`: images in the reference; `fid_features`: the feature net. Where there
    was a second net, `second_real_fid`, `second_halves_fid` and `second_features` say the same of it. `source`: what
    FID is against; `caution`: what to mind, where there is something; `features_sha256`, `feature_width`, `resize`,
    `data_sha256`: how it was measured; `clip`, `clip_sha256`: the CLIP model, where there is
    one."""
    environment: dict[str, Any]
    """Versions, processor count and the like."""
    created: str
    """ISO 8601 time with offset."""
    lineage: list[Origin] = field(default_factory=list)
    """What the results come from, each after what it was made from."""


# report.json


def write_report(report: Report, run_dir: Path) -> None:
    """Writes RUN_DIR/report.json, then RUN_DIR/figures and RUN_DIR/report.html, each file whole or not at all.

    Raises ValueError, with nothing written, when a number is NaN or infinite or a value has not the documented type.
    """
    content = to_json(report)
    write_text(run_dir / "report.json", content)
    render(report, run_dir)


def read_report(path: Path) -> Report:
    """The report in a report.json. ValueError names the file and what is wrong with it."""
    try:
        return parse_report(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a run writes it at its end; finish it with `hdistill run`") from None


def parse_report(text: bytes, source: str) -> Report:
    """The report in the bytes of a report.json. ValueError names the source and what is wrong with it."""
    try:
        return _parse(json.loads(text.decode()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def rebuild(run_dir: Path) -> Report:
    """Makes report.html and figures again from RUN_DIR/report.json, which stays as it is.

    ValueError without it; what the stages logged is drawn even so, since a stage that collapsed has no report.
    """
    path = run_dir / "report.json"
    if not path.exists() and (drawn := render_stages(run_dir)):
        raise ValueError(
            f"{path} does not exist: a run writes it at its end. From what its stages logged,"
            f" {', '.join(drawn)} were drawn in {run_dir / 'figures'}"
        )
    report = read_report(path)
    render(report, run_dir)
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
    if record["schema_version"] not in _READABLE_VERSIONS:
        known = ", ".join(map(str, _READABLE_VERSIONS))
        raise ValueError(f"schema_version is {record['schema_version']!r}; this hdistill reads {known}")
    values = _checked(record, Report, "")
    second = _SECOND_KEYS if "second_features" in values["reference"] else {}
    for key, kind in (_REFERENCE_KEYS | second).items():
        _check_value(values["reference"], key, kind, "reference.")
    rows = [Row(**_checked(row, Row, f"rows[{place}].")) for place, row in enumerate(values.pop("rows"))]
    phases = [Phase(**_checked(phase, Phase, f"phases[{place}].")) for place, phase in enumerate(values.pop("phases"))]
    origins = [
        Origin(**_checked(one, Origin, f"lineage[{place}].")) for place, one in enumerate(values.pop("lineage", []))
    ]
    return Report(**values, rows=rows, phases=phases, lineage=origins)


def _checked(record: Any, cls: type, where: str) -> dict[str, Any]:
    """The fields of `cls` in `record`, their types checked; other keys are left to later versions.

    A field with a default that is not there is one that a later version added, and has its default.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where.rstrip('.')} must be an object, not {type(record).__name__}")
    kinds = get_type_hints(cls)
    there = [one.name for one in fields(cls) if one.name in record or one.default is one.default_factory is MISSING]
    return {name: _check_value(record, name, kinds[name], where) for name in there}


def _check_value(record: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    if key not in record:
        raise ValueError(f"{where}{key} is missing")
    value, members = record[key], get_args(kind)
    if NoneType in members:
        if value is None:
            return None
        kind = members[0]
    kind = get_origin(kind) or kind
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}{key} must be {kind.__name__}, not {value!r:.60}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where}{key} is {value}; only finite numbers can be reported")
    return value


# The terminal.


def print_table(report: Report, console: Console, *, run_dir: Path | None = None) -> None:
    """Prints the rows, then what was reused and, given the run directory, where the report is.

    On a narrow terminal solvers take their short names and KID is left out, then quality and cost take a table each; no
    number is cut.
    """
    short = [column.name for column in columns(report.rows) if column.name != "kid"]
    for tables in ([_table(report, True)], [_table(report, False, short)], _split(report)):
        widths = [needed_width(table, console) for table in tables]
        if max(widths) <= console.width:
            break
    for table, width in zip(tables, widths, strict=True):
        table.width = width
        console.print(table, crop=False, no_wrap=True)
    reused = ", ".join(phase.name for phase in report.phases if phase.reused)
    seconds = sum(phase.wall_seconds for phase in report.phases)
    lines = [f"Took {seconds:,.0f} s. " + (f"Reused: {reused}." if reused else "Nothing was reused.")]
    lines += [f"Mind: {report.reference['caution']}."] if report.reference.get("caution") else []
    if run_dir is not None:
        lines += [f"Report    {run_dir / 'report.html'}", f"Pictures  {run_dir / 'figures'}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(report: Report, long_names: bool, only: Sequence[str] = ()) -> Table:
    """A rich table of the rows, a rule between generators; `only` keeps some columns."""
    kept = [column for column in columns(report.rows) if not only or column.name in only]
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("Generator", no_wrap=True)
    table.add_column("Solver", no_wrap=True)
    for column in kept:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for place, row in enumerate(report.rows):
        if place and line_of(row) != line_of(report.rows[place - 1]):
            table.add_section()
        cells = [Text(column.texts[place], "bold green" if column.is_best(place) else "") for column in kept]
        table.add_row(Text(row.generator_name), Text(row.solver_name if long_names else row.solver), *cells)
    return table


def _split(report: Report) -> list[Table]:
    quality, cost = (
        ("nfe", "fid", "fid_spread", "second_fid", "kid", "precision", "recall", "clip_score"),
        ("nfe", "images_per_second", "gflops_per_image", "train_seconds"),
    )
    return [_table(report, False, quality), _table(report, False, cost)]
