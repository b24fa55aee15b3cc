"""The embedded teacher and feature net, and a few steps of the command that makes them."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hd_core.metrics.frechet import frechet_distance
from hd_core.metrics.statistics import Moments
from hd_core.random import sample_labels, sample_noise
from hd_core.solvers import SOLVERS, last
from hd_core.times import GridConfig
from hd_core.types import Condition
from pipelines.artifacts import file_hash
from pipelines.assets import ASSETS, BuildConfig, build, build_assets
from pipelines.data import DataConfig, load_images, to_uint8
from pipelines.feature_training import accuracy
from pipelines.features import DigitsFeatureNet, load_extractor
from pipelines.teacher_training import TeacherTraining
from pipelines.teachers import TeacherConfig, load_teacher

TINY = TeacherTraining(num_steps=3, batch_size=16, width=32, depth=1, heads=2)
QUICK = BuildConfig(teacher=TINY, feature_steps=3, feature_batch=16)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    build_assets(folder, QUICK, lambda *_: None)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_hash(path) for path in folder.rglob("*") if path.is_file()}


def test_what_is_built_is_loaded_by_the_same_code_as_any_folder(built: Path):
    teacher = load_teacher(TeacherConfig(path=str(built / "teachers" / "digits")))
    assert teacher.shape == (1, 8, 8) and teacher.num_classes == 10 and teacher.feature_widths == [32]
    net = DigitsFeatureNet()
    net.load_state_dict(load_file(built / "features" / "digits" / "model.safetensors"))
    assert 0 <= accuracy(net, load_images(DataConfig()).reference) <= 1


def test_the_same_seed_builds_the_same_files_whatever_was_drawn_before(built: Path, tmp_path: Path):
    torch.manual_seed(1234)
    build_assets(tmp_path, QUICK, lambda *_: None)
    assert files(tmp_path) == files(built)


def test_the_embedded_files_are_laid_out_as_a_build_leaves_them(built: Path):
    assert files(built).keys() <= files(ASSETS).keys()


def test_progress_counts_both_trainings(tmp_path: Path):
    told: list[tuple[str, int, int]] = []
    build_assets(tmp_path, QUICK, lambda *where: told.append(where))
    assert told == [(name, step, 3) for name in ("feature net", "teacher") for step in (1, 2, 3)]


def test_an_existing_teacher_is_not_overwritten(built: Path):
    before = files(built)
    with pytest.raises(ValueError, match="holds a digits teacher already: choose another directory with --out"):
        build(built, QUICK, Console(quiet=True))
    assert files(built) == before


def test_build_says_where_it_wrote(tmp_path: Path):
    out = io.StringIO()
    build(tmp_path / "made", QUICK, Console(file=out, width=500))
    assert f"wrote {tmp_path / 'made' / 'features' / 'digits'} and {tmp_path / 'made' / 'teachers'}" in out.getvalue()


# The embedded ones


def test_the_embedded_feature_net_knows_what_it_never_saw():
    net = DigitsFeatureNet()
    net.load_state_dict(load_file(ASSETS / "features" / "digits" / "model.safetensors"))
    assert accuracy(net.eval(), load_images(DataConfig()).reference) > 0.97


def test_the_embedded_teacher_is_as_near_to_held_out_digits_as_a_small_sample_can_tell():
    """5,000 samples are measured in the benchmark; a thousand must come near to what real digits get."""
    teacher, extractor, splits = load_teacher(TeacherConfig()), load_extractor("digits"), load_images(DataConfig())
    noise, labels = sample_noise(0, range(1000), teacher.shape), sample_labels(0, range(1000), 10)
    grid, velocity = GridConfig().times(12), teacher.velocity(1.0)
    with torch.no_grad():
        states = SOLVERS["dpmpp_3m"].states(velocity, noise, grid, Condition(labels=labels))
        made = to_uint8(last(states))
    reference = Moments.of(extractor(splits.reference.images))
    real = frechet_distance(Moments.of(extractor(splits.train.images)), reference)
    coarse = frechet_distance(Moments.of(extractor(to_uint8(noise))), reference)
    found = frechet_distance(Moments.of(extractor(made)), reference)
    assert found < real + 1.5
    assert found < 0.05 * coarse
