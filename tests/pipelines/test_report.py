"""The report: its schema, the page, the pictures and the table, on made-up runs."""

import dataclasses
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines import artifacts, charts, figures, report, report_columns, report_page
from pipelines.report import Origin, Phase, Report, Row, print_table, read_report, rebuild, write_report

DOCS = Path(__file__).parents[2] / "docs" / "report.md"
VOID_TAGS = {"meta", "img", "source", "br"}
FIDS = {
    ("teacher", "", "euler"): {1: 251.25, 8: 6.9, 32: 3.1},
    ("teacher", "", "dpmpp_3m"): {1: 251.25, 5: 7.1, 32: 3.05},
    ("sketch", "sketch", "flow_map"): {1: 14.2},
    ("hd", "refine", "flow_map"): {1: 3.21},
    ("sfd", "sfd", "flow_map"): {2: 9.3, 4: 4.2},
}
REFERENCE = {"real_fid": 2.4, "halves_fid": 4.4, "num_reference": 360, "fid_features": "digits"}
PROVENANCE = {"source": "held-out images", "features_sha256": "ab", "feature_width": 32, "resize": "none"} | {
    "data_sha256": "cd",
    "caution": "",
}
SECOND = {"second_real_fid": 0.31, "second_halves_fid": 0.52, "second_features": "denoise_8"}


def make_rows() -> list[Row]:
    return [
        Row(
            generator=generator, stage=stage, solver=solver, nfe=nfe, num_samples=5000, fid=fid, fid_features="digits",
            precision=0.9 - fid / 1000, recall=0.85 - fid / 500, images_per_second=12345.6 / nfe,
            gflops_per_image=0.0312 * nfe, train_seconds=97.5 if stage else 0.0,
            samples=f"{generator}_{solver}_{nfe}.npz",
        )
        for (generator, stage, solver), fids in FIDS.items()
        for nfe, fid in fids.items()
    ]  # fmt: skip


def make_report(**changes: object) -> Report:
    made = Report(
        recipe={"name": "digits", "seed": 0, "stages": {"sketch": {"betas": [0.9, 0.99]}, "refine": {}, "sfd": {}}},
        fingerprint="3f9c1e77ab20d4c1",
        rows=make_rows(),
        phases=[
            Phase(name="precompute", wall_seconds=0.4, reused=True),
            Phase(name="sketch", wall_seconds=41.2, reused=False),
        ],
        reference=dict(REFERENCE),
        environment={"python": "3.11.9", "packages": {"torch": "2.13.0"}},
        created="2026-01-05T12:00:00+00:00",
    )
    return dataclasses.replace(made, **changes)


def make_second_report() -> Report:
    """With a second feature net, under which the order is another."""
    rows = [dataclasses.replace(row, second_fid=100 / row.fid, second_features="denoise_8") for row in make_rows()]
    return make_report(rows=rows, reference=REFERENCE | SECOND | PROVENANCE)


def make_measured_report(**reference: object) -> Report:
    """With every metric and its interval."""
    intervals = {"fid": [-0.5, 0.7], "kid": [-0.01, 0.02], "recall": [0.8, 0.9]}
    metrics = {"kid": 0.005, "density": 0.93, "coverage": 0.88, "inception_score": 9.4, "clip_score": 31.0}
    rows = [
        dataclasses.replace(
            row,
            **metrics,  # pyright: ignore[reportArgumentType]
            fid_infinity=row.fid - 0.4,
            intervals={**intervals, "fid": [row.fid - 0.5, row.fid + 0.7]},
        )
        for row in make_rows()
    ]
    return make_report(rows=rows, reference=REFERENCE | PROVENANCE | reference)


def make_samples(side: int = 8, channels: int = 1, count: int = 100) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(side).integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return images, np.arange(count) % 10


