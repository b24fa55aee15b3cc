"""Teachers of one's own: folders that load, training that repeats and resumes, and refusals that say what to do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hd_core.networks.dit import DiT
from hd_core.objectives.flow_matching import FlowMatching
from hd_core.step import OptimizerConfig
from hd_core.types import Condition
from pipelines import teacher_training
from pipelines.data import DataSplits, ImageSet, to_model
from pipelines.run import Run
from pipelines.teacher_training import TeacherTraining, make_teacher, train
from pipelines.teachers import EMBEDDED, TeacherConfig, load_teacher
from tests.oracles import points
from tests.pipelines.tiny import hdistill, open_run, tiny_recipe, tree

SMALL = TeacherTraining(patch_size=4, width=8, depth=1, heads=2, num_steps=6, batch_size=8, checkpoint_every=2)
Watcher = Callable[[int], None]


def images_of(count: int, side: int = 8, channels: int = 1, classes: int = 3) -> ImageSet:
    """Pictures whose class is their brightness."""
    labels = np.arange(count) % max(classes, 1)
    images = np.random.default_rng(0).integers(0, 40, (count, side, side, channels), dtype=np.uint8)
    images += (100 * labels).astype(np.uint8)[:, None, None, None]
    return ImageSet(images=images, labels=labels * (classes > 0), num_classes=classes)


def splits_of(name: str = "bright", **shape: int) -> DataSplits:
    return DataSplits(train=images_of(30, **shape), reference=images_of(12, **shape), fingerprint=name)


def made(
    folder: Path,
    config: TeacherTraining = SMALL,
    splits: DataSplits | None = None,
    seed: int = 0,
    progress: Watcher = lambda _: None,
) -> bool:
    return make_teacher(folder, splits or splits_of(), config, seed, progress)


def weights(folder: Path) -> str:
    return tree(folder)["transformer/diffusion_pytorch_model.safetensors"]


def stop_at(step: int) -> Watcher:
    def progress(at: int) -> None:
        if at == step:
            raise KeyboardInterrupt

    return progress


# What is made


def test_the_folder_is_a_teacher(tmp_path: Path):
    assert made(tmp_path / "mine", splits=splits_of(side=12, channels=3))
    teacher = load_teacher(TeacherConfig(path=str(tmp_path / "mine")))
    assert teacher.shape == (3, 12, 12) and teacher.num_classes == 3 and teacher.feature_widths == [8]
    assert teacher.null_condition is not None and teacher.null_condition.labels is not None
    assert teacher.null_condition.labels.tolist() == [3]
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"mine"}, "neither checkpoints nor temporary folders stay"


def test_it_is_the_average_of_what_was_trained():
    """Longhand from the weights of every step: warmed decay ``min(decay, (1 + step) / (10 + step))``."""
    seen: list[dict[str, Tensor]] = []
    step = teacher_training.train_step

    def watched(state: Any, *more: Any, **options: Any) -> Any:
        logged = step(state, *more, **options)
        seen.append({k: v.clone() for k, v in state.players["student"].network.state_dict().items()})
        return logged

    config = replace(SMALL, ema_decay=0.15, optimizer=OptimizerConfig(learning_rate=1e-2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_training, "train_step", watched)
        found = train(images_of(30), config, 0, lambda _: None).state_dict()
    start = teacher_training._start(SMALL.network(images_of(30)), SMALL, 0, "cpu").average.state_dict()
    for key, average in start.items():
        for number, now in enumerate(seen):
            decay = min(0.15, (1 + number) / (10 + number))
            average = decay * average + (1 - decay) * now[key]
        torch.testing.assert_close(found[key], average, rtol=1e-5, atol=1e-7)
    assert (found["output.weight"] - seen[-1]["output.weight"]).abs().max() > 1e-5


def test_training_brings_the_velocity_to_the_images():
    """Of single pictures: at ``t = 1`` the data end ``noise - v`` is the picture of the class that is asked for."""
    splits = splits_of(side=4)
    flat = ImageSet(images=splits.train.images // 100 * 100, labels=splits.train.labels, num_classes=3)
    optimizer = OptimizerConfig(learning_rate=1e-2, decay="cosine")
    objective = FlowMatching(uniform_share=1.0)
    config = replace(SMALL, num_steps=200, batch_size=32, optimizer=optimizer, objective=objective, ema_decay=0.9)
    net = train(flat, config, 0, lambda _: None)
    noise, labels = points(30, 1, 4, 4).float(), torch.arange(30) % 3
    with torch.no_grad():
        found = noise - net(noise, torch.ones(30), Condition(labels=labels))
        without = noise - net(noise, torch.ones(30), Condition(labels=torch.full((30,), 3)))
    expected = to_model(flat.images)[:3].mean((1, 2, 3))
    by_class = torch.stack([found[labels == label].mean() for label in range(3)])
    torch.testing.assert_close(by_class, expected, rtol=0, atol=0.15)
    assert (without.mean() - expected.mean()).abs() < 0.25, "without a class: the mean of all"


def test_the_same_seed_makes_the_same_teacher_and_another_another(tmp_path: Path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(len(name))
        made(tmp_path / name, seed=seed)
    assert weights(tmp_path / "one") == weights(tmp_path / "two") != weights(tmp_path / "three")


def test_images_without_classes(tmp_path: Path):
    assert made(tmp_path / "mine", splits=splits_of(classes=0))
    teacher = load_teacher(TeacherConfig(path=str(tmp_path / "mine")))
    assert teacher.num_classes == 0 and teacher.null_condition is None
    with torch.no_grad():
        v = teacher.velocity()(
            torch.randn(4, *teacher.shape), torch.full((4,), 0.5), Condition(labels=torch.zeros(4).long())
        )
    assert v.shape == (4, 1, 8, 8) and v.isfinite().all()


# Again


def test_the_second_time_it_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "mine")
    before = tree(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(teacher_training, "train", refuse)
    assert not made(tmp_path / "mine")
    assert not made(tmp_path / "mine", replace(SMALL, checkpoint_every=5)), "which changes no result"
    assert tree(tmp_path) == before


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"config": replace(SMALL, width=16)}, "training.width: 8 there, 16 here"),
    "dropout": (
        {"config": replace(SMALL, objective=FlowMatching(label_dropout=0.5))},
        "training.objective.label_dropout: 0.1 there, 0.5 here",
    ),
    "rate": (
        {"config": replace(SMALL, optimizer=OptimizerConfig(learning_rate=3e-3))},
        "training.optimizer.learning_rate: 0.002 there, 0.003 here",
    ),
    "seed": ({"seed": 7}, "seed: 0 there, 7 here"),
    "data": ({"splits": splits_of("dark")}, "data: bright there, dark here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused_by_name(tmp_path: Path, other: str):
    changes, words = OTHERS[other]
    made(tmp_path / "mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError) as caught:
        made(tmp_path / "mine", **changes)
    said = str(caught.value)
    assert words in said and str(tmp_path / "mine") in said and "\n" not in said
    assert said.endswith("Name another teacher.path") and "--run-dir" not in said
    assert tree(tmp_path) == before


def test_other_settings_do_not_go_on_from_a_half_trained_teacher(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "mine", progress=stop_at(5))
    with pytest.raises(ValueError, match=r"training\.width: 8 there, 16 here") as caught:
        made(tmp_path / "mine", replace(SMALL, width=16))
    assert f"remove {tmp_path / 'mine.training'}" in str(caught.value) and "--run-dir" not in str(caught.value)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("by hand")
    with pytest.raises(ValueError, match=r"mine is not empty and holds no teacher of .hdistill teacher.: name another"):
        made(tmp_path / "mine")
    assert tree(tmp_path).keys() == {"mine/thesis.tex"}


def test_an_empty_folder_is_taken(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    assert made(tmp_path / "mine")


# Interruption


@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, step: int):
    """Before the first checkpoint, at one, after one, and when all is trained."""
    made(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "mine", progress=stop_at(step))
    assert not (tmp_path / "mine").exists()
    steps: list[int] = []
    assert made(tmp_path / "mine", progress=steps.append)
    assert steps == list(range(step - step % 2 + 1, 7))
    assert weights(tmp_path / "mine") == weights(tmp_path / "whole")
    assert not (tmp_path / "mine.training").exists()


@pytest.mark.parametrize("victim", ["save_native", "write_json", "remove_checkpoints"])
def test_a_kill_at_the_end_loses_nothing(tmp_path: Path, victim: str):
    made(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(teacher_training, victim, killed)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "mine")
    assert made(tmp_path / "mine") == (victim != "remove_checkpoints")
    assert weights(tmp_path / "mine") == weights(tmp_path / "whole")


@pytest.mark.parametrize("num_steps", [6, 7])
def test_divergence_is_one_line_and_makes_no_teacher(tmp_path: Path, num_steps: int):
    optimizer = OptimizerConfig(learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"the teacher's loss is (nan|inf) at step \d") as caught:
        made(tmp_path / "mine", replace(SMALL, optimizer=optimizer, num_steps=num_steps, checkpoint_every=50))
    assert "\n" not in str(caught.value) and "learning_rate helps" in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_no_checkpoint_holds_a_diverged_teacher(tmp_path: Path):
    with pytest.raises(FloatingPointError):
        made(tmp_path / "mine", replace(SMALL, optimizer=OptimizerConfig(learning_rate=1e30)))
    assert not list((tmp_path / "mine.training").glob("step-0000000[4-9]*"))


# Settings


def test_images_that_a_dit_cannot_take_are_refused():
    wide = ImageSet(images=np.zeros((4, 8, 12, 1), np.uint8), labels=np.zeros(4, np.int64), num_classes=0)
    with pytest.raises(ValueError, match=r"a DiT needs square images; these are 8x12: set data\.image_size"):
        SMALL.network(wide)
    with pytest.raises(ValueError, match="image_size 10 is not a multiple of patch_size 4"):
        SMALL.network(images_of(4, side=10))


@pytest.mark.parametrize(
    "name", ["num_steps", "batch_size", "checkpoint_every", "patch_size", "width", "depth", "heads"]
)
def test_a_size_of_0_is_refused_by_name(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; given 0"):
        TeacherTraining(**{name: 0})  # pyright: ignore[reportArgumentType]


def test_the_networks_size_is_the_settings_and_the_images():
    config = replace(SMALL, depth=2).network(images_of(4, side=12, channels=3))
    assert isinstance(DiT(config), DiT)
    shape = (config.image_size, config.channels, config.patch_size, config.width, config.depth, config.heads)
    assert shape == (12, 3, 4, 8, 2, 2) and config.num_classes == 3


# The command


RECIPE = """\
teacher: {path: PATH}
teacher_training: {patch_size: 4, width: 8, depth: 1, heads: 2, num_steps: 3, batch_size: 8}
stages:
  sfd_1:
    objective: {name: sfd, intervals: 1}
