"""Prompts from a file: one a line of text, or a column of a table."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources import one_line

COLUMNS = ("prompt", "caption", "text")
"""Names of a column of prompts, in any case; the first that is there is taken."""


def load_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a .txt, .tsv, .csv, .jsonl or .parquet, in its order; blank ones are left out, equal ones are kept.

    Raises:
        ValueError: it is missing, unreadable or of another kind, lacks a column of prompts, or holds none.
    """
    path = path.expanduser()
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path} is none of {' '.join(_READERS)}: prompts are text, or a column of a table")
    if not path.is_file():
        raise ValueError(f"no file of prompts at {path}")
    prompts = tuple(prompt.strip() for prompt in read(path) if prompt.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _csv(path: Path) -> Iterator[str]:
    return _table(path, csv.reader(_lines(path)))


def _tsv(path: Path) -> Iterator[str]:
    """A quote is part of a prompt; only a cell whose quotes are doubled is taken for a quoted one."""
    cells = _table(path, csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE))
    return (_unquoted(cell) for cell in cells)


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    is_quoted = cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell


def _table(path: Path, rows: Any) -> Iterator[str]:
    """One column of a csv.reader, which knows the line that it stands at."""
    try:
        column = _column(next(rows, []), f"{path} line 1")
        for row in rows:
            if len(row) <= column and any(row):
                raise ValueError(f"{path} line {rows.line_num} has {len(row)} cells; its prompt is cell {column + 1}")
            yield row[column] if len(row) > column else ""
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num}: {error}") from error


def _objects(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _of_object(line, f"{path} line {number}")


def _of_object(line: str, where: str) -> str:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must hold a JSON object; it holds {type(fields).__name__}")
    names = list(fields)
    return _text(fields[names[_column(names, where)]], where)


def _parquet(path: Path) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        column = names[_column(names, str(path))]
        values: Iterable[Any] = file.read(columns=[column]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {one_line(error)}") from error
    return (_text(value, f"{path} row {row}") for row, value in enumerate(values))


def _text(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"{where}: a prompt must be text; given {str(value)[:60]}")


def _column(names: list[str], where: str) -> int:
    """Place of the column of prompts."""
    lower = [name.strip().lower() for name in names]
    found = [name for name in COLUMNS if name in lower]
    if not found:
        raise ValueError(f"{where} names {', '.join(names)[:200] or 'nothing'}; prompts are named {', '.join(COLUMNS)}")
    return lower.index(found[0])


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _lines,
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _objects,
    ".parquet": _parquet,
}
