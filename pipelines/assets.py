"""The embedded default, made by this project's own command: a flow teacher and a feature net for the digits."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from hd_core.ema import update_ema, warmed_decay
from hd_core.networks.dit import DiT, DiTConfig
from hd_core.paths import flatten_mean, interpolate, velocity
from hd_core.random import Draws, fold_in
from hd_core.types import Condition
from pipelines.artifacts import atomic_path
from pipelines.data import DataConfig, ImageSet, load_images, to_model
from pipelines.features import DigitsFeatureNet
from pipelines.progress import bar
from pipelines.teachers import save_native

ASSETS = Path(__file__).parent / "assets"
Progress = Callable[[str, int, int], None]
"""Told what is trained, the step, and the number of steps."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How the embedded teacher and feature net are trained."""

    seed: int = 0
    teacher_steps: int = 6000
    teacher_batch: int = 256
    teacher_rate: float = 2e-3
    width: int = 64
    depth: int = 4
    heads: int = 4
    label_dropout: float = 0.1
    """Share of rows that are trained without a class, for guidance."""
    feature_steps: int = 1500
    feature_batch: int = 128


def build_assets(folder: Path, config: BuildConfig, progress: Progress) -> DigitsFeatureNet:
    """Train both nets on the digits' training split and write them below ``folder``; returns the feature net."""
    digits = load_images(DataConfig()).train
    net = train_features(digits, config, progress)
    with atomic_path(folder / "features" / "digits" / "model.safetensors") as temporary:
        save_file(net.state_dict(), temporary)
    save_native(folder / "teachers" / "digits", train_teacher(digits, config, progress))
    return net


def build(folder: Path, config: BuildConfig, console: Console) -> None:
    """Build the assets with a progress bar, and say where they are.

    Raises:
        ValueError: there are assets already.
    """
    if (folder / "teachers" / "digits").exists():
        raise ValueError(f"{folder} holds a digits teacher already: choose another directory with --out, or delete it")
    with bar(console, "training", config.feature_steps + config.teacher_steps) as show:
        before = {"feature net": 0, "teacher": config.feature_steps}
        net = build_assets(folder, config, lambda name, step, _: show(before[name] + step))
    right = accuracy(net, load_images(DataConfig()).reference)
    console.print(f"the feature net classifies {right:.1%} of the held-out digits", highlight=False)
    console.print(f"wrote {folder / 'features' / 'digits'} and {folder / 'teachers' / 'digits'}", highlight=False)


def train_teacher(digits: ImageSet, config: BuildConfig, progress: Progress) -> DiT:
    """Conditional flow matching on the straight path (Lipman et al. 2023); the average is what is returned."""
    with torch.random.fork_rng():
        torch.manual_seed(fold_in(config.seed, "teacher", "init"))
        net = DiT(DiTConfig(width=config.width, depth=config.depth, heads=config.heads))
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    images, labels = to_model(digits.images), torch.from_numpy(digits.labels)
    for step in range(config.teacher_steps):
        draws = _draws(config.seed, "teacher", step, config.teacher_batch)
        rows = draws.integers("rows", len(images))
        loss = flow_matching_loss(net, images[rows], labels[rows], draws, config.label_dropout)
        _move(optimizer, loss, config.teacher_rate * _cosine(step, config.teacher_steps))
        update_ema(average, net, warmed_decay(0.999, step))
        progress("teacher", step + 1, config.teacher_steps)
    return average


def flow_matching_loss(net: DiT, images: Tensor, labels: Tensor, draws: Draws, label_dropout: float) -> Tensor:
    """``mean |v(x_t, t, c) - (eps - x_0)|^2``; a quarter of the times uniform, the others logit-normal."""
    t = torch.where(draws.uniform("kind") < 0.25, draws.uniform("time"), torch.sigmoid(draws.normal("logit", ())))
    eps = draws.normal("noise", images.shape[1:])
    dropped = draws.uniform("dropout") < label_dropout
    condition = Condition(labels=torch.where(dropped, net.config.num_classes, labels))
    v = net(interpolate(images, eps, t), t, condition)
    return flatten_mean((v - velocity(images, eps)).square()).mean()


def train_features(digits: ImageSet, config: BuildConfig, progress: Progress) -> DigitsFeatureNet:
    """A classifier of the digits, with noise and one-pixel shifts against overfitting."""
    with torch.random.fork_rng():
        torch.manual_seed(fold_in(config.seed, "features", "init"))
        net = DigitsFeatureNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    images, labels = torch.from_numpy(digits.images.copy()).permute(0, 3, 1, 2).float(), torch.from_numpy(digits.labels)
    for step in range(config.feature_steps):
        draws = _draws(config.seed, "features", step, config.feature_batch)
        rows = draws.integers("rows", len(images))
        logits = net.logits(_augmented(images[rows], draws).expand(-1, 3, -1, -1))
        _move(
            optimizer,
            F.cross_entropy(logits, labels[rows], label_smoothing=0.05),
            2e-3 * _cosine(step, config.feature_steps),
        )
        progress("feature net", step + 1, config.feature_steps)
    return net


def _augmented(images: Tensor, draws: Draws) -> Tensor:
    noisy = images + 12.75 * draws.normal("noise", images.shape[1:])
    down, right = (int(draws.integers(tag, 3)[0]) for tag in ("down", "right"))
    return F.pad(noisy, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]


def _draws(seed: int, name: str, step: int, rows: int) -> Draws:
    return Draws(seed=fold_in(seed, name, step), rows=slice(0, rows), total=rows)


def _cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _move(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def accuracy(net: DigitsFeatureNet, images: ImageSet) -> float:
    """Share of images that the feature net classifies right."""
    batch = torch.from_numpy(images.images.copy()).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
    with torch.no_grad():
        return (net.logits(batch).argmax(1).numpy() == images.labels).mean().item()
