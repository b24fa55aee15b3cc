"""Encoded pictures of a Hugging Face data set, by the package `datasets`, which is imported only here."""

import io
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipelines.data_config import DataConfig
from pipelines.parquet_source import Column, check_pictures
from pipelines.pictures import BadPicture
from pipelines.sources import Source, one_line

_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


class HuggingFaceSource(Source):
    """Rows of one split. The bytes are decoded by `pipelines.pictures`, like those of every other source."""

    def __init__(self, config: DataConfig) -> None:
        self.where = f"{config.path} ({config.split})"
        rows: Any = _loaded(config)
        check_pictures(rows.features.arrow_schema, config.image_column, self.where)
        self.labels = self._column(rows, Column.classes(config))
        self.captions = self._column(rows, Column.captions(config))
        self.names = [f"{config.split} row {row}" for row in range(len(rows))]
        self.rows, self.column = _undecoded(rows, config.image_column), config.image_column

    def name(self, row: int) -> str:
        return f"{self.where} row {row}"

    def open(self, row: int) -> BinaryIO:
        value = self.rows[row][self.column]
        contents, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if contents:
            return io.BytesIO(contents)
        if not path:
            raise BadPicture("no bytes")
        if not Path(path).is_file():
            raise BadPicture("its file is missing")
        return Path(path).open("rb")

    def _column(self, rows: Any, column: Column) -> list[Any] | None:
        return list(rows[column.name]) if column.is_in(rows.features.arrow_schema, self.where) else None


def reference_source(config: DataConfig) -> HuggingFaceSource:
    """The split that is the reference."""
    return HuggingFaceSource(replace(config, split=config.reference_split, reference_split=""))


def _undecoded(rows: Any, column: str) -> Any:
    package = _package()
    rows = rows.select_columns([column])
    is_picture = isinstance(rows.features[column], package.Image)
    return rows.cast_column(column, package.Image(decode=False)) if is_picture else rows


def _package() -> Any:
    try:
        return import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data of kind huggingface needs a package: pip install 'hdistill[datasets]' ({error})"
        ) from None


def _loaded(config: DataConfig) -> Any:
    """The rows of a split, from disk where the path is a folder that `save_to_disk` wrote, else from the hub."""
    package, folder = _package(), Path(config.path).expanduser()
    try:
        if not any((folder / name).is_file() for name in _SAVED):
            return package.load_dataset(config.path, split=config.split)
        saved = package.load_from_disk(str(folder.absolute()))
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        where = f"{config.path}, split {config.split}"
        raise ValueError(f"cannot load the data set {where}: {one_line(error)}") from error
    return _split_of(saved, config) if isinstance(saved, dict) else _whole(saved, config)


def _split_of(saved: dict[str, Any], config: DataConfig) -> Any:
    if config.split not in saved:
        raise ValueError(f"{config.path} has no split {config.split!r}, only {', '.join(saved)}")
    return saved[config.split]


def _whole(saved: Any, config: DataConfig) -> Any:
    if config.reference_split:
        raise ValueError(f"{config.path} was saved without splits: leave reference_split empty")
    return saved
