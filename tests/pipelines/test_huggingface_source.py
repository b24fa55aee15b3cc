"""Hugging Face data sets that were saved to disk; no test goes to the hub."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import load_images
from tests.pipelines.pictured import config, encoded, pixels, write_huggingface

PICTURES = [encoded(image) for image in pixels()]


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'hdistill\[datasets\]'"):
        load_images(config("huggingface", tmp_path))


def test_one_split_is_divided(tmp_path: Path) -> None:
    splits = load_images(config("huggingface", write_huggingface(tmp_path, PICTURES)))
    order = np.random.RandomState(0).permutation(12)
    assert np.array_equal(splits.train.in_memory(), pixels()[order[:-3]])
    assert splits.train.labels.tolist() == [row // 4 for row in order[:-3]]
    assert splits.reference.captions == tuple(f"picture {row}" for row in order[-3:])


def test_a_split_of_its_own_is_the_reference(tmp_path: Path) -> None:
    pictures = [*PICTURES]
    pictures[2] = b"hello"
    given = config("huggingface", write_huggingface(tmp_path, pictures), reference_split="test", held_out=99)
    splits = load_images(given)
    assert np.array_equal(splits.train.in_memory(), np.delete(pixels(), 2, axis=0))
    assert np.array_equal(splits.reference.in_memory(), pixels()[[0, 1, 3]])
    assert [skip.name for skip in splits.skipped] == ["train row 2", "test row 2"]
    assert splits.train.num_classes == splits.reference.num_classes == 3


def test_a_set_without_splits(tmp_path: Path) -> None:
    datasets = import_module("datasets")
    write_huggingface(tmp_path / "both", PICTURES)
    datasets.load_from_disk(str(tmp_path / "both"))["train"].save_to_disk(str(tmp_path / "one"))
    one, both = (load_images(config("huggingface", tmp_path / name)) for name in ("one", "both"))
    assert one.fingerprint == both.fingerprint
    with pytest.raises(ValueError, match="was saved without splits: leave reference_split empty"):
        load_images(config("huggingface", tmp_path / "one", reference_split="test"))


def test_pictures_in_files_beside_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without bytes name a file; one that is gone is skipped."""
    datasets = import_module("datasets")
    for row, contents in enumerate(PICTURES):
        (tmp_path / f"{row}.png").write_bytes(contents)
    rows = [{"bytes": None, "path": str(tmp_path / f"{row}.png")} for row in range(12)]
    features = datasets.Features(image=datasets.Image())
    saved = datasets.Dataset.from_dict({"image": rows}, features=features)
    (tmp_path / "5.png").unlink()
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: saved)
    splits = load_images(config("huggingface", Path("org/name")))
    assert [(skip.name, skip.reason) for skip in splits.skipped] == [("train row 5", "its file is missing")]
    order = np.delete(np.arange(12), 5)[np.random.RandomState(0).permutation(11)]
    assert np.array_equal(splits.train.in_memory(), pixels()[order[:-3]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "dev"}, r"has no split 'dev', only train, test"),
        ({"image_column": "img"}, r"\(train\) has no column 'img', only image, label, caption"),
        ({"image_column": "label"}, "column label is int64; it must be binary, or a struct"),
        ({"label_column": "caption"}, "column caption is string; it must hold whole numbers"),
        ({"caption_column": "alt"}, "has no column 'alt'"),
    ],
)
def test_faulty_settings(fields: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(config("huggingface", write_huggingface(tmp_path, PICTURES), **fields))


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("hello")
    with pytest.raises(ValueError, match=r"cannot load the data set .*, split train: "):
        load_images(config("huggingface", tmp_path))
