"""Encoded pictures in WebDataset's tars; nothing is unpacked, and no member's name is used as a path."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from pipelines.data_config import DataConfig
from pipelines.pictures import SUFFIXES, BadPicture
from pipelines.sources import Source, class_or_none, files_of, parsed, text_or_none

_SMALL = 2**20  # bytes: a class, a caption or a .json longer than this is none


class Place(NamedTuple):
    """Where a member's bytes are."""

    file: int
    start: int
    size: int


class TarSource(Source):
    """Samples of tars, in the order of tar name and member; a sample is the members of one name up to its first dot."""

    def __init__(self, config: DataConfig) -> None:
        root, self.files = files_of(config.path, ".tar")
        named = [
            (f"{file.relative_to(root).as_posix()}/{sample.name}", sample)
            for index, file in enumerate(self.files)
            for sample in _samples(file, index, config)
        ]
        if not named:
            raise ValueError(f"{config.path} holds no samples: no tar of it has a file in it")
        self.where, self.names = config.path, [name for name, _ in named]
        self.places = [sample.place for _, sample in named]
        self.labels = [sample.label for _, sample in named]
        self.captions = [sample.caption for _, sample in named]

    def open(self, row: int) -> BinaryIO:
        place = self.places[row]
        if place is None:
            raise BadPicture("no picture among its members")
        return io.BufferedReader(Stretch(self.files[place.file], place.start, place.size))


@dataclass(kw_only=True)
class _Sample:
    name: str
    place: Place | None = None
    label: int | None = None
    caption: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def _samples(file: Path, index: int, config: DataConfig) -> Iterator[_Sample]:
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(file, "r:", encoding="utf-8", errors="backslashreplace") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    _add(samples, archive, member, index, file)
    except (OSError, tarfile.TarError) as error:
        remedy = "it must be whole, and not compressed"
        raise ValueError(f"{file} is not a readable tar: {error}; {remedy}") from error
    return (_completed(sample, file, config) for sample in samples.values())


def _add(
    samples: dict[str, _Sample], archive: tarfile.TarFile, member: tarfile.TarInfo, index: int, file: Path
) -> None:
    """Put a member to its sample."""
    path = PurePosixPath(member.name)
    stem, _, kind = path.name.partition(".")
    if not stem:  # hidden: left by a file manager
        return
    sample = samples.setdefault(str(path.with_name(stem)), _Sample(name=member.name))
    where, kind = f"{file}: {member.name}", kind.lower()
    if f".{kind}" in SUFFIXES:
        if sample.place:
            raise ValueError(f"{where} and {sample.name} are two pictures of one sample")
        sample.name, sample.place = member.name, Place(index, member.offset_data, member.size)
    elif kind in ("cls", "txt", "json"):
        _describe(sample, kind, _text(archive, member, where), where)


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    reader = archive.extractfile(member)
    assert reader is not None  # a regular file has one
    if member.size > _SMALL:
        raise ValueError(f"{where} has {member.size:,} bytes; a class or a caption has at most {_SMALL:,}")
    try:
        return reader.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not readable UTF-8 text: {error}") from error


def _describe(sample: _Sample, kind: str, text: str, where: str) -> None:
    if kind == "txt":
        sample.caption = text
    elif kind == "json":
        fields = parsed(text, where)
        sample.fields = fields if isinstance(fields, dict) else {}
    else:
        sample.label = class_or_none(int(text) if text.lstrip("-").isdecimal() else text, where)


def _completed(sample: _Sample, file: Path, config: DataConfig) -> _Sample:
    """Class and caption from the .json, where there is no .cls or .txt; neither where the config names no field."""
    where, fields = f"{file}: {sample.name}", sample.fields
    if sample.label is None:
        sample.label = class_or_none(fields.get(config.label_column), where)
    if sample.caption is None:
        sample.caption = text_or_none(fields.get(config.caption_column), where)
    sample.label = sample.label if config.label_column else None
    sample.caption = sample.caption if config.caption_column else None
    return sample


class Stretch(io.RawIOBase):
    """Part of a file, to be read as a file of its own."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._place = path.open("rb", buffering=0), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        self._file.seek(self._start + self._place)
        read = self._file.readinto(memoryview(buffer)[:wanted])
        self._place += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
