"""The embedded default, made by this project's own command: a flow teacher and a feature net for the digits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from pipelines.artifacts import atomic_path
from pipelines.data import DataConfig, ImageSet, load_images
from pipelines.feature_training import FeatureTraining, accuracy, classes_loss, fit
from pipelines.features import DigitsFeatureNet
from pipelines.progress import bar
from pipelines.teacher_training import TeacherTraining, train
from pipelines.teachers import save_native

ASSETS = Path(__file__).parent / "assets"
Progress = Callable[[str, int, int], None]
"""Told what is trained, the step, and the number of steps."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How the embedded teacher and feature net are trained."""

    seed: int = 0
    teacher: TeacherTraining = field(default_factory=TeacherTraining)
    feature_steps: int = 1500
    feature_batch: int = 128


def build_assets(folder: Path, config: BuildConfig, progress: Progress) -> DigitsFeatureNet:
    """Train both nets on the digits' training split and write them below ``folder``; returns the feature net."""
    digits = load_images(DataConfig()).train
    net = train_features(digits, config, progress)
    with atomic_path(folder / "features" / "digits" / "model.safetensors") as temporary:
        save_file(net.state_dict(), temporary)
    show = partial(_tell, progress, "teacher", config.teacher.num_steps)
    save_native(folder / "teachers" / "digits", train(digits, config.teacher, config.seed, show))
    return net


def build(folder: Path, config: BuildConfig, console: Console) -> None:
    """Build the assets with a progress bar, and say where they are.

    Raises:
        ValueError: there are assets already.
    """
    if (folder / "teachers" / "digits").exists():
        raise ValueError(f"{folder} holds a digits teacher already: choose another directory with --out, or delete it")
    with bar(console, "training", config.feature_steps + config.teacher.num_steps) as show:
        before = {"feature net": 0, "teacher": config.feature_steps}
        net = build_assets(folder, config, lambda name, step, _: show(before[name] + step))
    right = accuracy(net, load_images(DataConfig()).reference)
    console.print(f"the feature net classifies {right:.1%} of the held-out digits", highlight=False)
    console.print(f"wrote {folder / 'features' / 'digits'} and {folder / 'teachers' / 'digits'}", highlight=False)


def _tell(progress: Progress, name: str, steps: int, step: int) -> None:
    progress(name, step, steps)


def train_features(digits: ImageSet, config: BuildConfig, progress: Progress) -> DigitsFeatureNet:
    """A classifier of the digits, with noise and one-pixel shifts against overfitting."""
    training = FeatureTraining(num_steps=config.feature_steps, batch_size=config.feature_batch)
    show = partial(_tell, progress, "feature net", config.feature_steps)
    return fit(DigitsFeatureNet, classes_loss, digits, training, config.seed, show)
