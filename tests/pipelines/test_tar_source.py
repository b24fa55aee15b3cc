"""WebDataset tars: samples by name, classes and captions beside pictures, and names that lead nowhere."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import load_images
from pipelines.tar_source import Stretch
from tests.pipelines.pictured import COUNT, config, encoded, pixels, write_tar, write_webdataset

ORDER = np.random.RandomState(0).permutation(COUNT)
PICTURES = [encoded(image) for image in pixels()]
SOME = {f"{index}.png": PICTURES[index] for index in range(4)}


@pytest.mark.parametrize("pattern", ["", "part-*.tar", "part-{00..01}.tar", "{part-01,part-00}.tar"])
def test_order_is_that_of_tars_and_members(pattern: str, tmp_path: Path) -> None:
    write_webdataset(tmp_path, PICTURES)
    splits = load_images(config("webdataset", tmp_path / pattern))
    assert np.array_equal(splits.train.in_memory(), pixels()[ORDER[:-3]])
    assert splits.reference.labels.tolist() == [row // 4 for row in ORDER[-3:]]
    assert splits.reference.captions == tuple(f"picture {row}" for row in ORDER[-3:])


def test_samples_are_named_up_to_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    """A mask or another member of a sample is no second picture; the order is that of the samples' first members."""
    members = {
        "v1.0/a.cls": b" 2\n",
        "v1.0/b.PNG": PICTURES[1],
        "v1.0/b.seg.png": b"a mask",
        "v1.0/a.png": PICTURES[0],
        "v1.0/._a.png": b"left by a file manager",
        "v1.0/b.cls": b"0",
    }
    splits = load_images(config("webdataset", write_tar(tmp_path / "a.tar", members), held_out=1))
    order = np.random.RandomState(0).permutation(2)
    assert np.array_equal(splits.train.in_memory()[0], pixels()[order[0]]) and not splits.skipped
    assert splits.train.labels.tolist() == [[2, 0][order[0]]]


def test_samples_without_a_picture_are_skipped(tmp_path: Path) -> None:
    members = {**SOME, "notes.txt": b"hello", "x/5.png": b"hello"}
    splits = load_images(config("webdataset", write_tar(tmp_path / "a.tar", members), held_out=1))
    assert [(skip.name, skip.reason) for skip in splits.skipped] == [
        ("a.tar/notes.txt", "no picture among its members"),
        ("a.tar/x/5.png", "no picture of a known format"),
    ]
    assert len(splits.train) == 3 and splits.train.captions is None


def test_names_lead_nowhere(tmp_path: Path) -> None:
    """Members are told apart by name and read from the tar; links are left out, and nothing appears on the disk."""
    path = write_tar(tmp_path / "in" / "a.tar", {"../out.png": PICTURES[0], "/etc/out.png": PICTURES[1], **SOME})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    splits = load_images(config("webdataset", path, held_out=1))
    assert len(splits.train) == 5 and not splits.skipped
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stretch_reads_like_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    wanted, stretch = io.BytesIO(bytes(range(20, 50))), io.BufferedReader(Stretch(tmp_path / "a", 20, 30))
    for place, whence, size in ((0, 0, 5), (3, 1, 4), (-4, 2, 10), (29, 0, 10), (40, 0, 1), (0, 0, -1)):
        assert stretch.seek(place, whence) == wanted.seek(place, whence)
        assert stretch.read(size) == wanted.read(size) and stretch.tell() == wanted.tell()
    with stretch as raw:
        assert raw.readable() and raw.seekable()
    assert stretch.closed


def truncated(path: Path) -> None:
    write_tar(path, {"a.png": bytes(20_000), "b.png": bytes(20_000)})
    path.write_bytes(path.read_bytes()[:25_000])


def compressed(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text(600 * "a"), "a.tar is not a readable tar: .*whole, and not compressed"),
    "truncated": (truncated, "a.tar is not a readable tar: unexpected end of data"),
    "compressed": (compressed, "a.tar is not a readable tar: .*not compressed"),
    "empty": (lambda path: write_tar(path, {}), "holds no samples"),
    "two pictures": (lambda path: write_tar(path, {**SOME, "1.jpg": b""}), "1.jpg and 1.png are two pictures of one"),
    "class": (lambda path: write_tar(path, {**SOME, "1.cls": b"cat"}), r"1.cls: a class must be a whole .* 'cat'"),
    "class of json": (lambda path: write_tar(path, {**SOME, "1.json": b'{"label": 1.5}'}), "1.png: a class must be a"),
    "caption of json": (lambda path: write_tar(path, {**SOME, "1.json": b'{"caption": []}'}), "a caption must be text"),
    "json": (lambda path: write_tar(path, {**SOME, "1.json": b"{"}), "1.json is not readable JSON"),
    "encoding": (lambda path: write_tar(path, {**SOME, "1.txt": b"\xe9"}), "1.txt is not readable UTF-8"),
    "long": (lambda path: write_tar(path, {**SOME, "1.txt": bytes(2**20 + 1)}), "a caption has at most 1,048,576"),
    "one has no class": (lambda path: write_tar(path, {**SOME, "1.cls": b"0"}), "a.tar/0.png has no class, and others"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_tars(fault: str, tmp_path: Path) -> None:
    breaking, message = FAULTS[fault]
    breaking(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=message) as error:
        load_images(config("webdataset", tmp_path / "a.tar", held_out=1))
    assert str(error.value).count("\n") < 2