def fill(run_dir: Path, made: Report, side: int = 8, channels: int = 1) -> Path:
    """A run directory with samples for every row and curves for every stage."""
    images, labels = make_samples(side, channels)
    (run_dir / "evaluate").mkdir(parents=True)
    for row in made.rows:
        np.savez(run_dir / "evaluate" / row.samples, images=images, labels=labels)
    for stage in made.recipe["stages"]:
        folder = run_dir / "stages" / stage
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss/a": 1 / (step + 1), "loss/b": -0.5}) for step in range(50)]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 50, "lo']))
    return run_dir


class Page(HTMLParser):
    """Every tag closed in order, every address of a picture, every text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read_page(run_dir: Path) -> Page:
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    page.text = " ".join(page.text.split())
    return page


def open_png(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    image.load()
    return image


# report.json


def test_round_trip(tmp_path: Path) -> None:
    made = make_report()
    write_report(made, tmp_path / "run")
    assert read_report(tmp_path / "run" / "report.json") == made


def test_where_results_come_from_stands_on_the_page(tmp_path: Path) -> None:
    teacher = Origin(name="teacher", sha256="ab" * 32, detail="a <b>path</b>")
    stage = Origin(name="sketch", made_from=["teacher", "trajectories"], sha256="cd" * 32, detail="9 iterations")
    write_report(make_report(lineage=[teacher, stage]), tmp_path)
    assert read_report(tmp_path / "report.json").lineage == [teacher, stage]
    text = read_page(tmp_path).text
    assert "Where it comes from" in text
    for told in ("a <b>path</b>", "abababababab", "teacher, trajectories", "9 iterations", "cdcdcdcdcdcd"):
        assert told in text
    record = json.loads((tmp_path / "report.json").read_text())
    del record["lineage"]
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert report.rebuild(tmp_path).lineage == [] and "Where it comes from" not in read_page(tmp_path).text


def test_json_has_exactly_the_documented_keys(tmp_path: Path) -> None:
    judged = {"clip": "someone/clip", "clip_sha256": "3c"}
    second = make_second_report()
    write_report(dataclasses.replace(second, reference=second.reference | judged), tmp_path)
    record = json.loads((tmp_path / "report.json").read_text())
    tables = [set(re.findall(r"^\| `(\w+)` \|", part, re.M)) for part in DOCS.read_text().split("\n| key |")[1:]]
    assert [set(record), set(record["rows"][0]), set(record["phases"][0]), set(record["reference"])] == tables
    assert record["schema_version"] == 4 == report.SCHEMA_VERSION
    assert record["rows"][0]["fid"] == 251.25 and record["rows"][0]["second_fid"] == 100 / 251.25


def test_documented_types_are_those_of_the_fields() -> None:
    names = {"string": str, "integer": int, "number": float, "boolean": bool, "number or null": float | None}
    names["object"] = dict[str, list[float]]
    documented = dict(re.findall(rf"^\| `(\w+)` \| ({'|'.join(names)}) \|", DOCS.read_text(), re.M))
    for field in (*dataclasses.fields(Row), *dataclasses.fields(Phase)):
        assert names[documented[field.name]] == field.type, field.name


def test_intervals_stand_in_the_table_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_measured_report(caution="too few samples")
    write_report(made, tmp_path)
    assert read_report(tmp_path / "report.json") == made
    names = [column.name for column in report_columns.columns(made.rows)]
    assert names[:5] == ["nfe", "fid", "fid_spread", "kid", "precision"]
    assert set(report_columns.columns(made.rows)[2].texts) == {"0.60"}
    print_table(made, Console(width=200))
    assert "Mind: too few samples." in capsys.readouterr().out
    text = read_page(tmp_path).text
    assert (
        "3.21 [2.71, 3.91]" in text and "0.005 [-0.01, 0.02]" in text and "FID∞" in text and "too few samples." in text
    )
    assert "published statistics" not in text


def test_published_statistics_are_named_on_the_page(tmp_path: Path) -> None:
    write_report(make_measured_report(source="cifar10/train/32"), tmp_path)
    assert "FID alone is against the published statistics cifar10/train/32" in read_page(tmp_path).text


def test_without_intervals_no_table_of_them_is_shown(tmp_path: Path) -> None:
    write_report(make_report(), tmp_path)
    assert "95%" not in read_page(tmp_path).text.replace("half the width of FID's 95% interval", "")


def test_a_report_of_version_1_is_read_as_one_without_a_second_net(tmp_path: Path) -> None:
    record = json.loads(report.to_json(make_report(schema_version=1)))
    for row in record["rows"]:
        del row["second_fid"], row["second_features"]
    (tmp_path / "report.json").write_text(json.dumps(record))
    read = rebuild(tmp_path)
    assert read == make_report(schema_version=1)
    assert read.rows[0].second_fid is None and read.rows[0].second_features == ""


def test_a_report_of_version_2_is_read_as_one_without_costs(tmp_path: Path) -> None:
    record = json.loads(report.to_json(make_report(schema_version=2)))
    record["phases"] = [{key: phase[key] for key in ("name", "wall_seconds", "reused")} for phase in record["phases"]]
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert rebuild(tmp_path) == make_report(schema_version=2)
    assert "What it cost" not in (tmp_path / "report.html").read_text()


def test_the_page_says_what_each_phase_cost(tmp_path: Path) -> None:
    cost = {"total_seconds": 61.5, "worker_seconds": 123.0, "idle_share": 0.25, "network_calls": 98304}
    cost |= {"bytes_written": 13_600_000, "bytes_read": 0, "restarts": 2}
    phases = [Phase(name="sketch", wall_seconds=41.2, reused=False, **cost)]
    write_report(make_report(phases=phases), tmp_path)
    page = (tmp_path / "report.html").read_text()
    shown = re.search(r"What it cost.*?</table>", page, re.DOTALL)
    assert shown
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", shown[0].partition("<tbody>")[2])
    assert cells == ["sketch", "61.5", "123.0", "25%", "98,304", "13.6", "0.0", "2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused_before_anything_is_written(tmp_path: Path, value: float) -> None:
    rows = make_rows()
    rows[2] = dataclasses.replace(rows[2], recall=value)
    with pytest.raises(ValueError, match=r"rows\[2\]\.recall is (nan|inf)"):
        write_report(make_report(rows=rows), tmp_path)
    with pytest.raises(ValueError, match="does not fit into JSON"):
        write_report(make_report(recipe={"learning_rate": value}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema_version"], 5, r"schema_version is 5; this hdistill reads 1, 2, 3, 4"),
        (["schema_version"], None, r"schema_version is missing"),
        (["fingerprint"], None, r"fingerprint is missing"),
        (["rows"], {}, r"rows must be list"),
        (["rows", 1], 3, r"rows\[1\] must be an object, not int"),
        (["rows", 1, "fid"], None, r"rows\[1\]\.fid is missing"),
        (["rows", 1, "fid"], "low", r"rows\[1\]\.fid must be float, not 'low'"),
        (["rows", 1, "fid"], float("nan"), r"rows\[1\]\.fid is nan"),
        (["rows", 1, "second_fid"], "low", r"rows\[1\]\.second_fid must be float, not 'low'"),
        (["rows", 1, "second_fid"], float("nan"), r"rows\[1\]\.second_fid is nan"),
        (["reference", "second_features"], "x", r"reference\.second_real_fid is missing"),
        (["rows", 1, "nfe"], 1.5, r"rows\[1\]\.nfe must be int"),
        (["rows", 1, "nfe"], True, r"rows\[1\]\.nfe must be int"),
        (["rows", 1, "nfe"], 0, r"nfe of teacher is 0"),
        (["phases", 0, "reused"], 1, r"phases\[0\]\.reused must be bool"),
        (["reference", "real_fid"], None, r"reference\.real_fid is missing"),
    ],
)
def test_wrong_content_is_named(tmp_path: Path, path: list, value: object, message: str) -> None:
    record = json.loads(report.to_json(make_report()))
    owner = record
    for key in path[:-1]:
        owner = owner[key]
    if value is None:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    file = tmp_path / "report.json"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as caught:
        read_report(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1', b"\xff\xfe", b"[]"])
def test_what_is_no_report_is_said_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"report\.json(: not a report| is not JSON)"):
        read_report(tmp_path / "report.json")


def test_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    record = json.loads(report.to_json(make_report()))
    record["new"] = record["rows"][0]["new"] = 1
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert read_report(tmp_path / "report.json") == make_report()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(make_report(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(make_report(fingerprint="other"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# report.html


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3)])
def test_page_is_whole_and_self_contained(tmp_path: Path, side: int, channels: int) -> None:
    made = make_report()
    write_report(made, fill(tmp_path, made, side, channels))
    page = read_page(tmp_path)
    assert page.open == []
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.tags["script"] == page.tags["link"] == 0
    assert page.tags["img"] == 1 + len(made.rows) + 3
    assert "http://" not in page.text and "https://" not in page.text
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    charts = {"same_noises.png", "fid_against_nfe.png", "training_curves.png", "seconds_by_phase.png"}
    assert names == charts | {f"samples_{Path(row.samples).stem}.png" for row in made.rows}


def test_page_says_in_words_what_was_lost(tmp_path: Path) -> None:
    write_report(make_report(), tmp_path)
    text = read_page(tmp_path).text
    assert "The teacher's best FID is 3.05, at 32 calls a picture (DPM-Solver++(3M))." in text
    assert "HD at 1 call : FID 3.21, 1.05 times the teacher's, with 32 times fewer calls" in text.replace(
        "call:", "call :"
    )
    assert "SFD at 4 calls" in text and "SFD at 2 calls" not in text
    assert "FID 2.40 against that reference" in text and "cannot be set beside FIDs in papers" in text
    assert "stages.sketch.betas" in text and "[0.9, 0.99]" in text and "packages.torch" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": []},
        {"rows": make_rows()[:3]},
        {"rows": make_rows()[-1:]},
        {"rows": [dataclasses.replace(row, fid=0.0, images_per_second=0.0) for row in make_rows()]},
        {"phases": [], "recipe": {}, "environment": {}},
    ],
    ids=["no rows", "no student", "no teacher", "zeros", "nothing else"],
)
def test_reports_with_little_in_them(tmp_path: Path, changes: dict[str, object]) -> None:
    write_report(make_report(**changes), tmp_path)
    assert read_page(tmp_path).open == []
    print_table(make_report(**changes), Console(file=io.StringIO(), width=100))


def test_what_a_user_wrote_is_escaped(tmp_path: Path) -> None:
    rows = [dataclasses.replace(make_rows()[0], generator="<b>[red]x")]
    write_report(make_report(recipe={"name": "<script>alert(1)</script>"}, rows=rows), tmp_path)
    page = read_page(tmp_path)
    assert page.tags["script"] == 0 and "<script>alert(1)</script>" in page.text
    output = io.StringIO()
    print_table(make_report(rows=rows), Console(file=output, width=100))
    assert "<b>[red]x" in output.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it does not exist"),
        (b"PK\x03\x04 cut off", "zip"),
        ({"images": np.zeros((3, 8, 8, 1), np.uint8)}, "labels"),
        ({"images": np.zeros((3, 8, 8, 1), np.float32), "labels": np.arange(3)}, "images must be uint8"),
        ({"images": np.zeros((3, 8, 8, 1), np.uint8), "labels": np.arange(4)}, "labels must be integers (3,)"),
        ({"images": np.array([object()]), "labels": np.arange(1)}, "allow_pickle=False"),
    ],
    ids=["missing", "truncated", "no labels", "float images", "other count", "pickle"],
)
def test_samples_that_cannot_be_read_are_noted(tmp_path: Path, content: object, reason: str) -> None:
    rows = make_rows()[-2:]
    path = fill(tmp_path, make_report(rows=rows)) / "evaluate" / "sfd_flow_map_2.npz"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    loaded, notes = report_page.load_samples(rows, tmp_path / "evaluate")
    assert [kept.row for kept in loaded] == rows[1:]
    assert len(notes) == 1 and reason in notes[0]
    assert notes[0].startswith("No pictures of SFD, 2 calls: cannot read evaluate/sfd_flow_map_2.npz (")


def test_a_page_without_some_pictures_says_so(tmp_path: Path) -> None:
    made = make_report()
    (fill(tmp_path, made) / "evaluate" / "sfd_flow_map_2.npz").unlink()
    write_report(made, tmp_path)
    page = read_page(tmp_path)
    assert "No pictures of SFD, 2 calls: cannot read evaluate/sfd_flow_map_2.npz (it does not exist)." in page.text
    assert page.tags["img"] == 1 + len(made.rows) - 1 + 3


def fill_stage(run_dir: Path, stage: str, tokens: int = 16, layers: int = 2) -> Path:
    """What a stage with a discriminator and probes leaves behind; returns the file of its token weights."""
    folder = run_dir / "stages" / stage
    folder.mkdir(parents=True, exist_ok=True)
    values = {"real_logit": 0.4, "fake_logit": -0.4, "gradient_norm/student": 2.0, "probe/diversity": 0.9}
    lines = [json.dumps({"step": step, "loss/a": 0.5, "probe/fid": 9.0 / step, **values}) for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    images, logits = np.zeros((3, 8, 8, 1), np.uint8), np.ones((3, layers), np.float32)
    weights = np.full((3, layers, 4, tokens), 1 / tokens, np.float32)
    arrays = {"images": images, "logits": logits, "weights": weights}
    np.savez_compressed(
        folder / "token_weights.npz", **{f"{kind}_{k}": v for kind in ("fake", "real") for k, v in arrays.items()}
    )
    return folder / "token_weights.npz"


def test_a_stage_with_a_discriminator_has_its_chart_and_its_sheet(tmp_path: Path) -> None:
    stages = {"sketch": {}, "refine": {"discriminator": {"layers": [1, 3]}}, "sfd": {}}
    made = make_report(recipe={"stages": stages}, rows=[])
    fill_stage(fill(tmp_path, made), "refine")
    write_report(made, tmp_path)
    page = read_page(tmp_path)
    assert page.open == [] and page.tags["img"] == 4, "the curves, the seconds, the chart and the sheet"
    assert page.tags["dt"] == page.tags["dd"] == 4, "a reading for each panel that is drawn"
    assert "logits The discriminator's mean verdict" in page.text and "lag of the fake score" not in page.text
    entropies = [f"block {block}: 1.000 on generated, 1.000 on real pictures" for block in (1, 3)]
    assert f"Entropy of the weights: {'; '.join(entropies)}." in page.text
    for name in ("stability-refine.png", "weights-refine.png"):
        open_png((tmp_path / "figures" / name).read_bytes())
    assert not (tmp_path / "figures" / "stability-sketch.png").exists()
    before = (tmp_path / "report.html").read_bytes(), (tmp_path / "figures" / "weights-refine.png").read_bytes()
    for picture in (tmp_path / "figures").iterdir():
        picture.unlink()
    rebuild(tmp_path)
    after = (tmp_path / "report.html").read_bytes(), (tmp_path / "figures" / "weights-refine.png").read_bytes()
    assert after == before


@pytest.mark.parametrize(
    "recipe",
    [{}, {"stages": ["refine"]}, {"stages": {"refine": 3}}, {"stages": {"refine": {"discriminator": {"layers": [5]}}}}],
)
def test_layers_are_counted_where_the_recipe_does_not_name_them(tmp_path: Path, recipe: dict[str, object]) -> None:
    fill_stage(tmp_path, "refine")
    (picture,), notes = report_page._weights(tmp_path, recipe)
    assert "layer 1: 1.000 on generated" in picture.caption and "layer 2" in picture.caption and notes == []


def test_runs_without_discriminator_and_probes_say_nothing_of_them(tmp_path: Path) -> None:
    made = make_report(rows=make_rows()[-1:])
    write_report(made, fill(tmp_path, made))
    text = read_page(tmp_path).text
    assert "Training curves" in text and "Signs of a collapse" not in text and "discriminator looks" not in text


@pytest.mark.parametrize("damage", ["cut off", "text", "no array"])
def test_token_weights_that_cannot_be_read_are_noted(tmp_path: Path, damage: str) -> None:
    path = fill_stage(tmp_path, "refine")
    if damage == "no array":
        np.savez(path, fake_images=np.zeros((3, 8, 8, 1), np.uint8))
    else:
        path.write_bytes(path.read_bytes()[:300] if damage == "cut off" else b"no archive")
    write_report(make_report(rows=[]), tmp_path)
    text = read_page(tmp_path).text
    assert "No token weights of refine: cannot read stages/refine/token_weights.npz (" in text
    assert "Signs of a collapse" in text and "discriminator looks" not in text
    assert {path.name for path in (tmp_path / "figures").glob("*refine*")} == {"stability-refine.png"}


def test_tokens_without_a_square_grid_are_left_out(tmp_path: Path) -> None:
    fill_stage(tmp_path, "refine", tokens=15)
    write_report(make_report(rows=[]), tmp_path)
    assert "oken weights of refine" not in read_page(tmp_path).text
    assert not (tmp_path / "figures" / "weights-refine.png").exists()


def test_a_run_that_was_stopped_has_the_pictures_of_its_stages(tmp_path: Path) -> None:
    fill_stage(tmp_path, "sketch").unlink()
    fill_stage(tmp_path, "refine")
    (tmp_path / "recipe.json").write_text(json.dumps(make_report().recipe))
    names = ["stability-sketch.png", "stability-refine.png", "weights-refine.png"]
    with pytest.raises(ValueError, match=rf"report\.json does not exist.*{', '.join(names)} were drawn in .*figures"):
        rebuild(tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == set(names)
    assert not (tmp_path / "report.html").exists()


def test_samples_outside_the_run_directory_are_not_read(tmp_path: Path) -> None:
    rows = [dataclasses.replace(make_rows()[0], samples="../../secret.npz")]
    write_report(make_report(rows=rows), tmp_path)
    assert "not a plain file name" in read_page(tmp_path).text


def test_rebuild_makes_the_same_page_and_leaves_the_json(tmp_path: Path) -> None:
    made = make_report()
    write_report(made, fill(tmp_path, made))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("report.*")}
    (tmp_path / "report.html").unlink()
    assert rebuild(tmp_path) == made
    assert {path.name: path.read_bytes() for path in tmp_path.glob("report.*")} == before


def test_rebuild_without_a_report_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.json does not exist.*hdistill run"):
        rebuild(tmp_path)
    assert list(tmp_path.iterdir()) == []


# figures/*.png


def test_digits_are_enlarged_to_sharp_squares_in_a_column_per_class() -> None:
    images, labels = make_samples()
    grid = np.asarray(open_png(figures.sample_grid(images, labels)))
    cells = grid[26:, :, :3]
    assert grid.shape == (26 + 8 * 51 - 3, 10 * 51 - 3, 4)
    for row, column in [(0, 0), (3, 7), (7, 9)]:
        cell = cells[row * 51 : row * 51 + 48, column * 51 : column * 51 + 48, 0]
        np.testing.assert_array_equal(cell[::6, ::6], images[10 * row + column, :, :, 0])
        np.testing.assert_array_equal(cell, np.kron(cell[::6, ::6], np.ones((6, 6), np.uint8)))
    assert (grid[26:, 48:51, 3] == 0).all(), "gaps are transparent"


@pytest.mark.parametrize(("side", "channels", "cell"), [(8, 3, 48), (32, 3, 64), (64, 1, 64), (256, 3, 96)])
def test_grids_of_other_sizes(side: int, channels: int, cell: int) -> None:
    images, _ = make_samples(side, channels, count=12)
    assert open_png(figures.sample_grid(images, np.zeros(12, np.int64))).size == (
        10 * (cell + 3) - 3,
        2 * (cell + 3) - 3,
    )


def test_sheet_has_the_same_noise_in_each_column() -> None:
    images, labels = make_samples()
    entries = [("Teacher", "FID 3.1", images), ("HD", "FID 3.2", 255 - images)]
    sheet = np.asarray(open_png(figures.comparison_sheet(entries, labels)).convert("L"), dtype=int)
    first, second = sheet[26 : 26 + 48], sheet[26 + 54 : 26 + 54 + 48]
    inverted = (first + second == 255).all(axis=0)
    assert inverted.sum() == 16 * 48


def test_picks_cover_the_classes_in_turn() -> None:
    labels = np.array([3, 3, 3, 3, 1, 1, 2])
    assert labels[figures.spread_over_classes(labels, 3)].tolist() == [1, 2, 3]
    assert figures.spread_over_classes(labels, 5).tolist() == [4, 5, 6, 0, 1]
    assert sorted(figures.spread_over_classes(labels, 99).tolist()) == list(range(7))


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (5, 8, 8), (5, 8, 8, 4)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be uint8"):
        figures.sample_grid(np.zeros(shape, np.uint8), np.zeros(shape[0], np.int64))


def test_generators_with_other_labels_stay_out_of_the_sheet(tmp_path: Path) -> None:
    made = make_report(rows=[row for row in make_rows() if row.nfe == 1][1:])
    images, labels = make_samples()
    np.savez(fill(tmp_path, made) / "evaluate" / made.rows[-1].samples, images=images, labels=labels[::-1])
    write_report(made, tmp_path)
    assert Image.open(tmp_path / "figures" / "same_noises.png").height == 26 + (len(made.rows) - 1) * 54


def test_charts_leave_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams.copy())
    for theme in (figures.LIGHT, figures.DARK):
        open_png(charts.fid_against_nfe(make_rows(), real_fid=2.4, theme=theme))
        open_png(charts.training_curves({"a": [{"step": 1, "loss/x": 0.5}]}, theme=theme))
        open_png(charts.seconds_by_phase(make_report().phases, theme=theme))
    after = dict(matplotlib.rcParams.copy())
    assert {key for key in before if key != "backend" and after[key] != before[key]} == set()


def test_charts_without_data_are_refused() -> None:
    for draw, nothing in (
        (charts.fid_against_nfe, []),
        (charts.training_curves, {"a": [{"step": 1, "learning_rate": 1e-3}]}),
        (charts.seconds_by_phase, []),
    ):
        with pytest.raises(ValueError, match="no "):
            draw(nothing)


def test_a_resumed_curve_keeps_the_later_of_two_values() -> None:
    records = [{"step": 1, "loss/a": 5.0}, {"step": 2, "loss/a": 6.0}, {"step": 2, "loss/a": 7.0}]
    steps, values = charts.curve([*records, {"step": 3, "loss/a": float("nan")}, {"step": 4}], "loss/a")
    assert steps.tolist() == [1, 2] and values.tolist() == [5, 7]


def test_curves_follow_the_order_of_the_recipe_and_pass_over_broken_lines(tmp_path: Path) -> None:
    fill(tmp_path, make_report())
    (tmp_path / "stages" / "left_over").mkdir()
    (tmp_path / "stages" / "left_over" / "metrics.jsonl").write_text('{"step": 1, "loss/a": 1}\n')
    curves = report_page._load_curves(tmp_path, ["sketch", "refine", "sfd"])
    assert list(curves) == ["sketch", "refine", "sfd"]
    assert [len(records) for records in curves.values()] == [50, 50, 50]


def test_names_on_the_chart_do_not_cover_each_other() -> None:
    figure = charts.Figure(figsize=(9, 4.6))
    axes = figure.add_subplot(xscale="log", yscale="log", xlim=(0.8, 40), ylim=(1, 300))
    lines = [(f"generator {place}", "black", np.array([[1.0, 3 + 0.1 * place]])) for place in range(4)]
    charts._place_labels(figure, axes, lines)
    placed = [text.get_window_extent() for text in axes.texts]
    assert len(placed) == 4
    for place, box in enumerate(placed):
        assert box.count_overlaps(placed[:place]) == 0
        assert axes.get_window_extent().padded(5).containsx(box.x0)


# The terminal.


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20])
def test_no_number_is_cut_at_any_width(tmp_path: Path, width: int) -> None:
    output = io.StringIO()
    print_table(make_report(), Console(file=output, width=width), run_dir=tmp_path / ("deep" * 20))
    lines = output.getvalue().splitlines()
    for row, fid in zip(make_rows(), ["251.25", "6.90", "3.10", "251.25", "7.10", "3.05", "14.20"], strict=False):
        assert any(row.generator_name in line and fid in line and f" {row.nfe} " in line for line in lines), (row, fid)
    assert any("12,346" in line and "0.0312" in line for line in lines)
    assert "..." not in output.getvalue() and "\u2026" not in output.getvalue()
    assert f"Report    {tmp_path / ('deep' * 20) / 'report.html'}" in lines
    assert any("Reused: precompute." in line for line in lines)
    assert sum("FID" in line for line in lines) == 1


def test_a_second_fid_is_shown_where_there_is_one(tmp_path: Path) -> None:
    """In the terminal and on the page, with the net's name, its own best and the real images' value; else nowhere."""
    made = make_second_report()
    column = report_columns.columns(made.rows)[2]
    assert (column.name, column.heading) == ("second_fid", "FID\n(denoise_8)")
    assert [place for place in range(10) if column.is_best(place)] == [0, 3] and column.texts[5] == "32.787"
    assert report_columns.columns(make_rows())[2].name == "precision"
    for width in (200, 40):
        output = io.StringIO()
        print_table(made, Console(file=output, width=width))
        assert "(denoise_8)" in output.getvalue() and "32.787" in output.getvalue()
    write_report(made, tmp_path / "second")
    text = read_page(tmp_path / "second").text
    assert "FID (denoise_8)" in text and "32.787" in text and "training images have FID 0.310" in text
    write_report(make_report(), tmp_path / "one")
    assert "second net" not in read_page(tmp_path / "one").text


def test_a_row_without_the_second_fid_has_a_dash() -> None:
    rows = make_second_report().rows
    rows[0] = dataclasses.replace(rows[0], second_fid=None, second_features="")
    column = report_columns.columns(rows)[2]
    assert column.texts[0] == "-" and [place for place in range(10) if column.is_best(place)] == [3]


def test_names_as_people_write_them() -> None:
    names = {
        "teacher": "Teacher",
        "hd": "HD",
        "sfd": "SFD",
        "sfd_one_step": "SFD one step",
        "sfd_v": "SFD-v",
        "sfd_value": "SFD value",
        "my_run": "My run",
        "": "",
    }
    for generator, name in names.items():
        assert dataclasses.replace(make_rows()[0], generator=generator).generator_name == name
    assert [make_rows()[place].label for place in (0, 5, 7)] == [
        "Teacher, Euler, 1 call", "Teacher, DPM-Solver++(3M), 32 calls", "HD, 1 call"
    ]  # fmt: skip


def test_eighty_columns_hold_one_table() -> None:
    output = io.StringIO()
    print_table(make_report(), Console(file=output, width=80))
    assert sum("Generator" in line for line in output.getvalue().splitlines()) == 1
    assert max(map(len, output.getvalue().splitlines())) <= 80


def test_the_best_of_a_column_is_marked_unless_all_are_equal() -> None:
    columns = {column.name: column for column in report_columns.columns(make_rows())}
    best = {name: [place for place in range(10) if column.is_best(place)] for name, column in columns.items()}
    assert best["fid"] == [5] and best["nfe"] == best["train_seconds"] == []
    assert best["gflops_per_image"] == best["images_per_second"] == [0, 3, 6, 7]
    same = [dataclasses.replace(row, precision=0.5) for row in make_rows()]
    assert not any(report_columns.columns(same)[2].is_best(place) for place in range(10))
