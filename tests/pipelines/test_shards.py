"""Shards: what is written is what is read, by this project and by plain pyarrow; what is spoilt is found."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipelines.artifacts import read_json
from pipelines.shards import Rows, ShardSet, ShardSetSpec, decode, read_shard, write_shard
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import open_run


def spec_of(rows: int = 10, shard_rows: int = 4, **changes: object) -> ShardSetSpec:
    fields = {"kind": "trajectories", "dtype": "float16", "shape": (3, 2), "inputs": {"solver": "euler", "seed": 0}}
    return ShardSetSpec(rows=rows, shard_rows=shard_rows, **{**fields, **changes})  # type: ignore[arg-type]


def content(spec: ShardSetSpec, index: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(spec.ids(index))
    values = np.arange(ids.size * int(np.prod(spec.shape))) + 100 * index
    return ids % 7, values.reshape(-1, *spec.shape).astype(spec.dtype)


def filled(folder: Path, spec: ShardSetSpec) -> ShardSet:
    shards = ShardSet.open(folder, spec)
    for index in shards.missing:
        shards.commit(write_shard(folder, spec, index, *content(spec, index)))
    return shards


@given(
    dtype=st.sampled_from(["float16", "float32", "uint8"]),
    shape=arrays.array_shapes(max_dims=4, max_side=3),
    rows=st.integers(1, 6),
    data=st.data(),
)
def test_round_trip_is_bitwise(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: tuple[int, ...], rows: int, data: st.DataObject
):
    folder = tmp_path_factory.getbasetemp() / "round_trip"
    spec = spec_of(rows, rows, dtype=dtype, shape=shape)
    values = data.draw(arrays.arrays(dtype, (rows, *shape)))  # with NaN and infinity
    labels = data.draw(arrays.arrays("int64", rows))
    shard = write_shard(folder, spec, 0, labels, values)
    read = read_shard(folder / shard.file)
    assert read.values.tobytes() == values.tobytes()
    assert read.values.dtype == values.dtype and read.values.shape == values.shape
    assert np.array_equal(read.labels, labels) and np.array_equal(read.sample_ids, np.arange(rows))


def test_rows_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path):
    spec = spec_of(4)
    values = np.arange(24, dtype="float16").reshape(4, 2, 3).transpose(0, 2, 1)
    shard = write_shard(tmp_path, spec, 0, np.zeros(4, np.int64), values)
    assert np.array_equal(read_shard(tmp_path / shard.file).values, values)


def test_plain_pyarrow_reads_a_shard(finished: Finished):
    """The lines that are shown to users: nothing of this project is needed."""
    file = finished.run_dir / "trajectories" / "part-00001.parquet"

    table = pq.read_table(file)
    about = json.loads(table.schema.metadata[b"hdistill"])
    rows = [np.frombuffer(row.as_buffer(), about["dtype"]).reshape(about["shape"]) for row in table["values"]]

    shard = read_shard(file)
    assert np.array_equal(np.stack(rows), shard.values)
    assert table["sample_id"].to_pylist() == list(range(32, 64)) == shard.sample_ids.tolist()
    assert table["label"].to_pylist() == shard.labels.tolist()
    assert about["shape"] == [5, 1, 8, 8] and about["dtype"] == "float16"
    assert about["times"] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert table.schema.field("values").type == pa.large_binary()


def test_values_are_little_endian_bytes(tmp_path: Path):
    spec = spec_of(1, 1, dtype="float32", shape=(2,))
    write_shard(tmp_path, spec, 0, np.zeros(1, np.int64), np.array([[1.0, -2.0]], np.float32))
    (row,) = pq.read_table(tmp_path / "part-00000.parquet")["values"].to_pylist()
    assert row == bytes.fromhex("0000803f" + "000000c0")


def test_a_slice_of_a_table_decodes_to_its_rows(tmp_path: Path):
    spec = spec_of(4)
    _, values = content(spec, 0)
    write_shard(tmp_path, spec, 0, np.arange(4), values)
    table = pq.read_table(tmp_path / "part-00000.parquet")
    some = decode(table.slice(1, 2), "float16", spec.shape)
    assert np.array_equal(some.values, values[1:3]) and some.labels.tolist() == [1, 2]
    joined = decode(pa.concat_tables([table, table.slice(2)]), "float16", spec.shape)
    assert np.array_equal(joined.values, np.concatenate([values, values[2:]]))


def test_no_copy_of_the_tensors_is_made(tmp_path: Path):
    spec = spec_of(4)
    write_shard(tmp_path, spec, 0, *content(spec, 0))
    table = pq.read_table(tmp_path / "part-00000.parquet")
    (chunk,) = table["values"].chunks
    assert decode(table, "float16", spec.shape).values.ctypes.data == chunk.buffers()[2].address


def test_take():
    rows = Rows(sample_ids=np.arange(4), labels=np.arange(4) * 2, values=np.arange(8).reshape(4, 2))
    taken = rows.take(np.array([3, 0]))
    assert taken.sample_ids.tolist() == [3, 0] and taken.labels.tolist() == [6, 0]
    assert taken.values.tolist() == [[6, 7], [0, 1]]


# The set and its manifest


def test_a_spec_counts_shards_rows_and_bytes():
    spec = spec_of(10, 4)
    assert spec.num_shards == 3
    assert [list(spec.ids(index)) for index in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert spec.bytes == 10 * 3 * 2 * 2
    assert spec_of(10, 4, dtype="uint8").bytes == 60


def test_bytes_are_those_of_the_files_but_for_a_little(finished: Finished):
    shards = open_run(finished.recipe, finished.run_dir).trajectories
    assert shards.spec.bytes == 64 * 5 * 64 * 2
    on_disk = sum(path.stat().st_size for path in shards.paths(range(2)))
    assert shards.spec.bytes < on_disk < shards.spec.bytes + 2 * 8192


def test_the_manifest_says_what_is_there_and_where_it_came_from(finished: Finished):
    folder = finished.run_dir / "trajectories"
    manifest, job = read_json(folder / "manifest.json"), open_run(finished.recipe, finished.run_dir)
    assert manifest["complete"] and manifest["rows"] == 64 and manifest["format_version"] == 1
    assert manifest["fingerprint"] == job.trajectories.spec.fingerprint
    assert manifest["solver"] == "dpmpp_3m" and manifest["guidance_scale"] == 1.0
    grid = {"kind": "uniform", "t_max": 1.0, "t_min": 0.0, "rho": 7.0, "betas": [0.00085, 0.012], "knots": []}
    assert manifest["grid"] == grid and not manifest["afs"] and not manifest["null_share"]
    assert manifest["teacher"] == job.teacher.fingerprint and manifest["times"][0] == 1.0
    assert [shard["rows"] for shard in manifest["shards"]] == [32, 32]
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    about = json.loads(pq.read_schema(folder / "part-00000.parquet").metadata[b"hdistill"])
    assert about == {key: manifest[key] for key in about}


def test_images_are_kept_as_they_are(finished: Finished):
    job = open_run(finished.recipe, finished.run_dir)
    (rows,) = job.images
    assert job.images.complete
    assert np.array_equal(rows.values, job.splits.train.images) and rows.values.dtype == np.uint8
    assert np.array_equal(rows.labels, job.splits.train.labels)


def test_a_set_grows_shard_by_shard_in_any_order(tmp_path: Path):
    spec = spec_of()
    shards = ShardSet.open(tmp_path, spec)
    assert shards.missing == [0, 1, 2] and not shards.complete
    shards.commit(write_shard(tmp_path, spec, 2, *content(spec, 2)))
    assert ShardSet.open(tmp_path, spec).missing == [0, 1]
    assert not read_json(tmp_path / "manifest.json")["complete"]
    done = filled(tmp_path, spec)
    assert done.complete and [shard.index for shard in done.shards] == [0, 1, 2]
    assert done.read(range(3)).sample_ids.tolist() == list(range(10))
    assert done.read([2, 0]).sample_ids.tolist() == [8, 9, 0, 1, 2, 3]
    assert [len(rows.labels) for rows in done] == [4, 4, 2]


def test_a_whole_shard_that_is_written_but_not_listed_counts_as_committed(tmp_path: Path):
    spec = spec_of()
    written = write_shard(tmp_path, spec, 0, *content(spec, 0))
    found = ShardSet.open(tmp_path, spec)
    assert found.missing == [1, 2] and found.shards == [written]


def test_writing_a_shard_again_gives_the_same_bytes(tmp_path: Path):
    spec = spec_of()
    first = write_shard(tmp_path, spec, 1, *content(spec, 1))
    assert write_shard(tmp_path, spec, 1, *content(spec, 1)) == first


@pytest.mark.parametrize("spoil", ["truncated", "flipped", "missing", "empty"])
def test_a_spoilt_shard_is_found_by_its_hash_and_made_again(tmp_path: Path, spoil: str):
    spec = spec_of()
    shards = filled(tmp_path, spec)
    path = tmp_path / "part-00001.parquet"
    whole = path.read_bytes()
    if spoil == "missing":
        path.unlink()
    else:
        flipped = whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]
        path.write_bytes({"truncated": whole[:-1], "flipped": flipped, "empty": b""}[spoil])
    assert shards.damaged() == ["part-00001.parquet"]
    assert shards.missing == [1]
    assert shards.damaged() == []
    assert filled(tmp_path, spec).complete is True  # as the manifest has it: the hash is checked on demand
    shards.commit(write_shard(tmp_path, spec, 1, *content(spec, 1)))
    assert path.read_bytes() == whole and ShardSet.open(tmp_path, spec).damaged() == []


def test_a_set_of_other_inputs_is_refused_by_name(tmp_path: Path):
    filled(tmp_path, spec_of())
    other = spec_of(inputs={"solver": "heun", "seed": 0})
    with pytest.raises(ValueError, match=r"holds other trajectories: solver: euler there, heun here. Use another"):
        ShardSet.open(tmp_path, other)
    with pytest.raises(ValueError, match="rows: 10 there, 12 here"):
        ShardSet.open(tmp_path, spec_of(12))


def test_details_are_told_but_do_not_count(tmp_path: Path):
    filled(tmp_path, spec_of(details={"layout": "x"}))
    assert ShardSet.open(tmp_path, spec_of(details={"layout": "y"})).complete


@pytest.mark.parametrize("garbage", [b"", b"PAR1", b"not parquet at all"])
def test_a_file_that_is_no_shard_is_said_to_be_none(tmp_path: Path, garbage: bytes):
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(garbage)
    with pytest.raises(ValueError, match="is no shard of this project, or is damaged"):
        read_shard(path)


def test_a_parquet_file_of_somebody_else_is_no_shard(tmp_path: Path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="is no shard of this project"):
        read_shard(tmp_path / "x.parquet")


def test_a_damaged_manifest_is_named(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ShardSet.open(tmp_path, spec_of())
