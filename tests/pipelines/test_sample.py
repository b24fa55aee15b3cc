"""Pictures from a trained stage, called as a library; the command is tested with the command line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.run import Run
from pipelines.sample import draw
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import open_run, tiny_recipe


@pytest.fixture(scope="module")
def job(finished: Finished) -> Run:
    return open_run(finished.recipe, finished.run_dir)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))])


def test_a_class_may_be_asked_for(job: Run, tmp_path: Path):
    for label in (0, 1):
        draw(job, "sfd_4", num=40, label=label, seed=0, out=tmp_path / str(label))
    zeros, ones = (pictures(tmp_path / str(label)).astype(float).mean(0) for label in (0, 1))
    real = job.splits.reference
    means = [real.images[real.labels == label].mean((0, 3)) for label in (0, 1)]
    for made, own, other in ((zeros, means[0], means[1]), (ones, means[1], means[0])):
        assert np.abs(made - own).mean() < np.abs(made - other).mean()


def test_colour_pictures_are_written_in_colour(job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    colour = np.full((2, 8, 8, 3), (255, 0, 0), np.uint8)
    monkeypatch.setattr("pipelines.sample.to_uint8", lambda _: colour)
    draw(job, "sketch", num=2, label=None, seed=0, out=tmp_path)
    with Image.open(tmp_path / "00001.png") as picture:
        assert picture.mode == "RGB" and picture.getpixel((3, 3)) == (255, 0, 0)


def test_a_stage_of_another_recipe_is_refused_by_name(finished: Finished, tmp_path: Path):
    other = open_run(tiny_recipe(tmp_path, "stages.sketch.num_steps=9"), finished.run_dir)
    with pytest.raises(ValueError, match="num_steps: 5 there, 9 here"):
        draw(other, "sketch", num=1, label=None, seed=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