"""


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.process.available_cpus", lambda: 1)


def recipe_with(folder: Path, path: object) -> Path:
    (folder / "own.yaml").write_text(RECIPE.replace("PATH", str(path)))
    return folder / "own.yaml"


def test_a_recipe_that_trains_no_teacher_is_told_how(tmp_path: Path, _one_thread: None):
    result = hdistill("teacher", "digits")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: this recipe trains no teacher: give it teacher_training, such as {width: 64, depth: 4}"
    ]


def test_the_command_makes_it_then_finds_it(tmp_path: Path, _one_thread: None):
    recipe = recipe_with(tmp_path, tmp_path / "teachers" / "mine")
    first, second = hdistill("teacher", recipe), hdistill("teacher", recipe)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert "wrote " in first.output and "there already: " in second.output
    training = json.loads((tmp_path / "teachers" / "mine" / "training.json").read_text())
    assert training["training"]["width"] == 8
    other = hdistill("teacher", recipe, "--set", "teacher_training.num_steps=4")
    assert other.exit_code == 2 and len(other.stderr.splitlines()) == 1
    assert "training.num_steps: 3 there, 4 here" in other.stderr


def test_a_recipe_knows_its_own_teacher(tmp_path: Path, _one_thread: None):
    path = tmp_path / "mine"
    run: Run = open_run(tiny_recipe(tmp_path, f"teacher.path={path}", "teacher_training={width: 8}"), tmp_path / "run")
    with pytest.raises(ValueError, match=f"the teacher {path} is not trained yet: run `hdistill teacher`"):
        _ = run.teacher
    made(path)
    assert run.teacher.shape == (1, 8, 8)


def test_the_name_of_an_embedded_teacher_is_refused(tmp_path: Path, _one_thread: None, monkeypatch: pytest.MonkeyPatch):
    """It would be loaded instead of what was trained."""
    monkeypatch.chdir(tmp_path)
    before = tree(EMBEDDED)
    result = hdistill("teacher", recipe_with(tmp_path, "digits"))
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: teacher.path 'digits' is the name of an embedded teacher: name a folder, such as ./digits"
    ]
    assert not (tmp_path / "digits").exists() and tree(EMBEDDED) == before


def test_a_tilde_is_the_home_for_the_one_who_trains_and_the_one_who_loads(
    tmp_path: Path, _one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert hdistill("teacher", recipe_with(tmp_path, "~/mine")).exit_code == 0
    assert load_teacher(TeacherConfig(path="~/mine")).num_classes == 10
    assert not (tmp_path / "~").exists()
