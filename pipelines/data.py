"""Real images: what the discriminator sees and what samples are measured against.

Every kind of data ends as two sets of uint8 images: ``train``, and ``reference``, which is held out, and a third where
it is asked for: ``validation``, by which choices are made. No teacher or student that is trained here ever sees the
latter two; statistics are taken from the reference alone. Sets are kept in memory, or, where they outgrow it, decoded
as they are needed.
"""

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from pipelines.data_config import DataConfig as DataConfig
from pipelines.huggingface_source import HuggingFaceSource, reference_source
from pipelines.lazy import LazyPixels as LazyPixels
from pipelines.lazy import Reasons, first_shape, read_all
from pipelines.parquet_source import ParquetSource
from pipelines.pictures import MODES, Pixels, Skipped, padded, resized
from pipelines.sources import FolderSource, Source
from pipelines.tar_source import TarSource

MAX_BYTES = 4 * 2**30
"""Largest set of images that is read into memory."""

_SMALLER = "give a smaller image_size or fewer images"
_NPZ_KEYS = ("x", "images", "x_train", "y", "labels", "y_train", "x_test", "y_test")
_SOURCES = {
    "folder": FolderSource,
    "parquet": ParquetSource,
    "webdataset": TarSource,
    "huggingface": HuggingFaceSource,
}

