"""A feature net behind clean-fid's own interface: images in [0, 255] of one size in, one vector each out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.lazy import LazyPixels
from pipelines.pictures import Picture, Pixels

INCEPTION_SIZE = 299
_PIXELS_AT_ONCE = 32 * INCEPTION_SIZE**2
"""32 pictures for Inception, as clean-fid takes them by default: batches of other sizes change the last bits."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Features of uint8 images."""

    name: str
    """What stands beside a metric: digits, inception, or the name of the net's folder."""
    size: int
    """Height and width that the net takes; other images go through clean-fid's own resize."""
    model: Callable[[Tensor], Tensor]
    """``(n, 3, size, size)`` float in [0, 255] to ``(n, d)``."""
    fingerprint: str
    """Hash of the net's weights."""
    shape: tuple[int, int, int] | None = None
    """Channels, height and width of the only images that the net takes; ``None``: any."""
    device: str = "cpu"
    """Where the net is."""
    logits: Callable[[Tensor], Tensor] | None = None
    """From features ``(n, d)``, on the CPU, to logits of the net's classes ``(n, k)``; ``None``: it knows none."""

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError where images of (channels, height, width) are not for this net."""
        if self.shape not in (None, shape):
            raise ValueError(
                f"the feature net {self.name} takes images of (channels, height, width) {self.shape}; these are"
                f" {shape}: train one on them with `hdistill features`"
            )

    def __call__(self, images: Pixels | LazyPixels | Sequence[Picture]) -> Float[np.ndarray, "n d"]:
        """Features of images, grey or in colour, a few at once; those of a sequence may differ in size."""
        step = self.rows_at_once
        parts = [self._features(images[start : start + step]) for start in range(0, len(images), step)]
        return np.concatenate(parts)

    @property
    def rows_at_once(self) -> int:
        """Images that the net is given together."""
        return max(1, _PIXELS_AT_ONCE // self.size**2)

    def _features(self, images: Pixels | Sequence[Picture]) -> Float[np.ndarray, "n d"]:
        for image in images:
            height, width, channels = image.shape
            self.check((channels, height, width))
        return self.of_resized(np.stack([resized(image, self.size) for image in images]))

    def of_resized(self, images: Float[np.ndarray, "n 3 size size"]) -> Float[np.ndarray, "n d"]:
        """Features of images that have the net's size."""
        from cleanfid.fid import get_batch_features

        # Contiguous channels first, as clean-fid has them: a view of another layout changes the last bits.
        return get_batch_features(torch.from_numpy(np.ascontiguousarray(images)), self.model, torch.device(self.device))


def resized(image: Picture, size: int) -> Float[np.ndarray, "3 size size"]:
    """One image, grey or in colour, as a net of that size takes it: in clean-fid's own resize."""
    colours = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    if colours.shape[:2] != (size, size):
        from cleanfid.resize import make_resizer

        resize: Any = make_resizer("PIL", False, "bicubic", (size, size))
        colours = resize(colours)
    return colours.astype(np.float32).transpose(2, 0, 1)
