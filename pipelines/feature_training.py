"""Training of feature nets: on classes, or on rebuilding pictures from their noisy selves, which needs none."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.random import Draws, fold_in
from pipelines.artifacts import atomic_folder
from pipelines.data import DataConfig, DataSplits, ImageSet, load_images
from pipelines.features import FeatureNet, FeatureNetConfig, FeatureTask, net_name, save_feature_net
from pipelines.progress import bar

Net = TypeVar("Net", bound=nn.Module)
Loss = Callable[[Net, Tensor, Int64[Tensor, " b"], Draws], Tensor]
"""Of a net, images ``(b, c, s, s)`` in [0, 255], their classes, and the draws of the step."""
Progress = Callable[[int], None]
"""Told how many steps are done."""

_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class FeatureTraining:
    """How a feature net is trained."""

    num_steps: int = 2000
    """Iterations."""
    batch_size: int = 128
    """Images in each."""
    learning_rate: float = 2e-3
    """Greatest learning rate: a cosine down to 0, after 200 steps of warming up."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be at least 1; given {self.num_steps} and {self.batch_size}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError("learning_rate must be positive, and weight_decay must not be negative")


def fit(
    make: Callable[[], Net],
    loss: Loss[Net],
    images: ImageSet,
    config: FeatureTraining,
    seed: int,
    progress: Progress,
) -> Net:
    """A net trained from scratch by AdamW; equal seeds give equal nets."""
    with torch.random.fork_rng():
        torch.manual_seed(fold_in(seed, "features", "init"))
        net = make()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=config.weight_decay, fused=True)
    pixels, labels = torch.from_numpy(images.in_memory().transpose(0, 3, 1, 2).copy()), torch.from_numpy(images.labels)
    rows, steps = slice(0, config.batch_size), config.num_steps
    for step in range(steps):
        draws = Draws(seed=fold_in(seed, "features", step), rows=rows, total=config.batch_size)
        drawn = draws.integers("rows", len(pixels))
        error = loss(net, pixels[drawn].float(), labels[drawn], draws)
        _move(optimizer, error, config.learning_rate * _cosine(step, steps))
        progress(step + 1)
    return net


def classes_loss(net: Any, images: Tensor, labels: Int64[Tensor, " b"], draws: Draws) -> Tensor:
    """Cross-entropy of classes, with noise and one-pixel shifts against overfitting."""
    noisy = images + 12.75 * draws.normal("noise", images.shape[1:])
    return F.cross_entropy(net.logits(_in_colour(shifted(noisy, draws))), labels, label_smoothing=0.05)


def denoise_loss(net: FeatureNet, images: Tensor, _labels: Int64[Tensor, " b"], draws: Draws) -> Tensor:
    """Mean squared error of pictures rebuilt from noisy ones; each row's noise is up to a quarter of the range."""
    clean = shifted(images, draws)
    level = draws.uniform("level", 0.0, 63.75)[:, None, None, None]
    noisy = clean + level * draws.normal("noise", images.shape[1:])
    return F.mse_loss(net.rebuilt(_in_colour(noisy)), clean / 127.5 - 1)


def shifted(images: Float[Tensor, "b c s s"], draws: Draws) -> Float[Tensor, "b c s s"]:
    """All images of a step moved by the same -1, 0 or 1 pixel down and right, black coming in."""
    side = images.shape[-1]
    down, right = (int(draws.integers(tag, 3)[0]) for tag in ("down", "right"))
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + side, right : right + side]


def accuracy(net: Any, images: ImageSet) -> float:
    """Share of images whose class a net tells."""
    with torch.no_grad():
        told = [net.logits(_in_colour(batch)).argmax(1) for batch in _batches(images)]
    return float((torch.cat(told).numpy() == images.labels).mean())


def reconstruction_error(net: FeatureNet, images: ImageSet) -> float:
    """Root mean square difference, in [-1, 1], between images and what is rebuilt from their features."""
    with torch.no_grad():
        squares = [(net.rebuilt(_in_colour(batch)) - (batch / 127.5 - 1)).square() for batch in _batches(images)]
    return math.sqrt(sum(float(part.double().sum()) for part in squares) / images.in_memory().size)


def network(images: ImageSet, task: FeatureTask) -> FeatureNetConfig:
    """The net for a set of images: halved until 4 pixels are left, or an odd number.

    Raises:
        ValueError: they are not square, their side is not a multiple of 4, or they have no classes to tell apart.
    """
    channels, height, width = images.shape
    if height != width or height % 4:
        raise ValueError(
            "a feature net takes square images, of a side that is a multiple of 4; these are"
            f" {height}x{width}: set data.image_size"
        )
    if task == "classes" and images.num_classes < 2:
        raise ValueError("the images have no classes to tell apart: train with --task denoise")
    assert channels == 1 or channels == 3
    half = height > 16
    side, widths = height // 2 if half else height, [32]
    while side > 4 and side % 2 == 0:
        side, widths = side // 2, [*widths, min(2 * widths[-1], 96)]
    return FeatureNetConfig(
        size=height,
        channels=channels,
        widths=tuple(widths),
        stem="half" if half else "full",
        task=task,
        num_classes=images.num_classes,
    )


def make_feature_net(
    folder: Path, splits: DataSplits, task: FeatureTask, config: FeatureTraining, seed: int, progress: Progress
) -> dict[str, float]:
    """Train a net on the training images into a new folder; returns how good it is on the held-out ones.

    Raises:
        ValueError: the folder exists already, or the images do not fit the task.
    """
    net_name(folder)
    architecture = network(splits.train, task)
    loss = classes_loss if task == "classes" else denoise_loss
    with atomic_folder(folder) as temporary:
        net = fit(lambda: FeatureNet(architecture), loss, splits.train, config, seed, progress)
        quality = _quality(net.eval(), splits.reference)
        about = {"data": splits.fingerprint, "seed": seed, "training": asdict(config), **quality}
        save_feature_net(temporary, net, about)
    return quality


def learn(
    folder: Path, data: DataConfig, task: FeatureTask, config: FeatureTraining, seed: int, console: Console
) -> None:
    """Train a net with a progress bar, and say how good it is and where.

    Raises:
        ValueError: the folder exists already, or the images do not fit the task.
    """
    splits = load_images(data)
    splits.say_skipped(console)
    with bar(console, "train feature net", config.num_steps) as show:
        quality = make_feature_net(folder, splits, task, config, seed, show)
    console.print(_in_words(quality, len(splits.reference)), highlight=False)
    console.print(f"wrote {folder}: name it in evaluate.features or evaluate.second_features", highlight=False)


def _quality(net: FeatureNet, held_out: ImageSet) -> dict[str, float]:
    if net.config.task == "classes":
        return {"accuracy": accuracy(net, held_out)}
    return {"reconstruction_error": reconstruction_error(net, held_out)}


def _in_words(quality: dict[str, float], count: int) -> str:
    if "accuracy" in quality:
        return f"the feature net classifies {quality['accuracy']:.1%} of the {count:,} held-out images"
    error = quality["reconstruction_error"]
    return f"the feature net rebuilds the {count:,} held-out images with an RMS error of {error:.3f}, in [-1, 1]"


def _in_colour(images: Float[Tensor, "b c s s"]) -> Float[Tensor, "b 3 s s"]:
    return images.expand(-1, 3, -1, -1)


def _batches(images: ImageSet) -> Iterator[Float[Tensor, "b c s s"]]:
    pixels = torch.from_numpy(images.in_memory().transpose(0, 3, 1, 2).copy())
    return (batch.float() for batch in pixels.split(_AT_ONCE))


def _cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _move(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
