"""Shards by Ray Data in parts, or whole: the same bytes however they are made, bounded memory, nothing made twice."""

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import cluster
from pipelines.production import Actors, Count, Encode, InParts, Read, produce, start_for, unit_rows
from pipelines.shards import Shard, ShardSet, ShardSetSpec, decode, tensor_table, write_shard

WIDTH = 64
"""Bytes of a row before it is encoded; two float32 after."""


def spec_of(rows: int = 22, shard_rows: int = 8, width: int = WIDTH) -> ShardSetSpec:
    return ShardSetSpec(
        kind="latents", rows=rows, shard_rows=shard_rows, dtype="float32", shape=(2,), inputs={"width": width}
    )


def pixels(ids: range, width: int = WIDTH) -> np.ndarray:
    return np.repeat(np.array([[number % 251] for number in ids], np.uint8), width, axis=1)


def parts_of(
    folder: Path | None = None, *, width: int = WIDTH, rows: int = 3, seconds: float = 0, dies_at: int = -1
) -> InParts:
    """Pixels read on CPUs, their first and their sum by the encoder; each writes its process into ``folder``.

    The encoder takes some ``seconds`` a unit; its process is killed once, at the unit that begins with ``dies_at``.
    """

    def note(what: str) -> None:
        if folder is not None:
            (folder / f"{what}-{os.getpid()}").touch()

    def read(ids: range) -> pa.Table:
        note("read")
        number = np.arange(ids.start, ids.stop)
        values = np.repeat((number % 251).astype(np.uint8)[:, None], width, axis=1)
        return tensor_table(number, number % 7, values)

    def encoder(_device: str) -> Encode:
        def encode(table: pa.Table) -> pa.Table:
            import signal

            note("encode")
            found = decode(table, "uint8", (width,))
            if folder is not None and found.sample_ids[0] == dies_at and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(seconds)
            sums = found.values.sum(1, dtype=np.float32)
            values = np.stack([found.values[:, 0].astype(np.float32), sums], axis=1)
            return tensor_table(found.sample_ids, found.labels, values)

        return encode

    return InParts(read=read, encoder=encoder, rows=rows)


def make(
    folder: Path, count: Count, parts: InParts | None = None, spec: ShardSetSpec | None = None, cpus: float = 1.0
) -> ShardSet:
    shards = ShardSet.open(folder, spec or spec_of())
    produce(shards, parts or parts_of(), Actors(count=count, cpus=cpus, gpus=0.0), lambda _: None)
    return shards


