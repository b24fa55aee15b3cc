"""Sets that outgrow memory are, image by image, what they would be within it."""

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import data
from pipelines.data import DataSplits, ImageSet, load_images
from pipelines.lazy import LazyPixels, in_parallel
from tests.pipelines.pictured import COUNT, WRITERS, config, encoded, pixels, write_folder


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_BYTES", 0)


def written(kind: str, path: Path) -> Path:
    """Twelve pictures, two of which are seen to be bad by their headers: the second and the last."""
    pictures = [encoded(image) for image in pixels()]
    pictures[1], pictures[-1] = b"hello", encoded(pixels(1, 2)[0])
    return WRITERS[kind](path, pictures)


def both(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[DataSplits, DataSplits]:
    """The set in memory, and the same read as it is needed."""
    given = config(kind, path, image_size=5, **changes)
    whole = load_images(given)
    monkeypatch.setattr(data, "MAX_BYTES", 0)
    return whole, load_images(given)


@pytest.mark.parametrize("kind", WRITERS)
def test_equal_to_the_set_in_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lazy = both(kind, written(kind, tmp_path / "set"), monkeypatch)
    copied: DataSplits = pickle.loads(pickle.dumps(lazy))
    assert [skip.reason for skip in whole.skipped] == [
        "no picture of a known format",
        "2x2: would be enlarged more than twice",
    ]
    for splits in (lazy, copied):
        assert splits.skipped == whole.skipped
        for part, wanted in ((splits.train, whole.train), (splits.reference, whole.reference)):
            assert isinstance(part.images, LazyPixels) and isinstance(wanted.images, np.ndarray)
            assert_equal_images(part.images, wanted.images)
            assert np.array_equal(part.labels, wanted.labels) and part.captions == wanted.captions
            assert part.captions and part.num_classes == wanted.num_classes == 3 and part.shape == wanted.shape


def assert_equal_images(lazy: LazyPixels, wanted: np.ndarray) -> None:
    assert lazy.shape == wanted.shape and lazy.dtype == wanted.dtype and lazy.nbytes == wanted.nbytes
    assert len(lazy) == len(wanted)
    for index in (slice(None), slice(1, 3), slice(9, 20), slice(None, None, -1), np.array([2, 0, 2, -1])):
        assert np.array_equal(lazy[index], wanted[index]), index
    assert lazy[np.array([], np.int64)].shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "folder"])
def test_kinds_hold_the_same(kind: str, tmp_path: Path) -> None:
    """Pixels, classes and captions do not depend on how pictures are stored, and so the fingerprint does not."""
    first, other = (config(name, written(name, tmp_path / name), image_size=6) for name in ("folder", kind))
    assert load_images(first).fingerprint == load_images(other).fingerprint


def test_fingerprint_follows_names_sizes_and_settings(tmp_path: Path, small_memory: None) -> None:
    def mark(root: Path, **changes: Any) -> str:
        return load_images(config("folder", root, **{"image_size": 5, **changes})).fingerprint

    root = write_folder(tmp_path / "a", [encoded(image) for image in pixels()])
    same = write_folder(tmp_path / "b", [encoded(image) for image in pixels()])
    first = mark(root)
    assert mark(same) == first
    marks = [
        mark(root, **fields) for fields in ({"image_size": 6}, {"channels": 1}, {"split_seed": 1}, {"held_out": 2})
    ]
    marks.append(mark(root, image_size=6, fit="pad"))
    (same / "class 0" / "3.png").write_bytes(encoded(pixels()[3]) + b"more")
    marks.append(mark(same))
    (root / "class 0" / "3.png").rename(root / "class 0" / "4.png")
    (root / "class 0" / "3.txt").rename(root / "class 0" / "4.txt")
    marks.append(mark(root))
    assert len({first, *marks}) == 8


def test_a_picture_that_its_header_does_not_show_to_be_bad(tmp_path: Path, small_memory: None) -> None:
    root = write_folder(tmp_path, [encoded(image) for image in pixels(COUNT, 64)])
    file = root / "class 2" / "1.png"
    file.write_bytes(file.read_bytes()[:9000])
    splits = load_images(config("folder", root, image_size=32))
    assert not splits.skipped
    with pytest.raises(ValueError, match=r"class 2/1.png is damaged \(.*truncated.*take it out of the data"):
        for part in (splits.train, splits.reference):
            part.images[:]


def test_files_that_went_away_are_named(tmp_path: Path, small_memory: None) -> None:
    root = write_folder(tmp_path, [encoded(image) for image in pixels()])
    splits = load_images(config("folder", root, image_size=5))
    for file in root.rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"class \d/\d.png: .*No such file"):
        splits.train.images[:1]


def test_unreadable_files_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path, [encoded(image) for image in pixels()])
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    splits = load_images(config("folder", root))
    assert [skip.name for skip in splits.skipped] == [f"class {index}/2.png" for index in range(3)]
    assert {skip.reason for skip in splits.skipped} == {"no permission to read it"}


def test_one_image_is_no_set(tmp_path: Path, small_memory: None) -> None:
    lazy: ImageSet = load_images(config("folder", written("folder", tmp_path), image_size=5)).train
    index: Any = 0
    with pytest.raises(TypeError, match="by a slice or by an array of one axis; given 0"):
        lazy.images[index]
    with pytest.raises(IndexError):
        lazy.images[np.array([99])]


def test_padding_that_does_not_fit_is_said_at_once(tmp_path: Path, small_memory: None) -> None:
    root = write_folder(tmp_path, [encoded(image) for image in pixels()])
    with pytest.raises(ValueError, match=r"class 0/0.png: images of 6x6 do not fit into image_size 5"):
        load_images(config("folder", root, image_size=5, fit="pad"))


def test_parallel_work_keeps_its_order_and_stops_at_the_first_error() -> None:
    seen: list[int] = []
    lock = threading.Lock()

    def work(row: int) -> int:
        with lock:
            seen.append(row)
        if row in (70, 200):
            raise ValueError(f"row {row}")
        return row * row

    assert list(in_parallel(work, range(69, -1, -1))) == [row * row for row in range(69, -1, -1)]
    seen.clear()
    with pytest.raises(ValueError, match="row 70"):
        list(in_parallel(work, range(100_000)))
    assert len(seen) < 100_000
