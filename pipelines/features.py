"""Feature nets for FID, behind clean-fid's own interface: images in [0, 255] of one size in, one vector each out.

clean-fid's Inception is used where its weights can be had. For small grey pictures there is an embedded net, trained
on the digits' classes by `hdistill assets build`; a metric's name always says which net made its features.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.artifacts import file_hash
from pipelines.torchvision_ops import declare_missing_operators

FeatureName = Literal["digits", "inception"]
DIGITS_WEIGHTS = Path(__file__).parent / "assets" / "features" / "digits" / "model.safetensors"
_INCEPTION_SIZE = 299


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
class Extractor:
    """Features of uint8 images."""

    name: FeatureName
    size: int
    """Height and width that the net takes; other images go through clean-fid's own resize."""
    model: Callable[[Tensor], Tensor]
    """``(n, 3, size, size)`` float in [0, 255] to ``(n, d)``."""
    fingerprint: str
    """Hash of the net's weights."""

    def __call__(self, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
        """Features of images, grey or in colour."""
        from cleanfid.fid import get_batch_features

        resized = self._resized(np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images)
        # Contiguous channels first: a channels-last view changes the last bits of the features.
        batch = torch.from_numpy(np.ascontiguousarray(resized.transpose(0, 3, 1, 2)))
        return get_batch_features(batch, self.model, torch.device("cpu"))

    def _resized(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n size size 3"]:
        if images.shape[1:3] == (self.size, self.size):
            return images.astype(np.float32)
        from cleanfid.resize import make_resizer

        resize: Any = make_resizer("PIL", False, "bicubic", (self.size, self.size))
        return np.stack([resize(image) for image in images])


def load_extractor(name: FeatureName) -> Extractor:
    """The extractor of a name.

    Raises:
        ValueError: clean-fid's Inception weights are not there and cannot be fetched.
    """
    declare_missing_operators()
    return _digits() if name == "digits" else _inception()


def _digits() -> Extractor:
    net = DigitsFeatureNet()
    net.load_state_dict(load_file(DIGITS_WEIGHTS))
    net.eval().requires_grad_(False)
    return Extractor(name="digits", size=DigitsFeatureNet.size, model=net, fingerprint=file_hash(DIGITS_WEIGHTS))


def _inception() -> Extractor:
    from cleanfid.features import build_feature_extractor

    try:
        model = build_feature_extractor("clean", torch.device("cpu"), use_dataparallel=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            "clean-fid's Inception weights are not on this machine and could not be fetched"
            f" ({str(error).splitlines()[0]}). Put inception-2015-12-05.pt into the system's temporary directory, or"
            " set evaluate.features to digits"
        ) from None
    identity = hashlib.sha256(b"clean-fid inception-2015-12-05").hexdigest()
    return Extractor(name="inception", size=_INCEPTION_SIZE, model=model, fingerprint=identity)
