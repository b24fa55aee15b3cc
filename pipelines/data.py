"""Real images: what the discriminator sees and what samples are measured against.

Every kind of data ends as two sets of uint8 images in memory: ``train``, and ``reference``, which is held out. No
teacher or student that is trained here ever sees the reference; statistics are taken from it alone.
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

MAX_BYTES = 4 * 2**30
"""Largest set of images that is read into memory."""

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_NPZ_KEYS = ("x", "images", "x_train", "y", "labels", "y_train", "x_test", "y_test")
_MODES = {1: "L", 3: "RGB"}
_TOO_DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these to 8 bits instead of scaling them

Pixels = UInt8[np.ndarray, "n h w c"]
_Data = tuple[Pixels, Int64[np.ndarray, " n"] | None]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where real images come from, and how they are split."""

    kind: Literal["digits", "npz", "folder"] = "digits"
    """digits: scikit-learn's 8x8 digits. npz: one NumPy archive. folder: pictures, one sub-folder a class."""
    path: str = ""
    """The .npz file or the folder; digits need none."""
    image_size: int = 0
    """Side to which images are brought, by ``fit``; 0 leaves them as they are."""
    fit: Literal["resize", "pad"] = "resize"
    """resize: centre-crop to a square, then resize. pad: centre on black; no pixel changes, no image may be larger."""
    channels: Literal[0, 1, 3] = 0
    """1: grey. 3: colour. 0: as they are (pictures of a folder are read in colour)."""
    held_out: int | float = 600
    """Reference images: a number, or a share between 0 and 1; unused where an npz brings its own x_test."""
    split_seed: int = 0
    """Seed of the permutation whose last ``held_out`` images are the reference."""

    def __post_init__(self) -> None:
        if self.kind not in ("digits", "npz", "folder"):
            raise ValueError(f"kind of data must be digits, npz or folder; given {self.kind!r}")
        if self.kind != "digits" and not self.path:
            raise ValueError(f"data of kind {self.kind} needs a path; none was given")
        if self.kind == "digits" and self.path:
            raise ValueError(f"data of kind digits has no path; given {self.path!r}")
        if self.image_size < 0:
            raise ValueError(f"image_size must be 0 (as it is) or a number of pixels; given {self.image_size}")
        if self.fit not in ("resize", "pad"):
            raise ValueError(f"fit must be resize or pad; given {self.fit!r}")
        if self.fit == "pad" and not self.image_size:
            raise ValueError("fit pad needs an image_size to pad to; given 0")
        if self.channels not in (0, 1, 3):
            raise ValueError(f"channels must be 1, 3 or 0 (as they are); given {self.channels}")
        if not self._held_out_is_sound():
            raise ValueError(f"held_out must be a number of images or a share between 0 and 1; given {self.held_out}")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be in [0, 2^32); given {self.split_seed}")

    def _held_out_is_sound(self) -> bool:
        return self.held_out >= 1 if isinstance(self.held_out, int) else 0 < self.held_out < 1

    def held_out_of(self, total: int) -> int:
        """How many of ``total`` images are the reference; ValueError where nothing is left to train on."""
        count = self.held_out if isinstance(self.held_out, int) else round(self.held_out * total)
        if not 0 < count < total:
            raise ValueError(f"held_out {self.held_out} of {total} images leaves too few to train on or to measure by")
        return count


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images with their classes."""

    images: Pixels
    """Pixels, rows first, channels last."""
    labels: Int64[np.ndarray, " n"]
    """Class of each image; zeros where there are no classes."""
    num_classes: int
    """Number of classes; 0 where there are none."""

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 (n, h, w, c); given {_described(self.images)}")
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(self.images)},); given {_described(self.labels)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, as models take it."""
        _, height, width, channels = self.images.shape
        return channels, height, width


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits:
    """Images to train on, and images to measure by."""

    train: ImageSet
    """What the teacher and the discriminator may see."""
    reference: ImageSet
    """Held out: only statistics are taken from it."""
    fingerprint: str
    """sha256 of both sets' pixels, classes and shapes."""


def load_images(config: DataConfig) -> DataSplits:
    """Read and split the images. ValueError says what is wrong with them, and where."""
    train, reference = {"digits": _digits, "npz": _npz, "folder": _folder}[config.kind](config)
    labels = [part[1] for part in (train, reference) if part[1] is not None]
    num_classes = 1 + max(int(part.max()) for part in labels) if labels else 0
    splits = [_image_set(*part, num_classes) for part in (train, reference)]
    return DataSplits(train=splits[0], reference=splits[1], fingerprint=_fingerprint(splits))


