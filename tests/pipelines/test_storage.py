"""Local paths and object stores: the same bytes by the same calls, whole objects, and a whole run at a URL."""

import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3fs import S3FileSystem

from pipelines import curve as curves
from pipelines import storage
from pipelines.artifacts import RunDir, atomic_path, file_hash, read_json, write_arrays, write_json
from pipelines.curve import Curve
from pipelines.recording import default_store
from pipelines.shards import ShardSet, ShardSetSpec, read_shard, write_shard
from pipelines.storage import failure, is_remote, local_copy, local_stand_in, located, remove_tree
from tests.pipelines import tiny
from tests.pipelines.conftest import Finished
from tests.pipelines.faulty_store import Fault, faulty

HERE = ("--set", "precompute.num_actors=0")


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest) -> Path:
    """A folder that may be made, on the disk and in a store."""
    if request.param == "local":
        return request.getfixturevalue("tmp_path") / "place"
    return located(request.getfixturevalue("url"))


def objects(url: str, endpoint: str | None = None) -> dict[str, int]:
    """Bytes of each object below a URL, by its name there."""
    store = S3FileSystem(skip_instance_cache=True, use_listings_cache=False, endpoint_url=endpoint)
    found: Any = store.find(url, detail=True)
    start = len(url.removeprefix("s3://")) + 1
    return {name[start:]: about["size"] for name, about in found.items()}


# Where things are


def test_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert located("runs/digits") == Path("runs/digits")
    assert located("~/runs") == Path("/home/somebody/runs")
    assert located("~nobody-of-that-name/runs") == Path("~nobody-of-that-name/runs")
    assert located(f"file://{tmp_path}") == tmp_path
    assert located(tmp_path) is tmp_path
    assert isinstance(located("runs/digits"), Path) and not is_remote(located("runs/digits"))


def test_a_url_is_an_object_that_travels_to_other_processes():
    path = located("s3://bucket/runs/digits/")
    assert is_remote(path) and str(path / "report.json") == "s3://bucket/runs/digits/report.json"
    again: Any = pickle.loads(pickle.dumps(path / "stages"))
    assert str(again) == "s3://bucket/runs/digits/stages"
    assert again.storage_options["use_listings_cache"] is False
    assert str(located(str(path.resolve()))) == "s3://bucket/runs/digits"
    assert located(path) is path


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAKEY:hush-hush@bucket/runs",
        "s3://AKIAKEY:hush/hush@bucket/runs",
        "s3://bucket/runs?aws_secret_access_key=hush-hush",
        "ftp://me:hush@host/runs",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(text: str):
    with pytest.raises(ValueError, match=r"holds credentials.*by the environment") as raised:
        located(text)
    assert "hush" not in str(raised.value)


def test_an_address_in_a_key_is_no_credential():
    assert str(located("s3://bucket/of/me@example.org")) == "s3://bucket/of/me@example.org"


@pytest.mark.parametrize("text", ["s3://", "s3://bucket/../other", "s3://bucket//runs", "s3://bucket/./runs"])
def test_a_url_of_no_place_is_refused(text: str):
    with pytest.raises(ValueError, match="names no place in a store: give PROTOCOL://BUCKET/FOLDER"):
        located(text)


def test_a_url_of_no_known_kind_is_refused():
    with pytest.raises(ValueError, match=r"^s4://bucket/runs is of no known kind: give a local path, s3://"):
        located("s4://bucket/runs")


