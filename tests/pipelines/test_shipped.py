"""Shipped recipes that need a teacher and data of one's own, from nothing, at a size that takes seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.data import DataConfig, load_images
from pipelines.plan import print_plan
from pipelines.recipe import load
from tests.pipelines.tiny import hdistill

SMALL = ("teacher_training.num_steps=2", "teacher_training.batch_size=8", "teacher_training.depth=4")


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an archive as Fashion-MNIST's, of noise."""
    random = np.random.default_rng(0)
    parts = {
        f"{kind}_{part}": random.integers(0, 256 if kind == "x" else 10, (rows, *shape)).astype(np.uint8)
        for part, rows in (("train", 64), ("test", 40))
        for kind, shape in (("x", (28, 28)), ("y", ()))
    }
    np.savez(tmp_path / "fashion_mnist.npz", **parts)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def test_a_teacher_and_a_feature_net_of_ones_own_and_then_the_plan(fashion: Path):
    recipe = load("fashion_hd", SMALL)
    with pytest.raises(ValueError, match="is not trained yet: run `hdistill teacher`"):
        print_plan(recipe, fashion / "run", Console(quiet=True))
    assert hdistill("teacher", "fashion_hd", *settings(*SMALL)).output.startswith("wrote teachers/fashion")
    assert hdistill("teacher", "fashion_hd", *settings(*SMALL)).output.startswith("there already")
    assert hdistill("features", "fashion_hd", "--out", "nets/fashion", "--steps", "2").exit_code == 0
    print_plan(recipe, fashion / "run", Console(quiet=True))


def test_own_pictures_with_bad_ones_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A corrupt file, a dot, one in CMYK and one of 20 megapixels: two are left out and named, two serve."""
    random = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(30):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{index:02d}.png")
    (folder / "corrupt.png").write_bytes((folder / "00.png").read_bytes()[:300])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("CMYK", (64, 48), (10, 200, 30, 5)).save(folder / "print.jpg")
    Image.new("RGB", (5000, 4000), (200, 30, 5)).save(folder / "large.jpg")
    monkeypatch.chdir(tmp_path)
    changes = settings(*SMALL, "data.path=pictures", "stages.sketch.num_steps=2", "precompute.num_actors=0")
    changes += settings("precompute.num_samples=64", "track.enabled=false")
    taught = hdistill("teacher", "own_images", *changes)
    assert taught.exit_code == 0 and "2 bad pictures are left out, the first corrupt.png" in taught.output
    assert hdistill("features", "own_images", *changes, "--task", "denoise", "--out", "nets/own", "--steps", 2).output
    trained = hdistill("train", "own_images", *changes, "--stage", "sketch")
    assert trained.exit_code == 0, trained.output
    skipped = json.loads((tmp_path / "runs" / "own_images" / "skipped_pictures.json").read_text())
    assert skipped.keys() == {"corrupt.png", "dot.png"} and "enlarged" in skipped["dot.png"]
    assert len(load_images(DataConfig(kind="folder", path="pictures", image_size=32, held_out=2)).train) == 30