def hashes(shards: ShardSet) -> list[str]:
    return [shard.sha256 for shard in shards.shards]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Three shards of 8, 8 and 6 rows, in units of 3, 3 and 2, made in this process."""
    return make(tmp_path_factory.mktemp("here") / "set", 0)


def test_the_parts_of_a_shard_come_together(here: ShardSet) -> None:
    rows = here.read(range(3))
    assert rows.sample_ids.tolist() == list(range(22)) and rows.labels.tolist() == [n % 7 for n in range(22)]
    assert rows.values.tolist() == [[n, n * WIDTH] for n in range(22)]


def test_the_manifest_tells_seconds_and_bytes(here: ShardSet) -> None:
    listed = json.loads((here.folder / "manifest.json").read_text())["shards"]
    assert [entry["bytes"] for entry in listed] == [(here.folder / e["file"]).stat().st_size for e in listed]
    assert all(0 < entry["seconds"] < 5 for entry in listed)


def test_a_manifest_from_before_they_were_kept_is_read(here: ShardSet, tmp_path: Path) -> None:
    shutil.copytree(here.folder, tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    about = json.loads(manifest.read_text())
    about["shards"] = [{k: entry[k] for k in ("index", "file", "rows", "sha256")} for entry in about["shards"]]
    manifest.write_text(json.dumps(about))
    shards = ShardSet.open(tmp_path / "set", here.spec)
    assert shards.complete and [(shard.bytes, shard.seconds) for shard in shards.shards] == [(0, 0.0)] * 3


@pytest.mark.parametrize(
    ("row_bytes", "batch_size", "rows"),
    [(3072, 512, 512), (512 * 512 * 3, 512, 21), (2**24, 512, 1), (2**30, 512, 1), (2**20, 4, 4)],
)
def test_a_unit_is_a_batch_unless_that_is_too_heavy(row_bytes: int, batch_size: int, rows: int) -> None:
    assert unit_rows(row_bytes, batch_size) == rows


# Who makes them


@pytest.mark.parametrize("count", [-1, (0, 2), (3, 2), (-1, 1)])
def test_numbers_of_actors_that_cannot_be_are_refused(count: Count) -> None:
    given = re.escape(str(count if isinstance(count, int) else list(count)))
    with pytest.raises(ValueError, match=f"num_actors must not be negative.*given {given}"):
        Actors(count=count, cpus=1.0, gpus=0.0)


@pytest.mark.parametrize(("cpus", "gpus"), [(0.0, 0.0), (1.0, -1.0)])
def test_resources_that_cannot_be_are_refused(cpus: float, gpus: float) -> None:
    with pytest.raises(ValueError, match=f"given {cpus:g} and {gpus:g}"):
        Actors(count=1, cpus=cpus, gpus=gpus)


@pytest.mark.ray
@pytest.mark.parametrize("count", [1, (1, 2), (1, 64)])
def test_actors_make_the_same_bytes(ray_cluster: None, here: ShardSet, tmp_path: Path, count: Count) -> None:
    """Up to 64, of which the cluster has room for three: what is left is for reading and committing."""
    shards = make(tmp_path / "set", count)
    assert hashes(shards) == hashes(here)
    assert ShardSet.open(tmp_path / "set", spec_of()).shards == shards.shards
    assert all(0 < shard.seconds < 60 for shard in shards.shards)


@pytest.mark.ray
def test_reading_and_encoding_are_operators_of_their_own_and_a_killed_encoder_loses_nothing(
    ray_cluster: None, here: ShardSet, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    shards = make(tmp_path / "set", 2, parts_of(notes, dies_at=11))
    readers, encoders = ({path.name.split("-")[1] for path in notes.glob(f"{what}-*")} for what in ("read", "encode"))
    assert (notes / "killed").exists() and len(encoders) >= 2
    assert readers and not readers & encoders and str(os.getpid()) not in readers | encoders
    assert hashes(shards) == hashes(here)


@pytest.mark.ray
def test_only_what_is_missing_is_made(ray_cluster: None, here: ShardSet, tmp_path: Path) -> None:
    """The short last shard is there, and the one before it is not."""
    shutil.copytree(here.folder, tmp_path / "set")
    shards, notes = ShardSet.open(tmp_path / "set", here.spec), tmp_path / "notes"
    notes.mkdir()
    (shards.folder / shards.shards[1].file).write_bytes(b"damaged")
    assert shards.damaged() == ["part-00001.parquet"]
    counts: list[int] = []
    produce(shards, parts_of(notes), Actors(count=1, cpus=1.0, gpus=0.0), counts.append)
    assert counts == [8] and hashes(shards) == hashes(here)


@pytest.mark.ray
@pytest.mark.parametrize("where", ["read", "encode", "commit"])
def test_a_mistake_in_any_part_reaches_the_caller_as_it_is(ray_cluster: None, tmp_path: Path, where: str) -> None:
    fine, folder = parts_of(), tmp_path / "set"

    def refuse(*_: object) -> pa.Table:
        raise ValueError("picture 7 is damaged")

    if where == "commit":
        folder.write_text("a file where the directory should be")
    read: Read = refuse if where == "read" else fine.read
    encoder: Callable[[str], Encode] = (lambda _: refuse) if where == "encode" else fine.encoder
    expected = FileExistsError if where == "commit" else ValueError
    shards = ShardSet(folder, spec_of(), {})
    with pytest.raises(expected, match=str(folder) if where == "commit" else "^picture 7 is damaged$") as caught:
        produce(shards, InParts(read=read, encoder=encoder, rows=3), Actors(count=1, cpus=1.0, gpus=0.0), print)
    assert type(caught.value) is expected and not shards.shards


@pytest.mark.ray
def test_reading_needs_a_cpu_of_its_own(ray_cluster: None, tmp_path: Path) -> None:
    """With 3.5 of 4 CPUs reserved no picture would ever be read."""
    with pytest.raises(ValueError, match=r"3.5 CPUs are asked for by workers, and the Ray cluster has 4: leave at"):
        make(tmp_path / "set", 1, cpus=3.5)


@pytest.mark.ray
def test_the_fewest_actors_decide_whether_there_is_room(ray_cluster: None, tmp_path: Path) -> None:
    shards = ShardSet.open(tmp_path / "set", spec_of(rows=800))
    assert start_for(shards, parts_of(), Actors(count=(1, 64), cpus=1.0, gpus=0.0)) == (1, 3)
    assert start_for(shards, parts_of(), Actors(count=(1, 2), cpus=1.0, gpus=0.0)) == (1, 2)
    with pytest.raises(ValueError, match="64 CPUs are asked for"):
        start_for(shards, parts_of(), Actors(count=64, cpus=1.0, gpus=0.0))


@pytest.mark.ray
def test_a_named_cluster_that_lacks_something_is_waited_for(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    shards = ShardSet.open(tmp_path / "set", spec_of(rows=800))
    with caplog.at_level(logging.WARNING, "hdistill"):
        assert start_for(shards, parts_of(), Actors(count=(5, 64), cpus=1.0, gpus=1.0)) == (5, 64)
        cluster.ensure_ray(reserved_cpus=1)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "5 CPUs are asked for by workers, and the Ray cluster has 4"
    ]
    assert "Waiting for the cluster to grow" in caplog.text


# Memory


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_memory_does_not_grow_with_the_set(ray_cluster: None, tmp_path: Path) -> None:
    """960 MiB of pixels go through an object store of 200 MiB, before an encoder slower than their readers.

    Nothing is spilled to disk, and all processes together take little more memory than for an eighth of the pixels:
    140 to 180 MiB were measured, of which the object store may have 100.
    """
    width, unit = 2**18, 32  # 8 MiB
    peaks: list[float] = []
    for size in (15 * unit, 120 * unit):
        spec = spec_of(size, 15 * unit, width)
        with peak_memory() as measured:
            shards = make(tmp_path / str(size), 1, parts_of(width=width, rows=unit, seconds=0.1), spec)
        assert shards.complete
        peaks.append(max(measured))
    assert spilled() == 0
    assert peaks[1] - peaks[0] < 320, peaks


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """MiB of this process and all below it, Ray's and its object store among them, a few times a second."""
    measured, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            measured.append(sum(map(_proportional_set_size, family())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield measured
    finally:
        done.set()
        watcher.join()


def family() -> set[int]:
    """This process and its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _proportional_set_size(process: int) -> float:
    """Memory of one process in MiB, of what it shares its share."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return int(text.split("\nPss:")[1].split()[0]) / 1024


def spilled() -> int:
    """MiB that the object store has moved to disk since the cluster began."""
    import ray
    from ray._private.internal_api import memory_summary

    address = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
    found = re.search(r"Spilled (\d+) MiB", memory_summary(address, stats_only=True))
    return int(found[1]) if found else 0


# A driver that died


class Died(BaseException):
    pass


@pytest.mark.parametrize("listed", [0, 1])
def test_what_a_dead_driver_left_unlisted_is_adopted(
    here: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: int
) -> None:
    """It dies between the commit of a file and its listing, be it the first of all or a later one."""
    commit = ShardSet.commit

    def mortal(shards: ShardSet, shard: Shard) -> None:
        if len(shards.shards) == listed:
            raise Died
        commit(shards, shard)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(ShardSet, "commit", mortal)
        make(tmp_path / "set", 0)
    found, before = ShardSet.open(tmp_path / "set", spec_of()), (tmp_path / "set").stat().st_mtime_ns
    assert found.missing == list(range(listed + 1, 3))
    assert found.shards[listed].bytes == here.shards[listed].bytes and found.shards[listed].seconds == 0
    assert (tmp_path / "set").stat().st_mtime_ns == before, "looking changes nothing"
    times = {shard.file: (found.folder / shard.file).stat().st_mtime_ns for shard in found.shards}
    counts: list[int] = []
    produce(found, parts_of(), Actors(count=0, cpus=1.0, gpus=0.0), counts.append)
    assert counts == [8, 6][listed:] and hashes(found) == hashes(here)
    assert times == {name: (found.folder / name).stat().st_mtime_ns for name in times}
    assert not found.damaged() and json.loads((found.folder / "manifest.json").read_text())["complete"]


def test_an_adopted_set_that_is_complete_is_listed(here: ShardSet, tmp_path: Path) -> None:
    shutil.copytree(here.folder, tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    shards = ShardSet.open(tmp_path / "set", here.spec)
    assert shards.complete and not (tmp_path / "set" / "manifest.json").exists()
    shards.list_adopted()
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["complete"] and [entry["sha256"] for entry in manifest["shards"]] == hashes(here)


def _of_another_set(folder: Path, file: Path) -> None:
    spec = spec_of(width=WIDTH + 1)
    write_shard(folder, spec, 1, np.zeros(8, np.int64), np.zeros((8, 2), np.float32))


def _cut_short(folder: Path, file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _of_too_few_rows(folder: Path, file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 7), file)


def _without_provenance(folder: Path, file: Path) -> None:
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)


def _half_written(folder: Path, file: Path) -> None:
    file.rename(folder / f".{file.name}.0123")


def _out_of_range(folder: Path, file: Path) -> None:
    file.rename(folder / "part-00007.parquet")


@pytest.mark.parametrize(
    "spoil",
    [_of_another_set, _cut_short, _of_too_few_rows, _without_provenance, _half_written, _out_of_range],
    ids=lambda spoil: spoil.__name__.strip("_"),
)
def test_what_is_not_whole_or_not_of_this_set_is_not_adopted(
    here: ShardSet, tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(here.folder, folder)
    (folder / "manifest.json").unlink()
    spoil(folder, folder / "part-00001.parquet")
    assert ShardSet.open(folder, here.spec).missing == [1]


def test_a_damaged_shard_is_not_adopted_later(here: ShardSet, tmp_path: Path) -> None:
    """Its footer may be whole, and so it would be taken for one that was never listed."""
    folder = tmp_path / "set"
    shutil.copytree(here.folder, folder)
    content = bytearray((folder / "part-00001.parquet").read_bytes())
    content[40] ^= 1
    (folder / "part-00001.parquet").write_bytes(content)
    shards = ShardSet.open(folder, here.spec)
    assert shards.damaged() == ["part-00001.parquet"]
    shards.commit(shards.shards[0])
    assert ShardSet.open(folder, here.spec).missing == [1]
