"""A folder's captions, and the files that a path or a pattern means."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import load_images
from pipelines.sources import FolderSource, files_of
from tests.pipelines.pictured import COUNT, config, encoded, pixels, write_folder

ORDER = np.random.RandomState(0).permutation(COUNT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures", [encoded(image) for image in pixels()])


def listed(root: Path, lines: list[object]) -> None:
    for file in root.rglob("*.txt"):
        file.unlink()
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def names(root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]


def captions(root: Path, **changes: str) -> list[str | None] | None:
    return list(FolderSource(config("folder", root, **changes)).captions or ()) or None


def test_a_text_beside_each_picture(root: Path) -> None:
    splits = load_images(config("folder", root))
    assert splits.train.captions == tuple(f"picture {index}" for index in ORDER[:-3])
    assert splits.reference.captions == tuple(f"picture {index}" for index in ORDER[-3:])
    assert load_images(config("folder", root, caption_column="")).train.captions is None


def test_captions_change_the_fingerprint_and_their_absence_does_not(root: Path) -> None:
    with_captions = load_images(config("folder", root)).fingerprint
    (root / "class 0" / "0.txt").write_text("another")
    changed = load_images(config("folder", root)).fingerprint
    without = load_images(config("folder", root, caption_column="")).fingerprint
    assert len({with_captions, changed, without}) == 3
    for file in root.rglob("*.txt"):
        file.unlink()
    assert load_images(config("folder", root)).fingerprint == without


def test_metadata_lines(root: Path) -> None:
    listed(root, [{"file_name": name, "text": f"t{index}"} for index, name in enumerate(names(root))])
    assert captions(root) == [f"t{index}" for index in range(COUNT)]
    listed(root, [{"file_name": name, "text": "no", "alt": name} for name in names(root)])
    assert captions(root, caption_column="alt") == names(root)
    listed(root, [{"file_name": name, "boxes": []} for name in names(root)])
    assert load_images(config("folder", root)).train.captions is None


def test_one_object_of_prompts(root: Path) -> None:
    """MJHQ-30K's layout: ids are names of pictures, and the category is their folder."""
    for file in root.rglob("*.txt"):
        file.unlink()
    for index, name in enumerate(names(root)):
        (root / name).rename(root / Path(name).with_name(f"{index:02d}.png"))
    entries = {f"{index:02d}": {"category": f"class {index // 4}", "prompt": f"p{index}"} for index in range(COUNT)}
    (root / "meta_data.json").write_text(json.dumps(entries))
    assert captions(root) == [f"p{index}" for index in range(COUNT)]
    entries["05"]["category"] = "class 0"
    (root / "meta_data.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"class 1/05.png has no caption"):
        load_images(config("folder", root))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one is missing": (
        lambda root: (root / "class 1" / "2.txt").unlink(),
        "class 1/2.png has no caption, and others have one: every picture needs one, or none",
    ),
    "encoding": (lambda root: (root / "class 1" / "2.txt").write_bytes(b"\xe9"), "2.txt is not readable UTF-8 text"),
    "not listed": (
        lambda root: listed(root, [{"file_name": "class 0/0.png", "text": "a"}]),
        "class 0/1.png has no cap",
    ),
    "no name": (
        lambda root: listed(root, [{"text": "a"}]),
        r"metadata.jsonl line 1 must be an object with .*file_name",
    ),
    "no text": (lambda root: listed(root, [{"file_name": "a", "text": 1}]), "line 1: a caption must be text; given 1"),
    "no JSON": (lambda root: (root / "metadata.jsonl").write_text("\n{"), "metadata.jsonl line 2 is not readable JSON"),
    "no objects": (lambda root: (root / "meta_data.json").write_text("[1]"), "meta_data.json must be an object of obj"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_captions(fault: str, root: Path) -> None:
    breaking, message = FAULTS[fault]
    breaking(root)
    with pytest.raises(ValueError, match=message):
        load_images(config("folder", root))


def test_a_bad_picture_needs_no_caption(root: Path) -> None:
    (root / "class 1" / "2.txt").unlink()
    (root / "class 1" / "2.png").write_bytes(b"hello")
    splits = load_images(config("folder", root))
    assert splits.train.captions and [skip.name for skip in splits.skipped] == ["class 1/2.png"]


def test_paths_and_patterns(tmp_path: Path) -> None:
    for name in ("b-02.tar", "b-00.tar", "b-01.tar", "a/b-00.tar", ".hidden.tar", "b-00.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        root, files = files_of(f"{tmp_path}/{pattern}", ".tar")
        return [file.relative_to(root).as_posix() for file in files]

    assert found("") == found("b-*.tar") == found("b-{00..02}.tar") == ["b-00.tar", "b-01.tar", "b-02.tar"]
    assert found("b-01.tar") == ["b-01.tar"] and found("b-0[02].tar") == ["b-00.tar", "b-02.tar"]
    assert found("b-{02,00}.tar") == ["b-00.tar", "b-02.tar"]
    assert found("**/b-00.tar") == ["a/b-00.tar", "b-00.tar"]
    for pattern, message in (
        ("b-{01..03}.tar", "no file at .*b-03.tar"),
        ("c-*.tar", "no .tar files at .*c-"),
        ("missing", "no file at"),
    ):
        with pytest.raises(ValueError, match=message.replace("no .tar", r"no \*.tar")):
            found(pattern)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \*.tar files at .*empty"):
        found("empty")
