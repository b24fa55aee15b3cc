"""What the tracking store is told of a finished run: the same names for the same things in every run and stage."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.report import Report, Row
from pipelines.report_columns import MEASURES, with_interval

_OTHERS = ("nfe", "train_seconds", "images_per_second", "gflops_per_image")


def summary_of(row: Row, prefix: str = "") -> dict[str, float]:
    """A generator's metrics by their plain names, `fid_low` and `fid_high` with them where there are intervals."""
    found = {key: getattr(row, key) for key in (*MEASURES.values(), *_OTHERS)}
    ends = {f"{key}_low": low for key, (low, _) in row.intervals.items()}
    ends |= {f"{key}_high": high for key, (_, high) in row.intervals.items()}
    return {f"{prefix}{key}": float(value) for key, value in (found | ends).items() if value is not None}


def best_student(rows: Iterable[Row]) -> Row | None:
    """The recipe's student of the lowest FID, sampled without guidance; None where there is none."""
    students = [row for row in rows if row.stage and not row.guided]
    return min(students, key=lambda row: row.fid, default=None)


def measured_by(report: Report) -> dict[str, Any]:
    """Tags that say how a run was measured: runs of the same tags can be compared."""
    reference, rows = report.reference, report.rows
    return {
        "features": reference["fid_features"],
        "features_sha256": reference.get("features_sha256", ""),
        "reference": reference.get("source", ""),
        "num_reference": reference["num_reference"],
        "num_samples": rows[0].num_samples if rows else 0,
        "data": reference.get("data_sha256", ""),
    }


def best_tags(row: Row) -> dict[str, str]:
    """Tags that say whose the metrics `best/...` are."""
    return {"best": row.label, "best.stage": row.stage}


def description(rows: Sequence[Row]) -> Mapping[str, str]:
    """The text of the run's own page: a table of the students, the best first."""
    students = sorted((row for row in rows if row.stage), key=lambda row: row.fid)
    lines = [
        f"| {row.label} | {row.stage} | {with_interval(row, 'fid')} | {row.precision:.3f} | {row.recall:.3f} |"
        for row in students
    ]
    head = ["| generator | stage | FID | precision | recall |", "|---|---|---|---|---|"]
    return {"mlflow.note.content": "\n".join(head + lines)} if students else {}
