"""`hdistill score --clip`: where captions come from, what is scored by them, and what is said where there are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.captions import assigned, load_captions
from pipelines.clip import Clip
from pipelines.picture_cosines import picture_cosines
from pipelines.picture_files import PictureFiles
from pipelines.production import Actors
from tests.pipelines.clip_folder import clip_folder, longhand
from tests.pipelines.tiny import hdistill

PROMPTS = {f"id{number}": f"{'abcdefgh'[number % 8] * (1 + number % 3)} x" for number in range(24)}
"""By the picture's id; every third is of plants."""


def category(number: int) -> str:
    return "animals" if number % 3 else "plants"


def image(number: int) -> Image.Image:
    """A picture of a size of its own."""
    rng = np.random.default_rng(number)
    return Image.fromarray((rng.integers(0, 256, (12, 10 + number, 3)) * rng.random(3)).astype(np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Drawn pictures and real ones, in a folder for each category as MJHQ-30K has them."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        for kind, shift in (("drawn", 0), ("real", 40)):
            place = root / kind / category(number)
            place.mkdir(parents=True, exist_ok=True)
            image(number + shift).save(place / f"id{number}.png")
    return root / "drawn", root / "real"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MJHQ-30K's meta_data.json."""
    entries = {name: {"category": category(int(name[2:])), "prompt": text} for name, text in PROMPTS.items()}
    return written(tmp_path_factory.mktemp("listing") / "meta_data.json", entries)


def written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def asked(*arguments: object, cache: Path) -> Any:
    return hdistill("score", *arguments, "--features", "digits", "--neighbours", 2, "--cache", cache)


def scored(*arguments: object, cache: Path) -> dict[str, Any]:
    result = asked(*arguments, "--out", cache / "score.json", cache=cache)
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads((cache / "score.json").read_text()) | {"said": result.output}


def wanted(model: Path, numbers: list[int]) -> float:
    """Hessel et al. 2021 by hand, in the order of the numbers, which a mean does not know."""
    cosines = longhand(model, [image(number) for number in numbers], [PROMPTS[f"id{number}"] for number in numbers])
    return 100 * float(np.mean([max(cosine, 0) for cosine in cosines]))


def test_every_category_has_the_score_of_its_pictures(
    folders: tuple[Path, Path], model: Path, listing: Path, cache: Path
):
    found = scored(*folders, "--by-category", "--clip", model, "--captions", listing, cache=cache)
    expected = {
        "all": wanted(model, list(range(24))),
        "animals": wanted(model, [number for number in range(24) if number % 3]),
        "plants": wanted(model, list(range(0, 24, 3))),
    }
    assert {row["category"]: row["clip_score"] for row in found["rows"]} == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 2) for score in expected.values()}) == 3
    assert all(row["intervals"]["clip_score"][0] < row["clip_score"] for row in found["rows"])
    assert found["clip"] == str(model) and len(found["clip_sha256"]) == 64
    assert "CLIP score" in found["said"] and "…" not in found["said"]  # narrow as it is, no number is cut


def test_a_score_without_clip_says_nothing_of_it(folders: tuple[Path, Path], cache: Path):
    found = scored(*folders, cache=cache)
    assert "clip" not in found and "clip_score" not in found["rows"][0] and "CLIP" not in found["said"]


def test_captions_are_found_by_any_name_and_change_the_score(
    folders: tuple[Path, Path], model: Path, listing: Path, cache: Path, tmp_path: Path
):
    first = scored(*folders, "--clip", model, "--captions", listing, cache=cache)["rows"]
    for name in ("{category}/id{number}.png", "{category}/id{number}", "id{number}.png", "id{number}"):
        entries = {name.format(category=category(n), number=n): PROMPTS[f"id{n}"] for n in range(24)}
        plain = written(tmp_path / "plain.json", {**entries, "another": "z"})
        assert scored(*folders, "--clip", model, "--captions", plain, cache=cache)["rows"] == first
    shifted = {f"id{n}": PROMPTS[f"id{(n + 1) % 24}"] for n in range(24)}
    other = scored(*folders, "--clip", model, "--captions", written(tmp_path / "o.json", shifted), cache=cache)["rows"]
    assert abs(other[0]["clip_score"] - first[0]["clip_score"]) > 1e-2
    assert {**other[0], "clip_score": 0, "intervals": 0} == {**first[0], "clip_score": 0, "intervals": 0}