Value = TypeVar("Value")
_Classes = Int64[np.ndarray, " n"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images with their classes."""

    images: Pixels | LazyPixels
    """Pixels, rows first, channels last; decoded as they are needed where a set outgrows memory."""
    labels: Int64[np.ndarray, " n"]
    """Class of each image; zeros where there are no classes."""
    num_classes: int
    """Number of classes; 0 where there are none."""
    captions: tuple[str, ...] | None = None
    """Caption of each image; ``None`` where there are none."""

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or len(self.images.shape) != 4:
            raise ValueError(f"images must be uint8 (n, h, w, c); given {_described(self.images)}")
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(self.images)},); given {_described(self.labels)}")
        if self.captions is not None and len(self.captions) != len(self.images):
            raise ValueError(f"captions must be one for each of {len(self.images)} images; given {len(self.captions)}")

    def in_memory(self) -> Pixels:
        """All pixels as one array. ValueError where the set outgrows memory."""
        if isinstance(self.images, LazyPixels):
            given = f"{self.images.nbytes / 2**30:.1f} GiB of pixels, read from disk as they are needed"
            raise ValueError(f"this needs all images in memory, and they are {given}: give it fewer or smaller ones")
        return self.images

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
    """sha256 of the sets' pixels, classes, captions and shapes; of sets too large for memory, in place of pixels: the
    names and byte sizes of the encoded pictures, with image_size, fit and channels."""
    validation: ImageSet | None = None
    """Kept from training, to choose by: what probes and sweeps score against; ``None`` where that is ``train``."""
    skipped: tuple[Skipped, ...] = ()
    """Pictures that were left out because they are bad, in the order of the data."""

    def say_skipped(self, console: Console, where: str = "") -> None:
        """Name the first of the bad pictures, and ``where`` all of them are named."""
        if self.skipped:
            first = escape(f"{self.skipped[0].name} ({self.skipped[0].reason})")
            rest = f"; all are named in {where}" if where else ""
            console.print(f"[yellow]{len(self.skipped):,} bad pictures are left out, the first {first}{rest}[/]")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Images in the order of the data, with what they bring."""

    images: Pixels | LazyPixels
    labels: _Classes = None
    captions: list[str] | None = None

    def taken(self, rows: np.ndarray) -> "_Part":
        return _Part(
            images=self.images.taken(rows) if isinstance(self.images, LazyPixels) else self.images[rows],
            labels=None if self.labels is None else self.labels[rows],
            captions=None if self.captions is None else [self.captions[row] for row in rows.tolist()],
        )


_Loaded = tuple[tuple[_Part, _Part], tuple[Skipped, ...]]


def load_images(config: DataConfig) -> DataSplits:
    """Read and split the images; bad pictures are skipped, and listed. ValueError says what is wrong, and where."""
    load = {"digits": _digits, "npz": _npz}.get(config.kind, _encoded)
    (given, reference), skipped = load(config)
    train, *validation = _kept_from(given, config)
    parts = [train, reference, *validation]
    labels = [part.labels for part in parts if part.labels is not None]
    num_classes = 1 + max(int(part.max()) for part in labels) if labels else 0
    splits = [_image_set(part, num_classes) for part in parts]
    named = dict(zip(("train", "reference", "validation"), splits, strict=False))
    return DataSplits(**named, fingerprint=_fingerprint(splits), skipped=skipped)


def to_model(images: Pixels) -> Float[Tensor, "n c h w"]:
    """Pixels to float32 in [-1, 1], channels first."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(torch.float32) / 127.5 - 1


def to_uint8(images: Float[Tensor, "n c h w"]) -> Pixels:
    """The inverse of `to_model`: clamped to [-1, 1] and rounded to pixels, channels last."""
    levels = ((images.detach().to(torch.float32) + 1) * 127.5).clamp(0, 255).round()
    return levels.permute(0, 2, 3, 1).to(torch.uint8).contiguous().cpu().numpy()


def _digits(config: DataConfig) -> _Loaded:
    """1,797 digits of 8x8 pixels and 17 levels; train is what comes before the last ``held_out`` of a permutation."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return _split(_Part(images=_fitted(images, config), labels=digits.target.astype(np.int64)), config), ()


def _split(part: _Part, config: DataConfig) -> tuple[_Part, _Part]:
    held_out = config.held_out_of(len(part.images))
    order = np.random.RandomState(config.split_seed).permutation(len(part.images))
    return part.taken(order[:-held_out]), part.taken(order[-held_out:])


def _kept_from(part: _Part, config: DataConfig) -> list[_Part]:
    """The images to train on, then those that are kept from training, if any are."""
    count = config.validation_of(len(part.images))
    if not count:
        return [part]
    order = np.random.RandomState(config.split_seed).permutation(len(part.images))
    return [part.taken(order[:-count]), part.taken(order[-count:])]


def _npz(config: DataConfig) -> _Loaded:
    """x (or images, x_train) and y (or labels, y_train); x_test and y_test are the reference where they are present."""
    path = Path(config.path).expanduser()
    arrays = _arrays(path)
    images, labels = _npz_part(arrays, ("x", "images", "x_train"), ("y", "labels", "y_train"), path)
    train = _Part(images=_fitted(images, config), labels=labels)
    if "x_test" not in arrays:
        return _split(train, config), ()
    test_images, test_labels = _npz_part(arrays, ("x_test",), ("y_test",), path)
    if images.shape[1:] != test_images.shape[1:] and not (config.image_size and config.channels):
        raise ValueError(f"{path}: x_test is {_described(test_images)}, the images to train on {_described(images)}")
    test = _Part(images=_fitted(test_images, config), labels=test_labels)
    _refuse_one_sided(train, test, str(path))
    return (train, test), ()


def _refuse_one_sided(train: _Part, reference: _Part, where: str) -> None:
    for what, ours, theirs in (
        ("classes", train.labels, reference.labels),
        ("captions", train.captions, reference.captions),
    ):
        if (ours is None) != (theirs is None):
            raise ValueError(f"{where} has {what} for only one of its two sets of images; give both or neither")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"no npz file at {path}")
    _refuse_large(_npz_bytes(path), path, _SMALLER)
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


def _npz_part(
    arrays: dict[str, np.ndarray], images: tuple[str, ...], labels: tuple[str, ...], path: Path
) -> tuple[Pixels, _Classes]:
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
    if rows and int(labels.max()) >= 2**31:
        raise ValueError(f"{where} holds {int(labels.max())}; classes count from 0 without large gaps")
    return labels.reshape(rows).astype(np.int64)


def _encoded(config: DataConfig) -> _Loaded:
    """Pictures of a source, or of two where the data bring their own reference; the bad ones are left out."""
    sources: list[Source] = [_SOURCES[config.kind](config)]
    if config.reference_split:
        sources.append(reference_source(config))
    else:
        config.held_out_of(len(sources[0]))
    read = _read(sources, config)
    parts = [_described_part(source, images, bad) for source, (images, bad) in zip(sources, read, strict=True)]
    skipped = tuple(
        Skipped(name=source.names[row], reason=reason)
        for source, (_, bad) in zip(sources, read, strict=True)
        for row, reason in bad.items()
    )
    if len(parts) == 1:
        return _split(parts[0], config), skipped
    train, reference = parts
    _refuse_one_sided(train, reference, config.path)
    return (train, reference), skipped