@pytest.mark.parametrize(("text", "extra"), [("s3://bucket/runs", "s3"), ("gs://bucket/runs", "gs")])
def test_a_package_that_is_not_there_is_named_with_its_extra(text: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    def absent(_: str) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    with pytest.raises(ValueError, match=rf"needs a package that is not installed: pip install 'hdistill\[{extra}\]'"):
        located(text)


def test_what_a_store_cannot_hold_lies_in_runs():
    assert local_stand_in(Path("runs/x")) == Path("runs/x")
    one, other = (local_stand_in(located(f"s3://bucket/{name}")) for name in ("a/b", "a-b"))
    assert one.parent == Path("runs") and one.name.startswith("s3-bucket-a-b-") and one != other
    assert default_store(RunDir(located("s3://bucket/a/b"))) == Path("runs/mlflow.db").resolve()


# The same calls on both


def test_files_are_written_whole_and_read_again(place: Path):
    write_json(place / "deep" / "a.json", {"a": [1, 2.5]})
    write_arrays(place / "a.npz", x=np.arange(3))
    assert read_json(place / "deep" / "a.json") == {"a": [1, 2.5]}
    assert read_json(place / "none.json") is None
    with local_copy(place / "a.npz") as file, np.load(file, allow_pickle=False) as arrays:
        assert arrays["x"].tolist() == [0, 1, 2] and file.name == "a.npz"
        assert file_hash(place / "a.npz") == file_hash(file)
    assert {path.name for path in place.glob("*/*.json")} == {"a.json"}


def test_an_error_leaves_what_was_there(place: Path):
    write_json(place / "a.json", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(place / "a.json") as temporary:
        assert not is_remote(temporary)
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(place / "a.json") == "old"
    assert [path.name for path in place.iterdir()] == ["a.json"]


def test_a_copy_is_local_and_gone_at_the_end(place: Path):
    write_json(place / "in" / "a.json", 1)
    write_json(place / "in" / "deeper" / "b.json", 2)
    with local_copy(place / "in") as folder:
        assert {str(path.relative_to(folder)) for path in folder.rglob("*.json")} == {"a.json", "deeper/b.json"}
        assert folder.name == "in"
    assert folder.exists() == (not is_remote(place))
    with pytest.raises(FileNotFoundError), local_copy(place / "none") as file:
        file.read_bytes()


def test_a_tree_is_removed_and_nothing_beside_it(place: Path):
    for name in ("gone/a.json", "gone/deeper/b.json", "gone-not.json"):
        write_json(place / name, 0)
    remove_tree(place / "gone")
    remove_tree(place / "gone")
    assert [path.name for path in place.iterdir()] == ["gone-not.json"]
    assert not (place / "gone").is_dir()


def test_a_run_directory_is_tried_before_it_is_used(place: Path):
    RunDir.create(place)
    assert not place.is_dir() or list(place.iterdir()) == []


# Shards

SPEC = ShardSetSpec(kind="images", rows=5, shard_rows=2, dtype="uint8", shape=(2, 2), inputs={"seed": 0})


def written(place: Path) -> ShardSet:
    shards = ShardSet.open(place, SPEC)
    for index in shards.missing:
        values = np.full((len(SPEC.ids(index)), 2, 2), index, np.uint8)
        shards.commit(write_shard(shards.folder, SPEC, index, np.zeros(len(values), np.int64), values))
    return shards


def test_shards_round_trip(place: Path):
    written(place)
    again = ShardSet.open(place, SPEC)
    assert again.complete and again.damaged() == []
    assert again.read([2, 0]).values[:, 0, 0].tolist() == [2, 0, 0]
    assert [len(rows.labels) for rows in pickle.loads(pickle.dumps(again))] == [2, 2, 1]


def test_truncated_flipped_and_absent_shards_are_found(place: Path):
    first, second, third = written(place).paths(range(3))
    first.write_bytes(first.read_bytes()[:-1])
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(bytes(content))
    third.unlink()
    with pytest.raises(ValueError, match=r"part-00000\.parquet is no shard of this project, or is damaged"):
        read_shard(first)
    shards = ShardSet.open(place, SPEC)
    assert shards.damaged() == [first.name, second.name, third.name] and shards.missing == [0, 1, 2]


# The curve


def test_a_curve_is_appended_to_and_cut_back(place: Path):
    curve = Curve(place / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        curve.add(step, {"loss": 0.5, "seconds": step / 2})
    curve.flush()
    assert [line["step"] for line in Curve.read(curve.path)] == [1, 2, 3]
    again = Curve(place / "metrics.jsonl", 2)
    assert again.seconds == 1.0 and [line["step"] for line in again.kept] == [1, 2]
    again.add(3, {"loss": 0.25, "seconds": 2.0})
    again.flush()
    assert [line.get("loss") for line in Curve.read(curve.path)] == [0.5, 0.5, 0.25]


def test_a_curve_in_a_store_is_written_every_few_seconds(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(curves, "_SECONDS_BETWEEN_WRITES", 1000.0)
    curve = Curve(located(url) / "metrics.jsonl", 0)
    curve.add(1, {"seconds": 0.0})
    assert Curve.read(curve.path) == []
    monkeypatch.setattr(curves, "_SECONDS_BETWEEN_WRITES", 0.0)
    curve.add(2, {"seconds": 0.0})
    assert [line["step"] for line in Curve.read(curve.path)] == [1, 2]


# What a store says that fails


def test_a_bucket_that_is_not_there_is_one_line(object_store: str):
    with pytest.raises(ValueError, match=r"run directory s3://no-bucket/x cannot be written: .*bucket.*--run-dir"):
        RunDir.create(located("s3://no-bucket/x"))


def test_a_store_that_is_away_is_one_line(object_store: str, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(storage, "_RETRIES", {"mode": "standard", "max_attempts": 1})
    S3FileSystem.clear_instance_cache()
    result = tiny.hdistill("run", "digits", "--run-dir", "s3://bucket/x")
    S3FileSystem.clear_instance_cache()
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "run directory s3://bucket/x cannot be written: Could not connect" in result.stderr


def test_failures_are_told_from_bugs():
    assert failure(OSError(28, "No space left on device", "x")) == "No space left on device (x)"
    assert failure(BrokenPipeError(32, "Broken pipe")) is None
    assert failure(OSError("a bug")) is None and failure(KeyError("a bug")) is None


# A whole run


def trained(run_dir: Path, *stages: str) -> dict[str, Any]:
    """Shards, weights and curves, without what a clock said."""
    folders = {name: run_dir / "stages" / name for name in stages}
    lines = {name: Curve.read(folder / "metrics.jsonl") for name, folder in folders.items()}
    return {
        "shards": [shard["sha256"] for shard in read_json(run_dir / "trajectories" / "manifest.json")["shards"]],
        "weights": {name: file_hash(folder / "student.safetensors") for name, folder in folders.items()},
        "curves": {n: [{k: v for k, v in line.items() if k != "seconds"} for line in c] for n, c in lines.items()},
    }


def results(run_dir: Path) -> dict[str, Any]:
    """What a run ends with, without what a clock said."""
    timed = {"images_per_second", "train_seconds"}
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_json(run_dir / "report.json")["rows"]]
    return {**trained(run_dir, *tiny.STAGES), "rows": rows}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, one thread, and no tracking store but the default one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.process.available_cpus", lambda: 1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_a_run_at_a_url_ends_as_on_a_disk_and_is_reused(url: str, finished: Finished, workplace: Path):
    first = tiny.hdistill("run", finished.recipe_file, "--run-dir", url, *HERE)
    assert first.exit_code == 0, first.output
    assert results(located(url)) == results(finished.run_dir)
    there = {str(path.relative_to(finished.run_dir)) for path in finished.run_dir.rglob("*") if path.is_file()}
    here_alone, each_its_own = {"lock", "tracking"}, {"costs"}
    expected = {name for name in there if name.split("/")[0] not in here_alone | each_its_own}
    assert {name for name in objects(url) if name.split("/")[0] not in each_its_own} == expected
    assert (workplace / "runs" / "mlflow.db").is_file()
    sent = [path.name for path in (workplace / "runs" / "mlartifacts").rglob("*.*")]
    assert {"report.json", "student.safetensors", "same_noises.png"} <= set(sent)
    second = tiny.hdistill("run", finished.recipe_file, "--run-dir", url, *HERE, *tiny.UNTRACKED)
    assert second.exit_code == 0, second.output
    reused = [line.split()[0] for line in second.output.splitlines() if line.endswith("reused")]
    assert reused == ["precompute", *tiny.STAGES, "evaluate"]
    report = tiny.hdistill("report", url)
    assert report.exit_code == 0 and f"{url}/report.html" in report.output
    asked = ("--stage", "sfd_4", "--num", 2, "--out", workplace / "samples")
    assert tiny.hdistill("sample", finished.recipe_file, "--run-dir", url, *asked, *HERE).exit_code == 0
    assert {path.name for path in (workplace / "samples").iterdir()} == {"00000.png", "00001.png", "sheet.png"}
    plan = tiny.hdistill("run", finished.recipe_file, "--run-dir", url, "--dry-run", *HERE)
    assert plan.exit_code == 0, plan.output


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_work_through_a_store_that_throttles_and_cuts_ends_the_same(
    url: str, finished: Finished, workplace: Path, object_store: str
):
    """One request of twelve is refused, and a part of each kind of large transfer is cut off once."""
    cut: set[tuple[str, str]] = set()
    visible: list[tuple[str, int]] = []

    def choose(number: int, method: str, path: str) -> Fault:
        large = path.endswith((".parquet", "student.safetensors"))
        if large and method in ("PUT", "GET") and (method, path) not in cut:
            cut.add((method, path))
            return "cut_upload" if method == "PUT" else "cut_download"
        if number % 10 == 0:
            visible.extend(objects(url, object_store).items())
        return "throttle" if number % 12 == 0 else ""

    with faulty(object_store, choose) as faults:
        asked = ("--stage", "refine", "--run-dir", url, *HERE, *tiny.UNTRACKED)
        result = tiny.hdistill("train", finished.recipe_file, *asked)
        assert result.exit_code == 0, result.output
    assert trained(located(url), "sketch", "refine") == trained(finished.run_dir, "sketch", "refine")
    assert faults.count("throttle") > 5 and faults.count("cut_upload") >= 3 and faults.count("cut_download") >= 3
    final = objects(url)
    seen = [(name, size) for name, size in visible if name.endswith((".parquet", "student.safetensors"))]
    assert seen and all(final[name] == size for name, size in seen), "one was seen in part"
    assert not [name for name in final if Path(name).name.startswith(".")]
