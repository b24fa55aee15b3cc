"""Folders of pictures scored: clean-fid's numbers, categories, published statistics, and what is kept and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.torchvision_ops import declare_missing_operators

declare_missing_operators()

from cleanfid import fid as cleanfid  # noqa: E402
from cleanfid.resize import make_resizer  # noqa: E402

from hd_core.metrics.frechet import frechet_distance  # noqa: E402
from hd_core.metrics.statistics import Moments  # noqa: E402
from pipelines.data import DataConfig, load_images  # noqa: E402
from pipelines.features import load_extractor  # noqa: E402
from pipelines.measures import caution, fid_infinity  # noqa: E402
from pipelines.published import load_statistics  # noqa: E402
from tests.pipelines.tiny import hdistill  # noqa: E402


def write(folder: Path, images: np.ndarray, categories: int = 0) -> Path:
    """PNGs; with categories, in as many folders, in turn."""
    for number, image in enumerate(images):
        place = folder / f"kind-{number % categories}" if categories else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1)).save(place / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Digits, and others of which half are mirrored; each in two categories."""
    images, root = load_images(DataConfig()).train.images, tmp_path_factory.mktemp("pictures")
    assert isinstance(images, np.ndarray)
    worse = np.concatenate([images[200:300], images[300:400, :, ::-1]])
    return write(root / "worse", worse, 2), write(root / "real", images[:200], 2)


def scored(*arguments: object, out: Path) -> dict:
    result = hdistill("score", *arguments, "--features", "digits", "--cache", out.parent / "cache", "--out", out)
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads(out.read_text()) | {"said": result.output}


def test_fid_is_that_of_clean_fid_on_the_same_files(folders: tuple[Path, Path], tmp_path: Path):
    net = load_extractor("digits")
    theirs = [
        cleanfid.get_folder_features(
            str(folder),
            net.model,
            num_workers=0,
            batch_size=32,
            device=torch.device("cpu"),
            custom_fn_resize=make_resizer("PIL", False, "bicubic", (8, 8)),
        )
        for folder in folders
    ]
    wanted = cleanfid.fid_from_feats(*theirs)
    (row,) = scored(*folders, out=tmp_path / "score.json")["rows"]
    assert row["fid"] == pytest.approx(float(wanted), rel=1e-6) and row["fid"] > 1
    assert row["count"] == 200 and row["category"] == "all"
    low, high = row["intervals"]["fid"]
    assert low < row["fid"] < high and row["fid_infinity"] < row["fid"]
    for metric in ("kid", "precision", "recall", "density", "coverage", "inception_score"):
        assert row["intervals"][metric][0] <= row[metric] <= row["intervals"][metric][1]


def test_categories_are_scored_against_their_own(folders: tuple[Path, Path], tmp_path: Path):
    rows = scored(*folders, "--by-category", out=tmp_path / "score.json")["rows"]
    assert [(row["category"], row["count"]) for row in rows] == [("all", 200), ("kind-0", 100), ("kind-1", 100)]
    alone = scored(*(folder / "kind-1" for folder in folders), out=tmp_path / "alone.json")["rows"][0]
    assert rows[2] == alone | {"category": "kind-1"}


def test_categories_must_be_on_both_sides(folders: tuple[Path, Path], tmp_path: Path):
    one_sided = hdistill("score", *folders[:1], folders[1] / "kind-0", "--by-category", "--features", "digits",
                         "--cache", tmp_path)  # fmt: skip
    assert one_sided.exit_code == 2
    assert "of the pictures they are kind-0, kind-1, of the reference none" in one_sided.stderr


