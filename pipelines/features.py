"""Feature nets for FID, behind clean-fid's own interface: images in [0, 255] of one size in, one vector each out.

clean-fid's Inception is used where its weights can be had. For the digits there is an embedded net, trained on their
classes by `hdistill assets build`; for other pictures, `hdistill features` trains one into a folder. A metric's name
always says which net made its features.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.artifacts import file_hash
from pipelines.extractor import Extractor
from pipelines.inception import load_inception
from pipelines.model_files import read_object
from pipelines.torchvision_ops import declare_missing_operators

INCEPTION = "inception"
BUILT_IN = ("digits", INCEPTION)
"""Names of the nets that are no folder."""
FeatureTask = Literal["classes", "denoise"]
DIGITS_WEIGHTS = Path(__file__).parent / "assets" / "features" / "digits" / "model.safetensors"
WEIGHTS = "model.safetensors"


class DigitsFeatureNet(nn.Module):
    """A small convolutional classifier of 8x8 digits; the features are what its last layer reads.

    Called as clean-fid calls an extractor: ``(n, 3, 8, 8)`` float in [0, 255] to ``(n, 32)``.
    """

    size = 8

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, padding=1, stride=2),
            nn.SiLU(),
        )
        self.features = nn.Linear(256, 32)
        self.classes = nn.Linear(32, 10)

    def forward(self, images: Float[Tensor, "n 3 8 8"]) -> Float[Tensor, "n 32"]:
        grey = images.mean(1, keepdim=True) / 127.5 - 1
        return self.features(self.convolutions(grey).flatten(1))

    def logits(self, images: Float[Tensor, "n 3 8 8"]) -> Float[Tensor, "n 10"]:
        """Class logits, for training."""
        return self.classes(F.silu(self(images)))


@dataclass(frozen=True, kw_only=True)
class FeatureNetConfig:
    """What a `FeatureNet` looks like."""

    size: int
    """Side of the square images that it takes."""
    channels: Literal[1, 3]
    """1: grey. 3: colour."""
    widths: tuple[int, ...]
    """Channels after each convolution; the first is ``stem``'s, each further one is 3x3 and halves the side."""
    stem: Literal["full", "half"] = "full"
    """full: the first convolution is 3x3 and keeps the side. half: it is 5x5 and halves it, at half the cost."""
    features: int = 64
    """Length of the feature vector."""
    task: FeatureTask = "classes"
    """classes: the features tell classes apart. denoise: a picture is rebuilt from the features of its noisy self."""
    num_classes: int = 0
    """Classes that it tells apart; unused by denoise."""

    def __post_init__(self) -> None:
        if self.task not in get_args(FeatureTask):
            raise ValueError(f"task must be classes or denoise; given {self.task!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3; given {self.channels}")
        if self.stem not in ("full", "half"):
            raise ValueError(f"stem must be full or half; given {self.stem!r}")
        if not self.widths or min(self.widths) < 1 or self.features < 1:
            raise ValueError("widths must hold at least one width; widths and features must be at least 1")
        if self.size < 1 or self.size % self.halvings:
            raise ValueError(
                f"size must be a multiple of {self.halvings}, for {len(self.widths)} widths; given {self.size}"
            )
        if self.task == "classes" and self.num_classes < 2:
            raise ValueError(f"the task classes needs at least 2 classes; given {self.num_classes}: take denoise")

    @property
    def halvings(self) -> int:
        """How many times smaller the last convolution's side is."""
        return 2 ** (len(self.widths) - (self.stem == "full"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.size, self.size


class FeatureNet(nn.Module):
    """A small convolutional net whose features are what its last part reads: a classifier, or a decoder of pictures.

    Called as clean-fid calls an extractor: ``(n, 3, size, size)`` float in [0, 255] to ``(n, features)``.
    """

    def __init__(self, config: FeatureNetConfig) -> None:
        super().__init__()
        self.config = config
        self._side = config.size // config.halvings
        full, first = config.stem == "full", config.widths[0]
        stem = nn.Conv2d(config.channels, first, 3 if full else 5, stride=1 if full else 2, padding=1 if full else 2)
        self.convolutions = nn.Sequential(stem, nn.SiLU())
        for before, width in pairwise(config.widths):
            self.convolutions.extend([nn.Conv2d(before, width, 3, stride=2, padding=1), nn.SiLU()])
        flat = config.widths[-1] * self._side**2
        self.features = nn.Linear(flat, config.features)
        if config.task == "classes":
            self.classes = nn.Linear(config.features, config.num_classes)
        else:
            self.decoder = _decoder(config, flat, self._side)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        seen = images.mean(1, keepdim=True) if self.config.channels == 1 else images
        return self.features(self.convolutions(seen / 127.5 - 1).flatten(1))

    def logits(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n classes"]:
        """Class logits, for training."""
        return self.classes(F.silu(self(images)))

    def rebuilt(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n c s s"]:
        """The pictures without their noise, in [-1, 1], from the features alone, for training."""
        return self.decoder(F.silu(self(images)))


def _decoder(config: FeatureNetConfig, flat: int, side: int) -> nn.Sequential:
    """The mirror of the convolutions, from the features on."""
    unflatten = nn.Unflatten(1, (config.widths[-1], side, side))
    layers: list[nn.Module] = [nn.Linear(config.features, flat), unflatten, nn.SiLU()]
    for before, width in pairwise(config.widths[::-1]):
        layers += [nn.ConvTranspose2d(before, width, 4, stride=2, padding=1), nn.SiLU()]
    last = nn.Conv2d(config.widths[0], config.channels, 3, padding=1)
    if config.stem == "half":
        last = nn.ConvTranspose2d(config.widths[0], config.channels, 4, stride=2, padding=1)
    return nn.Sequential(*layers, last)


def save_feature_net(folder: Path, net: FeatureNet, about: dict[str, Any]) -> None:
    """Write config.json, with more that is worth knowing about the net, and the weights into a folder that exists."""
    config = {"_class_name": "FeatureNet", **asdict(net.config), **about}
    (folder / "config.json").write_text(json.dumps(config, indent=1, allow_nan=False) + "\n")
    save_file(net.state_dict(), folder / WEIGHTS)


def load_feature_net(folder: Path) -> FeatureNet:
    """The net in a folder, in evaluation mode.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        names = ", ".join(BUILT_IN)
        raise ValueError(f"no feature net at {folder}: give {names}, or a folder that `hdistill features` made")
    values = read_object(folder / "config.json")
    if values.get("_class_name") != "FeatureNet":
        raise ValueError(f"{folder} holds a {values.get('_class_name')}, not a FeatureNet")
    known = {field.name: values[field.name] for field in fields(FeatureNetConfig) if field.name in values}
    try:
        net = FeatureNet(FeatureNetConfig(**{**known, "widths": tuple(known.get("widths", ()))}))
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (TypeError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the feature net in {folder} is damaged: {str(error).splitlines()[0]}") from None
    return net.eval().requires_grad_(False)


def load_extractor(name: str, device: str = "cpu") -> Extractor:
    """The extractor of a name, of a folder that `hdistill features` made, or of a file of Inception's weights.

    Raises:
        ValueError: there is none, or Inception's weights are not there and cannot be fetched.
    """
    declare_missing_operators()
    if name == INCEPTION or name.endswith(".pt"):
        return load_inception("" if name == INCEPTION else name, device)
    return _digits(device) if name == "digits" else _own(Path(name).expanduser(), device)


def net_name(folder: Path) -> str:
    """What a net in a folder is called. ValueError where that is another net's name."""
    name = folder.resolve().name
    if name in BUILT_IN:
        raise ValueError(f"a feature net's folder must not be called {name}, which names another net; given {folder}")
    return name


def _own(folder: Path, device: str) -> Extractor:
    net, name = load_feature_net(folder).to(device), net_name(folder)
    return Extractor(
        name=name,
        size=net.config.size,
        model=net,
        fingerprint=file_hash(folder / WEIGHTS),
        shape=net.config.shape,
        device=device,
        logits=_last_layer(net.classes) if net.config.task == "classes" else None,
    )


def _digits(device: str) -> Extractor:
    net = DigitsFeatureNet()
    net.load_state_dict(load_file(DIGITS_WEIGHTS))
    net.eval().requires_grad_(False).to(device)
    return Extractor(
        name="digits",
        size=DigitsFeatureNet.size,
        model=net,
        fingerprint=file_hash(DIGITS_WEIGHTS),
        device=device,
        logits=_last_layer(net.classes),
    )


def _last_layer(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """What a net of ours does after its features."""
    return lambda features: layer(F.silu(features.to(layer.weight.device))).cpu()