def to_model(images: Pixels) -> Float[Tensor, "n c h w"]:
    """Pixels to float32 in [-1, 1], channels first."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(torch.float32) / 127.5 - 1


def to_uint8(images: Float[Tensor, "n c h w"]) -> Pixels:
    """The inverse of `to_model`: clamped to [-1, 1] and rounded to pixels, channels last."""
    levels = ((images.detach().to(torch.float32) + 1) * 127.5).clamp(0, 255).round()
    return levels.permute(0, 2, 3, 1).to(torch.uint8).contiguous().cpu().numpy()


def _digits(config: DataConfig) -> tuple[_Data, _Data]:
    """1,797 digits of 8x8 pixels and 17 levels; train is what comes before the last ``held_out`` of a permutation."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return _split(_fitted(images, config), digits.target.astype(np.int64), config)


def _split(images: Pixels, labels: Int64[np.ndarray, " n"] | None, config: DataConfig) -> tuple[_Data, _Data]:
    held_out = config.held_out_of(len(images))
    order = np.random.RandomState(config.split_seed).permutation(len(images))
    train, reference = order[:-held_out], order[-held_out:]
    return (images[train], _taken(labels, train)), (images[reference], _taken(labels, reference))


def _taken(labels: Int64[np.ndarray, " n"] | None, rows: np.ndarray) -> Int64[np.ndarray, " k"] | None:
    return None if labels is None else labels[rows]


def _npz(config: DataConfig) -> tuple[_Data, _Data]:
    """x (or images, x_train) and y (or labels, y_train); x_test and y_test are the reference where they are present."""
    path = Path(config.path).expanduser()
    arrays = _arrays(path)
    train = _npz_part(arrays, ("x", "images", "x_train"), ("y", "labels", "y_train"), path)
    images = _fitted(train[0], config)
    if "x_test" not in arrays:
        return _split(images, train[1], config)
    test = _npz_part(arrays, ("x_test",), ("y_test",), path)
    if (train[1] is None) != (test[1] is None):
        raise ValueError(f"{path} has classes for only one of its two sets of images; give both or neither")
    if train[0].shape[1:] != test[0].shape[1:] and not (config.image_size and config.channels):
        raise ValueError(f"{path}: x_test is {_described(test[0])}, the images to train on {_described(train[0])}")
    return (images, train[1]), (_fitted(test[0], config), test[1])


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"no npz file at {path}")
    _refuse_large(_npz_bytes(path), path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in _NPZ_KEYS if key in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable npz file: {error}") from error


def _npz_bytes(path: Path) -> int:
    """What the wanted arrays take once they are unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(
                entry.file_size for entry in archive.infolist() if entry.filename.removesuffix(".npy") in _NPZ_KEYS
            )
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable npz file: {error}") from error


def _npz_part(arrays: dict[str, np.ndarray], images: tuple[str, ...], labels: tuple[str, ...], path: Path) -> _Data:
    """The images and classes under the first key that is present of each."""
    image_key = next((key for key in images if key in arrays), None)
    if image_key is None:
        raise ValueError(f"{path} has no images: none of the keys {', '.join(images)}")
    pixels = arrays[image_key]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3)):
        wanted = "uint8 (n, h, w) or (n, h, w, c) with 1 or 3 channels"
        raise ValueError(f"{path}: {image_key} is {_described(pixels)}; it must be {wanted}")
    label_key = next((key for key in labels if key in arrays), None)
    classes = None if label_key is None else _classes(arrays[label_key], len(pixels), f"{path}: {label_key}")
    return pixels if pixels.ndim == 4 else pixels[..., None], classes


def _classes(labels: np.ndarray, rows: int, where: str) -> Int64[np.ndarray, " n"]:
    if labels.dtype.kind not in "iu" or labels.size != rows or labels.shape[:1] != (rows,):
        raise ValueError(f"{where} is {_described(labels)}; it must be one whole number for each of {rows} images")
    if rows and int(labels.min()) < 0:
        raise ValueError(f"{where} holds {int(labels.min())}; classes count from 0")
    return labels.reshape(rows).astype(np.int64)


def _folder(config: DataConfig) -> tuple[_Data, _Data]:
    """Pictures in the order of their paths; the first folder below the root is the class, in alphabetical order."""
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ValueError(f"no folder of pictures at {root}")
    files = _pictures(root)
    if not files:
        raise ValueError(f"{root} holds no pictures ({' '.join(_SUFFIXES)})")
    config.held_out_of(len(files))
    first = _read(files[0], config)
    _refuse_large(first.nbytes * len(files), root)
    images = np.empty((len(files), *first.shape), np.uint8)
    for index, file in enumerate(files):
        images[index] = _same_shape(_read(file, config), first, file, files[0])
    return _split(images, _folder_classes(files, root), config)


def _pictures(root: Path) -> list[Path]:
    found = (file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    shown = (file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts))
    return sorted(shown, key=lambda file: file.relative_to(root).as_posix())


def _folder_classes(files: list[Path], root: Path) -> Int64[np.ndarray, " n"] | None:
    parts = [file.relative_to(root).parts for file in files]
    loose = [part[0] for part in parts if len(part) == 1]
    if len(loose) == len(files):
        return None
    if loose:
        raise ValueError(f"{root} holds pictures ({loose[0]}, ...) beside class folders; put every one into a folder")
    names = sorted({part[0] for part in parts})
    return np.array([names.index(part[0]) for part in parts], np.int64)


def _read(file: Path, config: DataConfig) -> UInt8[np.ndarray, "h w c"]:
    """One picture, turned upright as its EXIF says, in the channels and at the size that are asked for."""
    try:
        with Image.open(file) as opened:
            if opened.mode in _TOO_DEEP:
                raise ValueError(f"it has more than 8 bits a channel (mode {opened.mode})")
            picture = ImageOps.exif_transpose(opened).convert(_MODES[config.channels or 3])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {file}: {error}") from error
    if config.fit == "resize":
        return _resized(picture, config.image_size)
    try:
        return _padded(np.atleast_3d(np.asarray(picture))[None], config.image_size)[0]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _resized(picture: Image.Image, size: int) -> UInt8[np.ndarray, "h w c"]:
    """Crop to the central square and resize with Pillow's antialiased bicubic filter; size 0 changes nothing."""
    if size and picture.size != (size, size):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))  # resize(box=...) would look beyond the edges
        picture = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(picture))