def test_features_are_made_once_and_again_when_a_picture_changes(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = load_images(DataConfig()).train.images
    assert isinstance(images, np.ndarray)
    own = write(tmp_path / "own", images[:60])
    first = scored(own, folders[1], out=tmp_path / "one.json")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.picture_files.produce_rest", None)
        assert scored(own, folders[1], out=tmp_path / "two.json") == first
    write(tmp_path / "own", images[60:61])
    assert scored(own, folders[1], out=tmp_path / "three.json")["rows"][0]["fid"] != first["rows"][0]["fid"]


def test_published_statistics_give_what_the_pictures_give(folders: tuple[Path, Path], tmp_path: Path):
    images = load_images(DataConfig()).train.images
    real = Moments.of(load_extractor("digits")(images[:200]))
    np.savez(tmp_path / "real.npz", mu=real.mean, sigma=real.covariance)
    (row,) = scored(folders[0], tmp_path / "real.npz", out=tmp_path / "score.json")["rows"]
    (whole,) = scored(*folders, out=tmp_path / "whole.json")["rows"]
    assert row["fid"] == pytest.approx(whole["fid"], rel=1e-9) and "kid" not in row
    assert row["inception_score"] == whole["inception_score"]


@pytest.mark.ray
def test_actors_give_the_same_bits(folders: tuple[Path, Path], tmp_path: Path):
    here = scored(*folders, out=tmp_path / "here" / "score.json")
    there = scored(*folders, "--actors", 2, out=tmp_path / "there" / "score.json")
    assert there["rows"] == here["rows"]


def test_mistakes_are_one_line(folders: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    for arguments, message in (
        ([tmp_path / "none", folders[1]], "no folder of pictures at"),
        ([tmp_path / "bad", folders[1]], "a.png is no whole picture"),
        ([folders[0], tmp_path / "nothing.npz"], "no file of statistics at"),
        ([folders[0], tmp_path / "other.npz"], "is no npz file of mu (d,) and sigma (d, d)"),
        ([folders[0], "cifar10"], "or one of clean-fid's sets as NAME/SPLIT/SIZE"),
        ([folders[0], "cifar10/train/32"], "published statistics cifar10/train/32 are of inception"),
        ([*folders, "--neighbours", 300], "more than neighbours, 300, are needed"),
        ([*folders, "--actors", -1], "num_actors must not be negative"),
    ):
        result = hdistill("score", *arguments, "--features", "digits", "--cache", tmp_path / "cache")
        assert result.exit_code == 2 and message in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_statistics_are_fetched_once_and_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[str] = []

    def fetch(folder: str, url: str) -> str:
        asked.append(url)
        np.savez(Path(folder) / Path(url).name, mu=np.zeros(3), sigma=2 * np.eye(3))
        return str(Path(folder) / Path(url).name)

    monkeypatch.setattr("cleanfid.downloads_helper.check_download_url", fetch)
    found = [load_statistics("CIFAR10/train/32", "inception") for _ in range(2)]
    assert asked == ["https://www.cs.cmu.edu/~clean-fid/stats/cifar10_clean_train_32.npz"]
    assert np.array_equal(found[1].covariance, 2 * np.eye(3))


def test_statistics_that_cannot_be_fetched_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def away(*_: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr("cleanfid.downloads_helper.check_download_url", away)
    with pytest.raises(ValueError, match="could not be fetched") as raised:
        load_statistics("ffhq/trainval/256", "inception")
    assert str(tmp_path / "hdistill" / "statistics" / "ffhq_clean_trainval_256.npz") in str(raised.value)


def test_fid_infinity_is_the_limit_of_ever_more_samples():
    """Of a standard normal against itself the limit is 0, and 400 samples alone are far from it."""
    rng = np.random.default_rng(0)
    exact = Moments(1000, np.zeros(8), np.eye(8) * 999)
    found = []
    for _ in range(60):
        features = rng.standard_normal((400, 8))
        fid = frechet_distance(Moments.of(features), exact)
        limit = fid_infinity(features, exact, fid)
        assert limit is not None
        found.append((fid, limit))
    mean_fid, mean_limit = np.mean(found, axis=0)
    assert mean_fid > 0.03 and abs(mean_limit) < 0.1 * mean_fid


def test_too_few_samples_have_no_limit_and_a_caution():
    few = np.random.default_rng(0).standard_normal((16, 8))
    assert fid_infinity(few, Moments.of(few), 1.0) is None
    assert "8 samples under 8 features" in caution(8, 8) and caution(9, 8) == ""
