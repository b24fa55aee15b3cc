"""One encoded picture to pixels: how it is read, what counts as bad, and how it comes to the size that is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.data_config import DataConfig

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names of pictures end in one of these."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow has others that start programs
_TOO_DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these to 8 bits instead of scaling them
_REASON_LENGTH = 100

Pixels = UInt8[np.ndarray, "n h w c"]
Picture = UInt8[np.ndarray, "h w c"]


class BadPicture(ValueError):
    """A picture that cannot be used; the message is the reason, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A picture that was left out."""

    name: str
    """The picture within its data set: a path, a member of a tar, a row of a file."""
    reason: str


def read_picture(stream: BinaryIO, config: DataConfig) -> Picture:
    """One picture, turned upright as its EXIF says, in the channels and at the size that are asked for.

    Raises:
        BadPicture: it is damaged, deeper than 8 bits a channel, far too large, or far too small for ``image_size``.
        ValueError: it is larger than the size to which it is to be padded.
    """
    with as_bad(), Image.open(stream, formats=FORMATS) as opened:
        _refuse_unfit(opened, config)
        picture = ImageOps.exif_transpose(opened).convert(MODES[config.channels or 3])
    if config.fit == "pad":
        return padded(np.atleast_3d(np.asarray(picture))[None], config.image_size)[0]
    return resized(picture, config.image_size)


def check_header(stream: BinaryIO, config: DataConfig) -> None:
    """Raise what `read_picture` would, as far as the picture's header tells it; no pixel is decoded."""
    with as_bad(), Image.open(stream, formats=FORMATS) as opened:
        _refuse_unfit(opened, config)
        width, height = opened.size
    if config.fit == "pad":
        _refuse_shrinking(width, height, config.image_size)


@contextmanager
def as_bad() -> Iterator[None]:
    """Whatever Pillow's readers raise, as a `BadPicture`."""
    try:
        yield
    except (BadPicture, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise BadPicture(
            f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, as a decompression bomb has"
        ) from None
    except UnidentifiedImageError:
        raise BadPicture("no picture of a known format") from None
    except Exception as error:  # Pillow's readers raise any kind on damaged files
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the picture
            raise
        raise BadPicture(" ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__) from error


def _refuse_unfit(picture: Image.Image, config: DataConfig) -> None:
    if picture.mode in _TOO_DEEP:
        raise BadPicture(f"more than 8 bits a channel (mode {picture.mode})")
    if config.fit == "resize" and 2 * min(picture.size) < config.image_size:
        width, height = picture.size
        raise BadPicture(f"{width}x{height}: would be enlarged more than twice")


def resized(picture: Image.Image, size: int) -> Picture:
    """Crop to the central square and resize with Pillow's antialiased bicubic filter; size 0 changes nothing."""
    if size and picture.size != (size, size):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))  # resize(box=...) would look beyond the edges
        picture = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(picture))


def padded(images: Pixels, size: int) -> Pixels:
    """Centred on black; where the border is odd, the wider part is right and below."""
    height, width = images.shape[1:3]
    _refuse_shrinking(width, height, size)
    top, left = (size - height) // 2, (size - width) // 2
    result = np.zeros((len(images), size, size, images.shape[3]), np.uint8)
    result[:, top : top + height, left : left + width] = images
    return result


def _refuse_shrinking(width: int, height: int, size: int) -> None:
    if max(height, width) > size:
        raise ValueError(f"images of {width}x{height} do not fit into image_size {size}: fit pad does not shrink them")