def _same_shape(image: np.ndarray, first: np.ndarray, file: Path, first_file: Path) -> np.ndarray:
    if image.shape != first.shape:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (image, first)]
        raise ValueError(f"{file} is {sizes[0]} and {first_file} is {sizes[1]}: mixed sizes need an image_size")
    return image


def _fitted(images: Pixels, config: DataConfig) -> Pixels:
    """Arrays brought to the channels and the size that are asked for."""
    channels, size = config.channels or images.shape[3], config.image_size
    if channels == images.shape[3] and (not size or images.shape[1:3] == (size, size)):
        return images
    _refuse_large(len(images) * channels * (size**2 or math.prod(images.shape[1:3])), Path(config.path))
    if config.fit == "pad":
        return _padded(_in_channels(images, channels), size)
    return np.stack([_resized(picture.convert(_MODES[channels]), size) for picture in _as_pictures(images)])


def _in_channels(images: Pixels, channels: int) -> Pixels:
    if channels == images.shape[3]:
        return images
    return np.stack([np.atleast_3d(np.asarray(picture.convert(_MODES[channels]))) for picture in _as_pictures(images)])


def _as_pictures(images: Pixels) -> Iterator[Image.Image]:
    return (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images)


def _padded(images: Pixels, size: int) -> Pixels:
    """Centred on black; where the border is odd, the wider part is right and below."""
    height, width = images.shape[1:3]
    if max(height, width) > size:
        raise ValueError(f"images of {width}x{height} do not fit into image_size {size}: fit pad does not shrink them")
    top, left = (size - height) // 2, (size - width) // 2
    padded = np.zeros((len(images), size, size, images.shape[3]), np.uint8)
    padded[:, top : top + height, left : left + width] = images
    return padded


def _refuse_large(num_bytes: int, path: Path) -> None:
    if num_bytes > MAX_BYTES:
        limits = f"{num_bytes / 2**30:.1f} GiB of pixels; images are kept in memory, up to {MAX_BYTES / 2**30:.0f} GiB"
        raise ValueError(f"{path} holds {limits}: give a smaller image_size or fewer images")


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _image_set(images: Pixels, labels: Int64[np.ndarray, " n"] | None, num_classes: int) -> ImageSet:
    zeros = np.zeros(len(images), np.int64)
    return ImageSet(images=images, labels=zeros if labels is None else labels, num_classes=num_classes)


def _fingerprint(splits: Iterable[ImageSet]) -> str:
    digest = hashlib.sha256()
    for part in splits:
        digest.update(f"{part.images.shape} {part.num_classes}\n".encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(np.ascontiguousarray(part.labels, dtype="<i8").data)
    return digest.hexdigest()
