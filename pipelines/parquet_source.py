"""Encoded pictures in Parquet files: bytes, or Hugging Face's struct of bytes and path."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data_config import DataConfig
from pipelines.pictures import BadPicture
from pipelines.sources import Source, files_of, one_line

CACHE_BYTES = 512 * 2**20
"""How much of the row groups that were read last stays in memory; the newest always does."""


class ParquetSource(Source):
    """Rows of Parquet files, in the order of file name and row.

    Only whole row groups can be read, so rows far apart cost as many groups each; Hugging Face's own format has no such
    limit, and `datasets` reads a folder of Parquet files into it.
    """

    def __init__(self, config: DataConfig) -> None:
        root, files = files_of(config.path, ".parquet")
        self.where = config.path
        self.groups = RowGroups(files, config.image_column)
        self.names = [
            f"{file.relative_to(root).as_posix()} row {row}"
            for file, count in zip(files, self.groups.rows_of_files, strict=True)
            for row in range(count)
        ]
        self.labels = _column(files, Column.classes(config))
        self.captions = _column(files, Column.captions(config))

    def open(self, row: int) -> BinaryIO:
        contents = self.groups[row]
        if not contents:
            raise BadPicture("no bytes")
        return io.BytesIO(contents)


class RowGroups:
    """One binary column of Parquet files, by row; the row groups read last are kept. Safe among threads."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column = files, column
        about = [_opened(file) for file in files]
        for file, parquet in zip(files, about, strict=True):
            check_pictures(parquet.schema_arrow, column, str(file))
        self.rows_of_files = [parquet.metadata.num_rows for parquet in about]
        self.places = [(index, group) for index, file in enumerate(about) for group in range(file.num_row_groups)]
        sizes = [about[index].metadata.row_group(group).num_rows for index, group in self.places]
        self.ends = np.cumsum(sizes)
        self._forget()

    def _forget(self) -> None:
        self._lock, self._kept = threading.Lock(), OrderedDict[int, pa.ChunkedArray]()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, row: int) -> bytes | None:
        group = int(np.searchsorted(self.ends, row, side="right"))
        with self._lock:
            column = self._group(group)
        value = column[row - int(self.ends[group]) + len(column)].as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def _group(self, group: int) -> pa.ChunkedArray:
        if group not in self._kept:
            self._kept[group] = self._read(*self.places[group])
        self._kept.move_to_end(group)
        while len(self._kept) > 1 and sum(column.nbytes for column in self._kept.values()) > CACHE_BYTES:
            self._kept.popitem(last=False)
        return self._kept[group]

    def _read(self, index: int, group: int) -> pa.ChunkedArray:
        try:
            return pq.ParquetFile(self.files[index]).read_row_group(group, columns=[self.column]).column(0)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.files[index]}: row group {group} is damaged: {one_line(error)}") from error


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is not a readable Parquet file: {one_line(error)}") from error


def check_pictures(schema: pa.Schema, column: str, where: str) -> None:
    """ValueError where a column is absent, or holds no encoded pictures: binary, or a struct with binary ``bytes``."""
    if column not in schema.names:
        raise ValueError(f"{where} has no column {column!r}, only {', '.join(schema.names)}: set data.image_column")
    kind = schema.field(column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise ValueError(f"{where}: column {column} is {kind}; it must be binary, or a struct with the binary bytes")


@dataclass(frozen=True)
class Column:
    """What a column beside the pictures is called, and what it must hold."""

    name: str
    default: str
    """The name that may be absent; another name was asked for."""
    wanted: str
    fits: Callable[[pa.DataType], bool]

    @classmethod
    def classes(cls, config: DataConfig) -> Self:
        return cls(config.label_column, "label", "whole numbers", pa.types.is_integer)

    @classmethod
    def captions(cls, config: DataConfig) -> Self:
        return cls(config.caption_column, "caption", "text", _is_text)

    def is_in(self, schema: pa.Schema, where: str) -> bool:
        """Whether it is there. ValueError where it was asked for and is not, or holds something else."""
        if not self.name or (self.name == self.default and self.name not in schema.names):
            return False
        if self.name not in schema.names:
            raise ValueError(f"{where} has no column {self.name!r}, only {', '.join(schema.names)}")
        kind = schema.field(self.name).type
        if not self.fits(kind):
            raise ValueError(f"{where}: column {self.name} is {kind}; it must hold {self.wanted}")
        return True


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _column(files: Sequence[Path], column: Column) -> list[Any]:
    """A column over all files; ``None`` for each row without a value."""
    values: list[Any] = []
    for file in files:
        parquet = _opened(file)
        present = column.is_in(parquet.schema_arrow, str(file))
        values += _values(parquet, column.name, file) if present else [None] * parquet.metadata.num_rows
    return values


def _values(parquet: pq.ParquetFile, name: str, file: Path) -> list[Any]:
    try:
        return parquet.read(columns=[name]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: column {name} is damaged: {one_line(error)}") from error
