"""Pictures made of pictures, as PNG bytes: sample grids, and the same noises through every generator.

They are drawn pixel by pixel with Pillow, so that an 8x8 digit stays sharp. Colours are those of Okabe and Ito, which
people with any common colour blindness can tell apart.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

Images = UInt8[np.ndarray, "k h w c"]
Labels = Int[np.ndarray, " k"]

GRID_COLUMNS, GRID_ROWS = 10, 8
SHEET_COLUMNS = 16
_CELL_PIXELS = 48  # a picture is enlarged by the whole factor that comes nearest to this
_LARGEST_CELL_PIXELS = 96
_GAP_PIXELS = 3
_HEAD_PIXELS = 26
_BOTH_GREY = (125, 125, 125, 255)  # about 4 to 1 on white and on the dark page alike


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a page, as hexadecimal RGB."""

    paper: str
    """Background."""
    ink: str
    """Text, and the teacher's lines."""
    muted: str
    """Second text and axes; at least 4.5 to 1 on the paper."""
    rule: str
    """Grid lines."""
    students: tuple[str, ...]
    """Lines of the students, or curves of the stages, in order."""


LIGHT = Theme(
    paper="#ffffff",
    ink="#1d2430",
    muted="#5b6472",
    rule="#e3e6eb",
    students=("#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9"),
)
DARK = Theme(
    paper="#161a21",
    ink="#e6e9ef",
    muted="#9aa3b2",
    rule="#2b313c",
    students=("#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00", "#F0E442"),
)


def sample_grid(images: Images, labels: Labels) -> bytes:
    """A PNG of up to 10 columns and 8 rows of samples, on a transparent ground.

    From 5 to 10 classes: a column a class, its label above. Otherwise: the first 80 samples, sorted by label.
    """
    check_samples(images, labels)
    classes, counts = np.unique(labels, return_counts=True)
    if 5 <= len(classes) <= GRID_COLUMNS:
        columns = [np.flatnonzero(labels == label)[:GRID_ROWS] for label in classes]
        cells = {(row, column): index for column, ids in enumerate(columns) for row, index in enumerate(ids)}
        return _paste_grid(images, cells, [str(label) for label in classes], min(GRID_ROWS, int(counts.max())))
    order = np.argsort(labels[: GRID_COLUMNS * GRID_ROWS], kind="stable")
    cells = {divmod(place, GRID_COLUMNS): index for place, index in enumerate(order)}
    return _paste_grid(images, cells, [""] * min(GRID_COLUMNS, len(order)), math.ceil(len(order) / GRID_COLUMNS))


def comparison_sheet(
    entries: Sequence[tuple[str, str, Images]], labels: Labels, *, theme: Theme = LIGHT, columns: int = SHEET_COLUMNS
) -> bytes:
    """A PNG with a row for each generator and a column for each noise.

    `entries` are (name, note, images) of the same noises in the same order, at least one; the note stands at the right
    of the row. The class stands above the column.
    """
    picks = spread_over_classes(labels, columns)
    strips = [_strip(images[picks]) for _, _, images in entries]
    text_font = font(15)
    left = max(math.ceil(text_font.getlength(name)) for name, _, _ in entries) + 16
    right = max(math.ceil(text_font.getlength(note)) for _, note, _ in entries) + 16
    width, height = (max(sizes) for sizes in zip(*(strip.size for strip in strips), strict=True))
    step = height + 2 * _GAP_PIXELS
    sheet = Image.new("RGB", (left + width + right, _HEAD_PIXELS + len(strips) * step), theme.paper)
    draw = ImageDraw.Draw(sheet)
    for place, label in enumerate(labels[picks]):
        middle = left + (place + 0.5) * (width + _GAP_PIXELS) / len(picks) - _GAP_PIXELS / 2
        draw.text((middle, 12), str(label), theme.muted, text_font, anchor="mm")
    for place, (strip, (name, note, _)) in enumerate(zip(strips, entries, strict=True)):
        top = _HEAD_PIXELS + place * step
        sheet.paste(strip, (left, top), strip)
        draw.text((left - 12, top + height // 2), name, theme.ink, text_font, anchor="rm")
        draw.text((left + width + 12, top + height // 2), note, theme.muted, text_font, anchor="lm")
    return png(sheet)


def spread_over_classes(labels: Labels, count: int) -> Int[np.ndarray, " picks"]:
    """Indices of `count` samples, sorted by label: the first of every class, then the second of every class, and on."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange(np.count_nonzero(labels == label))
    picks = np.lexsort((labels, turn))[:count]
    return picks[np.lexsort((picks, labels[picks]))]


def check_samples(images: np.ndarray, labels: np.ndarray) -> None:
    """ValueError unless `images` is uint8 (k, h, w, 1 or 3) with k > 0 and `labels` is integer (k,)."""
    check_images(images)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be integers ({len(images)},), not {labels.dtype} {labels.shape}")


def check_images(images: np.ndarray) -> None:
    """ValueError unless `images` is uint8 (k, h, w, 1 or 3) with k > 0."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 (k, h, w, 1 or 3), not {images.dtype} {images.shape}")


def _paste_grid(images: Images, cells: Mapping[tuple[int, int], int], heads: Sequence[str], rows: int) -> bytes:
    width, height = cell_size(images)
    top = _HEAD_PIXELS if any(heads) else 0
    size = (len(heads) * (width + _GAP_PIXELS) - _GAP_PIXELS, top + rows * (height + _GAP_PIXELS) - _GAP_PIXELS)
    grid = Image.new("RGBA", size, (0, 0, 0, 0))
    for (row, column), index in cells.items():
        grid.paste(
            enlarge(images[index], (width, height)),
            (column * (width + _GAP_PIXELS), top + row * (height + _GAP_PIXELS)),
        )
    draw = ImageDraw.Draw(grid)
    for column, head in enumerate(heads):
        draw.text((column * (width + _GAP_PIXELS) + width // 2, 11), head, _BOTH_GREY, font(18), anchor="mm")
    return png(grid)


def _strip(images: Images) -> Image.Image:
    """Pictures side by side, a transparent gap between them."""
    width, height = cell_size(images)
    strip = Image.new("RGBA", (len(images) * (width + _GAP_PIXELS) - _GAP_PIXELS, height), (0, 0, 0, 0))
    for place, image in enumerate(images):
        strip.paste(enlarge(image, (width, height)), (place * (width + _GAP_PIXELS), 0))
    return strip


def cell_size(images: np.ndarray, pixels: int = _CELL_PIXELS, most: int = _LARGEST_CELL_PIXELS) -> tuple[int, int]:
    """Width and height at which pictures (..., h, w, c) are shown: a whole multiple near to `pixels`, or `most`."""
    height, width = images.shape[-3:-1]
    longest = max(height, width)
    scale = max(1, round(pixels / longest)) if longest <= most else most / longest
    return max(1, round(width * scale)), max(1, round(height * scale))


def enlarge(image: UInt8[np.ndarray, "h w c"], size: tuple[int, int]) -> Image.Image:
    """A picture in colour, enlarged to sharp squares or made smaller."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    return picture.resize(size, Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.LANCZOS)


@cache
def font(pixels: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib ships, so that charts and sheets match on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), pixels)


def png(image: Image.Image) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
