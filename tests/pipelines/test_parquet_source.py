"""Parquet: bytes or structs, columns that are absent or wrong, and how often a row group is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import parquet_source
from pipelines.data import load_images
from pipelines.parquet_source import ParquetSource
from tests.pipelines.pictured import COUNT, config, encoded, pixels, write_parquet

ORDER = np.random.RandomState(0).permutation(COUNT)
PICTURES = [encoded(image) for image in pixels()]


def test_order_is_that_of_files_and_rows(tmp_path: Path) -> None:
    splits = load_images(config("parquet", write_parquet(tmp_path, PICTURES)))
    assert np.array_equal(splits.train.in_memory(), pixels()[ORDER[:-3]])
    assert splits.reference.labels.tolist() == [row // 4 for row in ORDER[-3:]]
    assert splits.reference.captions == tuple(f"picture {row}" for row in ORDER[-3:])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_under_other_names(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"jpg": pa.array(PICTURES, kind), "cls": range(COUNT), "text": list("abcdefghijkl")})
    pq.write_table(table, tmp_path / "one.parquet")
    columns = {"image_column": "jpg", "label_column": "cls", "caption_column": "text"}
    splits = load_images(config("parquet", tmp_path / "one.parquet", **columns))
    assert np.array_equal(splits.train.in_memory(), pixels()[ORDER[:-3]])
    assert splits.train.labels.tolist() == ORDER[:-3].tolist() and splits.train.num_classes == 12
    assert splits.train.captions == tuple("abcdefghijkl"[row] for row in ORDER[:-3])


def test_without_classes_and_captions(tmp_path: Path) -> None:
    root = write_parquet(tmp_path, PICTURES, label=None, caption=[None] * COUNT)
    pq.write_table(pa.table({"image": PICTURES, "caption": pa.array([None] * COUNT, pa.string())}), root / "c.parquet")
    for file in ("a", "b"):
        (root / f"{file}.parquet").unlink()
    splits = load_images(config("parquet", root))
    assert splits.train.num_classes == 0 and splits.train.captions is None


def test_columns_that_are_not_wanted(tmp_path: Path) -> None:
    splits = load_images(config("parquet", write_parquet(tmp_path, PICTURES), label_column="", caption_column=""))
    assert splits.train.num_classes == 0 and splits.train.captions is None


def test_pictures_without_bytes_are_skipped(tmp_path: Path) -> None:
    pictures: list[Any] = [*PICTURES]
    pictures[2], pictures[7] = None, b""
    splits = load_images(config("parquet", write_parquet(tmp_path, pictures)))
    assert [(skip.name, skip.reason) for skip in splits.skipped] == [
        ("a.parquet row 2", "no bytes"),
        ("b.parquet row 1", "no bytes"),
    ]


def test_row_groups_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: Any) -> pa.Table:
        read.append(group)
        return original(self, group, **options)

    source = ParquetSource(config("parquet", write_parquet(tmp_path, PICTURES)))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [source.open(row).read() for row in range(COUNT)] == PICTURES and read == [0, 1, 0, 1]
    assert [source.open(int(row)).read() for row in ORDER] == [PICTURES[row] for row in ORDER] and len(read) == 4
    monkeypatch.setattr(parquet_source, "CACHE_BYTES", 1)
    for row in (0, 1, 2, 9, 10, 0):
        assert source.open(row).read() == PICTURES[row]
    assert len(read) == 6  # the last group was kept, the first one twice read again


def spoiled(root: Path, **columns: Any) -> None:
    write_parquet(root, PICTURES, **columns)


def damaged(root: Path) -> None:
    file = write_parquet(root, PICTURES) / "b.parquet"
    contents = bytearray(file.read_bytes())
    contents[4:400] = bytes(396)
    file.write_bytes(contents)


FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "nothing": (lambda root: root.mkdir(), {}, r"no \*.parquet files at"),
    "text": (lambda root: (spoiled(root), (root / "b.parquet").write_text("a")), {}, "b.parquet is not a readable Par"),
    "damaged": (damaged, {}, r"b.parquet.* is damaged"),
    "no pictures": (
        spoiled,
        {"image_column": "img"},
        r"has no column 'img', only image, label, caption: set data.image",
    ),
    "no such class": (spoiled, {"label_column": "cls"}, "has no column 'cls', only image, label"),
    "no such caption": (spoiled, {"caption_column": "alt"}, "has no column 'alt', only image, label"),
    "pictures are text": (spoiled, {"image_column": "caption"}, "caption is string; it must be binary, or a struct"),
    "classes are text": (spoiled, {"label_column": "caption"}, "caption is string; it must hold whole numbers"),
    "captions are numbers": (spoiled, {"caption_column": "label"}, "label is int64; it must hold text"),
    "one has no class": (lambda root: spoiled(root, label=[0] * 8 + [None] * 4), {}, "b.parquet row 2 has no class"),
    "negative": (lambda root: spoiled(root, label=[0] * 11 + [-1]), {}, "holds -1; classes count from 0"),
    "hashes": (lambda root: spoiled(root, label=[0] * 11 + [2**40]), {}, "without large gaps"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files(fault: str, tmp_path: Path) -> None:
    breaking, fields, message = FAULTS[fault]
    breaking(tmp_path / "set")
    with pytest.raises(ValueError, match=message) as error:
        load_images(config("parquet", tmp_path / "set", **fields))
    assert str(error.value).count("\n") < 2
