"""Where a discriminator looks, as a PNG: pictures under the weights that each tapped layer gave to their tokens.

A weight is shown times the number of tokens, so that 1 is an even share; colours follow its logarithm, the same over
the whole sheet, with 1 in the middle.
"""

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from pipelines.figures import LIGHT, Images, Theme, cell_size, check_images, enlarge, font, png
from pipelines.storage import local_copy

MOST_BYTES = 400_000
_COLUMNS = (8, 6, 4)  # fewer where the file would be too large
_CELL_PIXELS, _LARGEST_CELL_PIXELS = 80, 84
_GAP_PIXELS, _TEXT_PIXELS = 6, 17
_BAR_PIXELS, _RIGHT_PIXELS = 24, 110
_ARRAYS = ("images", "logits", "weights")
_PICTURE_SHARE = 0.22  # how much of the picture shows through the weights

Weights = Float[np.ndarray, "n layers heads tokens"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Some pictures, and what the discriminator said of them."""

    images: Images
    """uint8 (n, h, w, 1 or 3)."""
    logits: Float[np.ndarray, "n outputs"]
    """Large for real; one for each tapped layer, as a rule."""
    weights: Weights
    """Not negative, of sum 1 over the tokens."""

    def __post_init__(self) -> None:
        check_images(self.images)
        for name, array, axes in (("logits", self.logits, 2), ("weights", self.weights, 4)):
            if array.dtype.kind != "f" or array.ndim != axes or 0 in array.shape or len(array) != len(self.images):
                wanted = f"numbers in {axes} axes, {len(self.images)} rows"
                raise ValueError(f"{name} must be {wanted}, not {array.dtype} {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite")
        if self.weights.min() < 0:
            raise ValueError("weights must not be negative")

    @property
    def grid_side(self) -> int:
        """Tokens along one side; 0 where they are not a square number."""
        tokens = self.weights.shape[-1]
        return math.isqrt(tokens) if math.isqrt(tokens) ** 2 == tokens else 0

    @property
    def shares(self) -> Float[np.ndarray, "n layers tokens"]:
        """Weights averaged over the heads, times the number of tokens: 1 is an even share."""
        return self.weights.mean(2) * self.weights.shape[-1]

    @property
    def entropy(self) -> Float[np.ndarray, " layers"]:
        """Mean entropy of a head's weights in each layer, over its maximum: 1 is even, 0 is a single token."""
        tokens = self.weights.shape[-1]
        if tokens == 1:
            return np.ones(self.weights.shape[1])
        weights = self.weights.astype(np.float64)
        entropies = -(weights * np.log(np.clip(weights, 1e-12, None))).sum(-1)
        return entropies.mean((0, 2)) / math.log(tokens)


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What the discriminator of a stage said at its end."""

    fake: Judged
    """Of generated pictures."""
    real: Judged
    """Of real ones."""

    def __post_init__(self) -> None:
        of_fake, of_real = self.fake.weights.shape[1:], self.real.weights.shape[1:]
        if of_fake != of_real or self.fake.logits.shape[1:] != self.real.logits.shape[1:]:
            raise ValueError(f"generated and real pictures differ in layers, heads or tokens: {of_fake}, {of_real}")

    @property
    def grid_side(self) -> int:
        """Tokens along one side; 0 where they are not a square number."""
        return self.fake.grid_side


def read_looks(path: Path) -> Looks:
    """The arrays of a `token_weights.npz`. ValueError says what is wrong with it."""
    try:
        with local_copy(path) as file, np.load(file, allow_pickle=False) as arrays:
            parts = [{name: arrays[f"{kind}_{name}"] for name in _ARRAYS} for kind in ("fake", "real")]
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None
    return Looks(fake=Judged(**parts[0]), real=Judged(**parts[1]))


def weight_sheet(looks: Looks, layers: Sequence[str] = (), *, theme: Theme = LIGHT) -> bytes:
    """A PNG of at most 400 kB: generated pictures above real ones, each over its layers, with their logits.

    `layers` names the tapped layers. ValueError where the tokens do not fill a square.
    """
    if not looks.grid_side:
        raise ValueError(f"{looks.fake.weights.shape[-1]} tokens do not fill a square")
    content = b""
    sheets = [_Sheet(looks, layers, columns, theme).draw() for columns in _COLUMNS]
    # A palette spoils the scale of colours, so it comes after fewer columns.
    for picture in (*sheets, *(sheet.quantize(256, dither=Image.Dither.NONE) for sheet in sheets)):
        content = png(picture)
        if len(content) <= MOST_BYTES:
            return content
    return content


class _Sheet:
    """The drawing of one sheet."""

    def __init__(self, looks: Looks, layers: Sequence[str], columns: int, theme: Theme) -> None:
        self.theme, self.columns, count = theme, columns, looks.fake.weights.shape[1]
        self.blocks = [("generated", looks.fake), ("real", looks.real)]
        self.layers = list(layers) if len(layers) == count else [f"layer {place + 1}" for place in range(count)]
        self.size = cell_size(looks.fake.images, _CELL_PIXELS, _LARGEST_CELL_PIXELS)
        self.left = 14 + max(math.ceil(font(14).getlength(name)) for name in ("generated", *self.layers))
        self.step = self.size[1] + _TEXT_PIXELS + _GAP_PIXELS
        self.octaves = octaves([judged.shares[:columns] for _, judged in self.blocks])

    def draw(self) -> Image.Image:
        """All of it."""
        columns = min(self.columns, max(len(judged.images) for _, judged in self.blocks))
        right = self.left + columns * (self.size[0] + _GAP_PIXELS)
        height = 2 * (len(self.layers) + 1) * self.step + 2 * _GAP_PIXELS
        self.sheet = Image.new("RGB", (right + _RIGHT_PIXELS, height), self.theme.paper)
        self.pen = ImageDraw.Draw(self.sheet)
        for place, (name, judged) in enumerate(self.blocks):
            self._draw_block(name, judged, place * (height // 2) + _GAP_PIXELS)
        self._draw_bar(right + 12, min(height - 60, 320))
        return self.sheet

    def _draw_block(self, name: str, judged: Judged, top: int) -> None:
        own = judged.logits.shape[1] == len(self.layers)
        for row, label in enumerate((name, *self.layers)):
            middle = top + row * self.step + self.size[1] // 2
            self.pen.text((self.left - 10, middle), label, self._ink(row), font(14), anchor="rm")
            for column in range(min(self.columns, len(judged.images))):
                corner = self.left + column * (self.size[0] + _GAP_PIXELS), top + row * self.step
                self.sheet.paste(self._cell(judged, column, row - 1), corner)
                if own or not row:
                    logits = judged.logits[column]
                    self._write_logit(float(logits[row - 1] if row else logits.mean()), corner, row)

    def _write_logit(self, logit: float, corner: tuple[int, int], row: int) -> None:
        below = corner[0] + self.size[0] // 2, corner[1] + self.size[1] + _TEXT_PIXELS // 2 + 1
        self.pen.text(below, f"{round(logit, 2) + 0.0:+.2f}", self._ink(row), font(12), anchor="mm")

    def _ink(self, row: int) -> str:
        return self.theme.muted if row else self.theme.ink

    def _cell(self, judged: Judged, column: int, layer: int) -> Image.Image:
        """A picture, under the weights of a layer unless that is -1."""
        picture = enlarge(judged.images[column], self.size)
        if layer < 0:
            return picture
        side = judged.grid_side
        tokens = colours(judged.shares[column, layer].reshape(side, side), self.octaves)
        weights = Image.fromarray(tokens).resize(self.size, Image.Resampling.NEAREST)
        return Image.blend(weights, picture.convert("L").convert("RGB"), _PICTURE_SHARE)

    def _draw_bar(self, left: int, height: int) -> None:
        """The colours as they are over black pixels, at the left, to white ones, at the right; 1 in the middle."""
        top, exponents = 28, np.linspace(self.octaves, -self.octaves, height)
        bar = Image.fromarray(colours(2 ** exponents[:, None], self.octaves)).resize((_BAR_PIXELS, height))
        pixels = Image.linear_gradient("L").rotate(90).resize(bar.size).convert("RGB")
        self.sheet.paste(Image.blend(bar, pixels, _PICTURE_SHARE), (left, top))
        self.pen.text((left, 10), "weight x tokens", self.theme.ink, font(12), anchor="lm")
        every = math.ceil(self.octaves / 4)
        for exponent in range(-(self.octaves // every) * every, self.octaves + 1, every):
            middle = top + (0.5 - 0.5 * exponent / self.octaves) * (height - 1)
            self.pen.line([(left + _BAR_PIXELS, middle), (left + _BAR_PIXELS + 3, middle)], self.theme.muted)
            text = f"{2**exponent}" if exponent >= 0 else f"1/{2**-exponent}"
            text += " (even)" if exponent == 0 else ""
            self.pen.text((left + _BAR_PIXELS + 6, middle), text, self.theme.muted, font(12), anchor="lm")


def octaves(shares: Sequence[np.ndarray]) -> int:
    """How many doublings of an even share the colours reach, up and down: as the largest share needs, at least 1."""
    largest = max(float(some.max()) for some in shares)
    return max(1, math.ceil(math.log2(max(largest, 1.0)) - 1e-6))


def colours(shares: Float[np.ndarray, "h w"], reach: int) -> UInt8[np.ndarray, "h w 3"]:
    """Viridis over the logarithm of shares, from 1 / 2^reach to 2^reach; what is below has the darkest."""
    exponents = np.log2(np.clip(shares, 2.0**-reach, 2.0**reach))
    rgba = matplotlib.colormaps["viridis"](0.5 + 0.5 * exponents / reach, bytes=True)
    return np.ascontiguousarray(np.asarray(rgba)[..., :3])
