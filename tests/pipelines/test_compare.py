"""Runs side by side: what is grouped, who leads and who is not told apart, what differs, the page and the query."""

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.artifacts import differing
from pipelines.compare import Compared, compare, compare_runs, read_runs
from pipelines.compare_charts import fid_against
from pipelines.compare_columns import marked_columns, print_comparison
from pipelines.comparison import Comparison, Entry, leaders
from pipelines.report import Phase, Report, Row, write_report
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import hdistill
from tests.pipelines.tiny import tiny_recipe as recipe_of

REFERENCE = {
    "real_fid": 2.4, "halves_fid": 4.4, "num_reference": 360, "fid_features": "digits", "source": "held-out images",
    "features_sha256": "ab", "feature_width": 32, "resize": "none", "data_sha256": "cd", "caution": "",
}  # fmt: skip


def row(stage: str, nfe: int, fid: float, half: float = 0.2, **changes: object) -> Row:
    made = Row(
        generator=stage or "teacher", stage=stage, solver="flow_map" if stage else "euler", nfe=nfe, num_samples=5000,
        fid=fid, fid_features="digits", precision=0.9, recall=0.8, images_per_second=100.0, gflops_per_image=0.1,
        train_seconds=10.0 if stage else 0.0, samples="", kid=0.01,
        intervals={"fid": [fid - half, fid + half]} if half else {},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def report(rows: list[Row], recipe: dict | None = None, **changes: object) -> Report:
    made = Report(
        recipe=recipe or {"name": "made", "seed": 0, "stages": {}},
        fingerprint="f",
        rows=rows,
        phases=[],
        reference=dict(REFERENCE),
        environment={"cpus": 2},
        created="2026-01-05T12:00:00+00:00",
    )
    return dataclasses.replace(made, **changes)


def compared(*reports: Report) -> Comparison:
    return compare([Compared(name=f"run-{i}", source="", report=one) for i, one in enumerate(reports)])


def printed(found: Comparison, width: int = 300) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_comparison(found, console)
    return console.export_text()


# Who leads


def test_the_lowest_fid_leads_at_each_number_of_calls() -> None:
    found = compared(report([row("hd", 1, 3.0), row("sfd", 2, 2.9)]), report([row("hd", 1, 4.0), row("sfd", 2, 2.0)]))
    (group,) = found.groups
    assert [(place.nfe, place.first.run, place.tied) for place in group.places()] == [
        (1, "run-0", []),
        (2, "run-1", []),
    ]
    fid = next(column for column in marked_columns(group) if column.name == "fid")
    assert fid.marks == {0: "best", 2: "best"}


def test_overlapping_intervals_are_no_win() -> None:
    found = compared(report([row("hd", 1, 3.0)]), report([row("hd", 1, 3.3)]), report([row("hd", 1, 3.5)]))
    (place,) = found.groups[0].places()
    assert place.first.run == "run-0" and [entry.run for entry in place.tied] == ["run-1"]
    assert "not told apart from Hd of run-1 (3.3 [3.1, 3.5])" in place.text.replace("HD", "Hd")
    assert "≈3.00" in printed(found) and "≈3.50" not in printed(found)


def test_more_is_better_where_it_is() -> None:
    entries = [Entry(runs=("a",), row=row("hd", 1, 3, recall=0.5)), Entry(runs=("b",), row=row("hd", 1, 3, recall=0.9))]
    assert leaders(entries, "recall") == [1]
    assert leaders(entries, "train_seconds") == [0, 1]  # the same
    assert leaders(entries[:1], "fid") == []


def test_the_teacher_takes_no_prize_for_not_being_trained() -> None:
    found = compared(report([row("", 1, 50.0), row("hd", 1, 3.0)]), report([row("", 1, 50.0), row("hd", 1, 4.0)]))
    columns = {column.name: column for column in marked_columns(found.groups[0])}
    teacher = next(place for place, entry in enumerate(found.groups[0].entries) if not entry.row.stage)
    assert teacher not in columns["train_seconds"].marks
    assert found.groups[0].entries[teacher].runs == ("run-0", "run-1")  # measured twice to the same number


# What may be compared


@pytest.mark.parametrize(
    ("reference", "changes", "said"),
    [
        ({"features_sha256": "ef"}, {}, "weights of the feature net (ab, ef)"),
        ({"data_sha256": "ef"}, {}, "real images (cd, ef)"),
        ({"source": "cifar10"}, {}, "reference (held-out images, cifar10)"),
        ({}, {"num_samples": 1000}, "number of samples (5000, 1000)"),
        ({}, {"fid_features": "inception"}, "feature net (digits, inception)"),
    ],
)
def test_what_was_measured_otherwise_is_never_ranked_together(reference: dict, changes: dict, said: str) -> None:
    other = report([row("hd", 1, 1.0, **changes)], reference=REFERENCE | reference)
    found = compared(report([row("hd", 1, 3.0)]), other)
    assert [group.runs for group in found.groups] == [["run-0"], ["run-1"]]
    assert not any(group.places() for group in found.groups)
    assert f"Not all of these numbers can be compared: the {said} differ." in found.notes[0]


def test_an_old_report_joins_by_the_fid_of_its_real_images() -> None:
    old = {key: REFERENCE[key] for key in ("real_fid", "halves_fid", "num_reference", "fid_features")}
    here = report([row("hd", 1, 3.0)])
    assert len(compared(here, report([row("hd", 1, 4.0, half=0)], reference=old)).groups) == 1
    assert len(compared(here, report([row("hd", 1, 4.0, half=0)], reference=old | {"real_fid": 2.5})).groups) == 2
    assert "no intervals" in " ".join(compared(here, report([row("hd", 1, 4.0, half=0)], reference=old)).notes)


def test_speed_is_not_ranked_across_machines_nor_kid_across_pairs() -> None:
    evaluate = [{"evaluate": {"pairs": pairs, "neighbours": 5}, "stages": {}} for pairs in (100, 200)]
    rows = [row("hd", 1, 3.0, kid=0.1), row("hd", 1, 5.0, kid=0.2, images_per_second=9.0)]
    one, other = report(rows[:1], evaluate[0]), report(rows[1:], evaluate[1], environment={"cpus": 64})
    (group,) = compared(one, other).groups
    marks = {column.name: column.marks for column in marked_columns(group)}
    assert marks["fid"] and not marks["kid"] and not marks["images_per_second"] and not marks["train_seconds"]


def test_one_run_is_not_enough(finished: Finished) -> None:
    again = finished.run_dir / ".." / finished.run_dir.name
    result = hdistill("compare", finished.run_dir, again)
    assert result.exit_code == 2 and "at least two different runs" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_directory_without_a_report_is_named(finished: Finished, tmp_path: Path) -> None:
    result = hdistill("compare", finished.run_dir, tmp_path)
    assert result.exit_code == 2 and f"{tmp_path}/report.json does not exist" in result.stderr


# What differs, and what it cost


def test_differences_are_those_that_may_change_a_result(tmp_path: Path) -> None:
    one, other = recipe_of(tmp_path), recipe_of(tmp_path, "seed=4", "evaluate.batch_size=50")
    found = compared(report([row("hd", 1, 3.0)], one.to_dict()), report([row("hd", 1, 4.0)], other.to_dict()))
    assert found.differences == {"seed": ["3", "4"]}
    assert found.other_differences == ["evaluate.batch_size"]


def test_a_stage_that_one_run_lacks_is_one_line(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path).to_dict()
    fewer = {**recipe, "stages": {name: stage for name, stage in recipe["stages"].items() if name != "sfd_4"}}
    found = compared(report([row("hd", 1, 3.0)], recipe), report([row("hd", 1, 4.0)], fewer))
    assert found.differences == {"stages.sfd_4": ["trained", "not set"]}


def test_a_field_that_an_older_version_did_not_have_has_its_default(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path).to_dict()
    older = {**recipe, "evaluate": {key: value for key, value in recipe["evaluate"].items() if key != "neighbours"}}
    assert compared(report([row("hd", 1, 3.0)], recipe), report([row("hd", 1, 4.0)], older)).differences == {}


def test_differing_has_a_text_for_each() -> None:
    assert differing([{"a": 1, "b": {"c": 2}}, {"a": 1}, {"b": {"c": 3}}]) == {
        "a": ["1", "1", "not set"],
        "b.c": ["2", "not set", "3"],
    }


def test_the_cost_is_that_of_the_phases_that_led_to_a_generator(tmp_path: Path) -> None:
    names = ("start", "precompute", "sketch", "refine", "sfd_2", "evaluate")
    phases = [
        Phase(name=name, wall_seconds=1, reused=False, total_seconds=1, worker_seconds=10.0**i, network_calls=10**i)
        for i, name in enumerate(names)
    ]
    made = report([row("refine", 1, 3.0), row("", 1, 50.0)], recipe_of(tmp_path).to_dict(), phases=phases)
    refine, teacher = compared(made, report([row("hd", 1, 4.0)])).groups[0].entries[0::2]
    assert refine.worker_seconds == refine.network_calls == 10 + 100 + 1000
    assert teacher.worker_seconds is None


# Files


def run_dirs(tmp_path: Path, finished: Finished) -> list[Path]:
    """The tiny run, and one that differs in one field and was measured a little better."""
    (known,) = read_runs([finished.run_dir])
    folder = tmp_path / "other"
    better = [dataclasses.replace(one, fid=one.fid * 0.5, intervals={}) for one in known.report.rows]
    recipe = {**known.report.recipe, "seed": 4}
    write_report(dataclasses.replace(known.report, rows=better, recipe=recipe, created="2027"), folder)
    return [finished.run_dir, folder]


def test_the_command_writes_a_page_of_one_file_with_figures(finished: Finished, tmp_path: Path) -> None:
    result = hdistill("compare", *run_dirs(tmp_path, finished), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "seed" in result.output and "compare.html" in result.output
    page = (tmp_path / "out" / "compare.html").read_text()
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', page) and "<script" not in page
    assert page.count("<tbody>") == page.count("</tbody>") and page.count("<ul>") == page.count("</ul>")
    assert "other: Sketch, 1 call: cannot read" not in page and "No pictures of" in page
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert names == {"fid_against_nfe.png", "fid_against_training.png", "fid_against_cost.png", "same_noises.png"}
    for path in (tmp_path / "out" / "figures").iterdir():
        with Image.open(path) as picture:
            assert picture.width > 500 and len(np.unique(np.asarray(picture.convert("L")))) > 8


def test_the_record_has_every_row(finished: Finished, tmp_path: Path) -> None:
    folders = run_dirs(tmp_path, finished)
    hdistill("compare", *folders, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    (group,) = record["groups"]
    assert [run["source"] for run in record["runs"]] == list(map(str, folders))
    assert len(group["rows"]) == 14 and {place["first"]["runs"][0] for place in group["best"]} == {"other"}
    assert record["differences"] == {"seed": ["3", "4"]}
    assert all(one["network_calls"] for one in group["rows"] if one["stage"])


def test_names_are_told_apart(finished: Finished, copied: Finished) -> None:
    assert [run.name for run in read_runs([finished.run_dir, copied.run_dir])] == [
        str(finished.run_dir),
        str(copied.run_dir),
    ]


def test_a_narrow_terminal_gets_two_tables_and_no_cut_number() -> None:
    found = compared(report([row("hd", 1, 3.0)]), report([row("hd", 1, 4.0)]))
    text = printed(found, width=70)
    assert text.count("Generator") == 2 and "3.00" in text and "…" not in text


def test_a_figure_needs_something_to_draw() -> None:
    found = compared(report([row("", 1, 3.0)]), report([row("", 1, 4.0)]))
    with pytest.raises(ValueError, match="nothing to draw"):
        fid_against(found.groups[0], ["train_seconds"])


# From the tracking store


def test_a_query_finds_runs_by_themselves_and_by_their_stages(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (other,) = run_dirs(tmp_path, finished)[1:]
    store, console = finished.run_dir.parent / "mlflow.db", Console(quiet=True)
    for query in ("tags.recipe = 'tiny'", "tags.stage = 'refine'"):
        compare_runs([other], query, store, tmp_path / "out", console)
        record = json.loads((tmp_path / "out" / "compare.json").read_text())
        assert [run["name"] for run in record["runs"]] == ["other", "tiny"]
        assert record["runs"][1]["source"].startswith("run ")


@pytest.mark.parametrize(
    ("query", "said"),
    [("tags.recipe = 'none'", "finds no run with a report"), ("recipe is tiny", "--query 'recipe is tiny'")],
)
def test_a_query_that_finds_nothing_says_so(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, query: str, said: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = hdistill("compare", "--query", query, "--store", finished.run_dir.parent / "mlflow.db")
    assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_query_without_a_store_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = hdistill("compare", "--query", "tags.recipe = 'tiny'", "--store", tmp_path / "none.db")
    assert result.exit_code == 2 and "nothing is recorded in" in result.stderr
    assert not (tmp_path / "none.db").exists()
