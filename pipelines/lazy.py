"""Encoded pictures to pixels by a few threads: all of a source at once, or rows as they are needed."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, TypeVar

import numpy as np
from jaxtyping import Int64

from pipelines.data_config import DataConfig
from pipelines.pictures import BadPicture, Picture, Pixels, check_header, read_picture
from pipelines.process import available_cpus
from pipelines.sources import Source

Result = TypeVar("Result")
Shape = tuple[int, int, int]
Reasons = dict[int, str]

_MOST_THREADS = 8
_ROWS_AT_ONCE = 32


def in_parallel(
    work: Callable[[int], Result], rows: Sequence[int] | np.ndarray, at_once: int = _ROWS_AT_ONCE
) -> Iterator[Result]:
    """Results of ``work`` in the order of ``rows``, by a few threads; Pillow decodes without Python's lock."""
    parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    with ThreadPoolExecutor(min(_MOST_THREADS, available_cpus())) as pool:
        for results in pool.map(lambda part: [work(int(row)) for row in part], parts):
            yield from results


def first_shape(source: Source, config: DataConfig) -> tuple[Shape, str]:
    """Height, width and channels that every picture shall have, and the name of the first good one, which says so.

    Raises:
        ValueError: no picture is good, or the first good one is larger than it may be.
    """
    if config.image_size:
        return (config.image_size, config.image_size, config.channels or 3), ""
    reasons: dict[int, str] = {}
    for row in range(len(source)):
        try:
            height, width, channels = _read(source, row, config).shape
            return (height, width, channels), source.name(row)
        except BadPicture as bad:
            reasons[row] = str(bad)
    raise _none_good(source, reasons)


def read_all(source: Source, config: DataConfig, shape: Shape, first: str) -> tuple[Pixels, Reasons]:
    """The good pictures of a source, all of the shape that picture ``first`` has, and why the other rows are bad.

    Raises:
        ValueError: none is good, sizes differ, one is larger than it may be, or a file around them is damaged.
    """
    images = np.empty((len(source), *shape), np.uint8)

    def fill(row: int) -> None:
        image = _read(source, row, config)
        if image.shape != shape:
            sizes = [f"{width}x{height}" for height, width, _ in (image.shape, shape)]
            mixed = f"{source.name(row)} is {sizes[0]} and {first} is {sizes[1]}"
            raise ValueError(f"{mixed}: mixed sizes need an image_size")
        images[row] = image

    bad = _bad_rows(source, fill)
    good = [row for row in range(len(source)) if row not in bad]
    for target, row in enumerate(good) if bad else ():  # in place: a copy would take as much memory again
        images[target] = images[row]
    return images[: len(good)], bad


def _read_headers(source: Source, config: DataConfig) -> tuple[Int64[np.ndarray, " n"], Reasons]:
    """Bytes of each encoded picture, and why rows are bad, as far as headers tell it."""
    sizes = np.zeros(len(source), np.int64)

    def check(row: int) -> None:
        with _opened(source, row) as stream:
            sizes[row] = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            check_header(stream, config)

    return sizes, _bad_rows(source, check)


def _bad_rows(source: Source, work: Callable[[int], None]) -> Reasons:
    def reason(row: int) -> str | None:
        try:
            work(row)
        except BadPicture as bad:
            return str(bad)

    reasons = enumerate(in_parallel(reason, range(len(source))))
    bad = {row: why for row, why in reasons if why is not None}
    if len(bad) == len(source):
        raise _none_good(source, bad)
    return bad


def _none_good(source: Source, bad: Reasons) -> ValueError:
    first, reason = next(iter(bad.items()))
    return ValueError(f"{source.where}: all {len(bad)} pictures are bad; the first is {source.names[first]}: {reason}")


class LazyPixels:
    """Images that are read and decoded whenever they are asked for; used where a set outgrows memory.

    It has the shape and dtype of an array ``(n, h, w, c)`` of uint8 and gives one for a slice or an array of indices.
    It can be pickled, and then read wherever the same files are.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, source: Source, config: DataConfig, shape: Shape, sizes: Int64[np.ndarray, " s"], rows: np.ndarray
    ) -> None:
        self._source, self._config, self._of_one, self._sizes, self._rows = source, config, shape, sizes, rows

    @classmethod
    def of(cls, source: Source, config: DataConfig, shape: Shape) -> "tuple[LazyPixels, Reasons]":
        """All pictures of a source but those whose header tells that they are bad, and why these are.

        Raises:
            ValueError: none is good, one is larger than it may be, or a file around them is damaged.
        """
        sizes, bad = _read_headers(source, config)
        good = np.array([row for row in range(len(source)) if row not in bad])
        return cls(source, config, shape, sizes, good), bad

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, height, width and channels."""
        return len(self._rows), *self._of_one

    @property
    def nbytes(self) -> int:
        """Bytes that all pixels would take."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | np.ndarray) -> Pixels:
        """Pixels of some rows, in the order that is asked for; read in the source's own order.

        Raises:
            ValueError: a picture whose header was sound is damaged after all.
        """
        rows = self._rows[index]
        if np.ndim(rows) != 1:
            raise TypeError(f"images are taken by a slice or by an array of one axis; given {index!r}")
        images = np.empty((len(rows), *self._of_one), np.uint8)

        def fill(position: int) -> None:
            images[position] = self._image(int(rows[position]))

        in_order = np.argsort(rows, kind="stable")
        for _ in in_parallel(fill, in_order, at_once=1):  # far rows at a time would each want their own row group
            pass
        return images

    def taken(self, rows: np.ndarray) -> "LazyPixels":
        """Some of the rows, still unread."""
        return LazyPixels(self._source, self._config, self._of_one, self._sizes, self._rows[rows])

    def identity(self) -> bytes:
        """Names and byte sizes of the encoded pictures, and what of the config shapes their pixels."""
        config, names = self._config, [self._source.names[row] for row in self._rows]
        shaping = [config.image_size, config.fit, config.channels]
        return json.dumps([shaping, names, self._sizes[self._rows].tolist()]).encode()

    def _image(self, row: int) -> Picture:
        try:
            return _read(self._source, row, self._config)
        except BadPicture as bad:
            raise ValueError(
                f"{self._source.name(row)} is damaged ({bad}), which its header did not show: take it out of the data\n"
                "Only headers are looked at beforehand where a set outgrows memory"
            ) from bad


def _read(source: Source, row: int, config: DataConfig) -> Picture:
    with _opened(source, row) as stream:
        return read_picture(stream, config)


@contextmanager
def _opened(source: Source, row: int) -> Iterator[BinaryIO]:
    """One encoded picture; what goes wrong with it is said with its name, unless it is to be skipped."""
    try:
        with source.open(row) as stream:
            yield stream
    except BadPicture:
        raise
    except PermissionError:
        raise BadPicture("no permission to read it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.name(row)}: {error}") from error