def test_captions_beside_the_pictures_or_the_references_are_taken(
    folders: tuple[Path, Path], model: Path, listing: Path, cache: Path
):
    first = scored(*folders, "--clip", model, "--captions", listing, cache=cache)["rows"]
    for folder in reversed(folders):
        beside = folder / "meta_data.json"
        beside.write_bytes(listing.read_bytes())
        assert scored(*folders, "--clip", model, cache=cache)["rows"] == first
        beside.unlink()


def test_cosines_are_kept(
    folders: tuple[Path, Path], model: Path, listing: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    first = scored(*folders, "--clip", model, "--captions", listing, cache=cache)
    monkeypatch.setattr("pipelines.picture_files.produce_rest", None)
    assert scored(*folders, "--clip", model, "--captions", listing, cache=cache) == first


@pytest.mark.ray
def test_actors_give_the_same_bits(ray_cluster: None, folders: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    files, clip, texts = PictureFiles(str(folders[0])), Clip.of(str(model)), list(PROMPTS.values())
    pools = [Actors(count=count, cpus=1, gpus=0) for count in (0, 1)]
    here, there = (picture_cosines(files, texts, clip, tmp_path / str(pool.count), pool) for pool in pools)
    assert here.tobytes() == there.tobytes() and here.std() > 0.05


FAULTS: dict[str, tuple[Any, str]] = {
    "one is missing": (
        {name: text for name, text in PROMPTS.items() if name != "id4"},
        "has no caption for 1 of 24 pictures, such as animals/id4.png: each is looked for by its path",
    ),
    "null": ({**PROMPTS, "id4": None}, "has no caption for 1 of 24 pictures, such as animals/id4.png"),
    "a list": (["a", "b"], "must hold a JSON object, {\"NAME\": \"TEXT\", ...}, or {\"ID\": {\"prompt\":"),
    "numbers": ({**PROMPTS, "id4": 4}, "captions.json: id4: a caption must be text; given 4"),
    "no prompt": ({"id1": {"category": "x"}}, "id1 has no prompt: a file of captions holds"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_captions_are_explained(
    fault: str, folders: tuple[Path, Path], model: Path, cache: Path, tmp_path: Path
):
    value, message = FAULTS[fault]
    path = written(tmp_path / "captions.json", value)
    result = asked(*folders, "--clip", model, "--captions", path, cache=cache)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_what_does_not_go_together_is_explained(folders: tuple[Path, Path], model: Path, cache: Path, tmp_path: Path):
    (tmp_path / "bad.json").write_text("no JSON")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(32), sigma=np.eye(32))
    for arguments, message in (
        ([*folders, "--clip", model], "there are none beside"),
        ([folders[0], tmp_path / "statistics.npz", "--clip", model], "give --captions FILE"),
        ([*folders, "--captions", tmp_path / "bad.json"], "are for the CLIP score: give --clip a CLIP model, too"),
        ([*folders, "--clip", model, "--captions", tmp_path / "none.json"], "no file of captions at"),
        ([*folders, "--clip", model, "--captions", tmp_path / "bad.json"], "bad.json is not readable JSON"),
        ([*folders, "--clip", tmp_path], "no CLIP model at"),
    ):
        result = asked(*arguments, cache=cache)
        assert result.exit_code == 2 and message in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert "--clip takes a folder of a CLIP model" in asked(*folders, "--clip", tmp_path, cache=cache).stderr


def test_one_caption_is_not_for_two_pictures(tmp_path: Path):
    captions = load_captions(written(tmp_path / "c.json", {"1": "a", "b/1": "b"}))
    assert assigned(["a/1.png", "b/1.png"], captions, "c.json") == ["a", "b"]
    with pytest.raises(ValueError, match=r"c.json: 1 fits a/1.png and c/1.png: name pictures by their paths"):
        assigned(["a/1.png", "b/1.png", "c/1.png"], captions, "c.json")