def _read(sources: list[Source], config: DataConfig) -> list[tuple[Pixels | LazyPixels, Reasons]]:
    """The good pictures of each source, decoded if all fit into memory, and why the others are bad."""
    shape, first = first_shape(sources[0], config)
    num_bytes = sum(len(source) for source in sources) * math.prod(shape)
    if num_bytes <= MAX_BYTES:
        return [read_all(source, config, shape, first) for source in sources]
    if not config.image_size:
        _refuse_large(num_bytes, config.path, "give an image_size, with which they are read as they are needed")
    return [LazyPixels.of(source, config, shape) for source in sources]


def _described_part(source: Source, images: Pixels | LazyPixels, bad: Reasons) -> _Part:
    good = [row for row in range(len(source)) if row not in bad]
    labels = _complete(source.labels, source, good, "class")
    captions = _complete(source.captions, source, good, "caption")
    classes = None if labels is None else _classes(np.array(labels), len(good), f"{source.where}: class")
    return _Part(images=images, labels=classes, captions=captions)


def _complete(values: Sequence[Value | None] | None, source: Source, rows: list[int], what: str) -> list[Value] | None:
    """The values of some pictures, ``None`` where none of them has one."""
    taken = [] if values is None else [values[row] for row in rows]
    present = [value for value in taken if value is not None]
    if present and len(present) < len(taken):
        without = source.name(rows[taken.index(None)])
        raise ValueError(f"{without} has no {what}, and others have one: every picture needs one, or none")
    return present or None


def _fitted(images: Pixels, config: DataConfig) -> Pixels:
    """Arrays brought to the channels and the size that are asked for."""
    channels, size = config.channels or images.shape[3], config.image_size
    if channels == images.shape[3] and (not size or images.shape[1:3] == (size, size)):
        return images
    _refuse_large(len(images) * channels * (size**2 or math.prod(images.shape[1:3])), config.path, _SMALLER)
    if config.fit == "pad":
        return padded(_in_channels(images, channels), size)
    return np.stack([resized(picture.convert(MODES[channels]), size) for picture in _as_pictures(images)])


def _in_channels(images: Pixels, channels: int) -> Pixels:
    if channels == images.shape[3]:
        return images
    return np.stack([np.atleast_3d(np.asarray(picture.convert(MODES[channels]))) for picture in _as_pictures(images)])


def _as_pictures(images: Pixels) -> Iterator[Image.Image]:
    return (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images)


def _refuse_large(num_bytes: int, path: Path | str, remedy: str) -> None:
    if num_bytes > MAX_BYTES:
        limits = f"{num_bytes / 2**30:.1f} GiB of pixels; images are kept in memory, up to {MAX_BYTES / 2**30:.0f} GiB"
        raise ValueError(f"{path} holds {limits}: {remedy}")


def _described(array: np.ndarray | LazyPixels) -> str:
    return f"{array.dtype} {array.shape}"


def _image_set(part: _Part, num_classes: int) -> ImageSet:
    labels = np.zeros(len(part.images), np.int64) if part.labels is None else part.labels
    captions = None if part.captions is None else tuple(part.captions)
    return ImageSet(images=part.images, labels=labels, num_classes=num_classes, captions=captions)


def _fingerprint(splits: Iterable[ImageSet]) -> str:
    digest = hashlib.sha256()
    for part in splits:
        digest.update(f"{part.images.shape} {part.num_classes}\n".encode())
        if isinstance(part.images, LazyPixels):
            digest.update(part.images.identity())
        else:
            digest.update(np.ascontiguousarray(part.images).data)
        digest.update(np.ascontiguousarray(part.labels, dtype="<i8").data)
        if part.captions is not None:
            digest.update(json.dumps(part.captions).encode())
    return digest.hexdigest()
