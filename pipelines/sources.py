"""Where encoded pictures come from: a listing with classes and captions, and a way to open each. Here: folders.

A source names its pictures in a fixed order and opens any of them from any thread. It can be pickled, so that a set
which is read as it is needed may travel to other processes on the same disk.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.data_config import DataConfig
from pipelines.pictures import SUFFIXES

_NUMBERED = re.compile(r"(\d+)\.\.(\d+)")


class Source(ABC):
    """Encoded pictures in a fixed order."""

    where: str
    """What error messages call the whole."""
    names: Sequence[str]
    """Each picture's name within it."""
    labels: Sequence[int | None] | None = None
    """Each picture's class; ``None``: there are none."""
    captions: Sequence[str | None] | None = None
    """Each picture's caption; ``None``: there are none."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        """What error messages call one picture."""
        return f"{self.where}: {self.names[row]}"

    @abstractmethod
    def open(self, row: int) -> BinaryIO:
        """One encoded picture. BadPicture where there is none, ValueError where the file around it is damaged."""


class FolderSource(Source):
    """Pictures in the order of their paths; the first folder below the root is the class, in alphabetical order."""

    def __init__(self, config: DataConfig) -> None:
        root = Path(config.path).expanduser()
        if not root.is_dir():
            raise ValueError(f"no folder of pictures at {root}")
        files = _pictures(root)
        if not files:
            raise ValueError(f"{root} holds no pictures ({' '.join(SUFFIXES)})")
        self.where, self.root = str(root), root.absolute()  # other processes may stand in another directory
        self.names = [file.relative_to(root).as_posix() for file in files]
        self.labels = _folder_classes(files, root)
        self.captions = _folder_captions(files, root, config.caption_column)

    def name(self, row: int) -> str:
        return str(Path(self.where) / self.names[row])

    def open(self, row: int) -> BinaryIO:
        return (self.root / self.names[row]).open("rb")


def _pictures(root: Path) -> list[Path]:
    found = (file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    shown = (file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts))
    return sorted(shown, key=lambda file: file.relative_to(root).as_posix())


def _folder_classes(files: Sequence[Path], root: Path) -> list[int] | None:
    parts = [file.relative_to(root).parts for file in files]
    loose = [part[0] for part in parts if len(part) == 1]
    if len(loose) == len(files):
        return None
    if loose:
        raise ValueError(f"{root} holds pictures ({loose[0]}, ...) beside class folders; put every one into a folder")
    classes = {name: index for index, name in enumerate(sorted({part[0] for part in parts}))}
    return [classes[part[0]] for part in parts]


def _folder_captions(files: Sequence[Path], root: Path, column: str) -> list[str | None] | None:
    """From metadata.jsonl, else meta_data.json, else a .txt beside each picture; no ``column``: none are read."""
    if not column:
        return None
    if (listing := root / "metadata.jsonl").is_file():
        by_name = _listed_captions(listing, column)
        return [by_name.get(file.relative_to(root).as_posix()) for file in files]
    if (listing := root / "meta_data.json").is_file():
        prompts = _prompts_by_id(listing)
        return [prompts.get((file.parent.name, file.stem)) for file in files]
    return [_text_beside(file) for file in files]


def _listed_captions(path: Path, column: str) -> dict[str, str | None]:
    captions: dict[str, str | None] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            where = f"{path} line {number}"
            entry = parsed(line, where)
            if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                raise ValueError(f"{where} must be an object with the text file_name; it is {line.strip()[:60]}")
            captions[entry["file_name"]] = text_or_none(entry.get(column, entry.get("text")), where)
    return captions


def _prompts_by_id(path: Path) -> dict[tuple[str, str], str | None]:
    entries = parsed(read_text(path), str(path))
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} must be an object of objects, {{id: {{category: ..., prompt: ...}}}}")
    return {
        (str(entry.get("category")), key): text_or_none(entry.get("prompt"), f"{path}: {key}")
        for key, entry in entries.items()
    }


def _text_beside(picture: Path) -> str | None:
    beside = picture.with_suffix(".txt")
    return read_text(beside).strip() if beside.is_file() else None


def read_text(path: Path) -> str:
    """A file's text. ValueError where it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable UTF-8 text: {error}") from error


def parsed(text: str | bytes, where: str) -> Any:
    """JSON, or a ValueError that says where it is none."""
    try:
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not readable JSON: {error}") from error


def one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def text_or_none(value: Any, where: str) -> str | None:
    """A caption as it stands in a file. ValueError where it is there and no text."""
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{where}: a caption must be text; given {str(value)[:60]}")


def class_or_none(value: Any, where: str) -> int | None:
    """A class as it stands in a file. ValueError where it is there and no whole number."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: a class must be a whole number; given {str(value)[:60]!r}")


def files_of(path: str, suffix: str) -> tuple[Path, list[Path]]:
    """The files that a path, a folder or a pattern with ``* ? [...] {a,b} {00..12}`` means, and the folder of all.

    Raises:
        ValueError: there are none, or a file that a pattern names is missing.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        found = [file for file in given.glob(f"*{suffix}") if file.is_file() and not file.name.startswith(".")]
    elif given.exists():
        found = [given]
    else:
        found = [Path(file) for pattern in _expanded(str(given)) for file in _matching(pattern)]
    if not found:
        raise ValueError(f"no *{suffix} files at {path}")
    root = Path(os.path.commonpath([file.absolute().parent for file in found]))
    return root, sorted({file.absolute() for file in found}, key=lambda file: file.relative_to(root).as_posix())


def _matching(pattern: str) -> list[str]:
    if any(mark in pattern for mark in "*?["):
        return glob(pattern, recursive=True)
    if not Path(pattern).is_file():
        raise ValueError(f"no file at {pattern}")
    return [pattern]


def _expanded(pattern: str) -> Iterator[str]:
    """``a-{00..02}`` and ``a-{x,y}`` written out, as a shell does."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if index % 2 else [part] for index, part in enumerate(parts)]
    return ("".join(chosen) for chosen in product(*choices))


def _choices(inner: str) -> list[str]:
    numbered = _NUMBERED.fullmatch(inner)
    if not numbered:
        return inner.split(",")
    first, last = numbered.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
