"""Parquet shards: rows of tensors with an id and a label, committed one file at a time and listed in a manifest.

A tensor is raw little-endian bytes in a ``large_binary`` column; its dtype and shape stand in the schema's metadata,
with everything that says where the rows come from. Plain pyarrow, DuckDB or polars read a shard without this project.
"""

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts import atomic_path, differences, file_hash, fingerprint, plain_name, read_json, write_json
from pipelines.storage import is_remote, read_bytes

FORMAT_VERSION = 1
METADATA_KEY = b"hdistill"
Kind = Literal["trajectories", "images", "latents", "prompts", "features"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a shard set, in memory."""

    sample_ids: np.ndarray
    """``(n,)`` int64."""
    labels: np.ndarray
    """``(n,)`` int64."""
    values: np.ndarray
    """``(n, *shape)`` in the stored dtype; a view of the file's bytes where that is possible."""

    def take(self, index: np.ndarray) -> "Rows":
        """Rows by position."""
        return Rows(sample_ids=self.sample_ids[index], labels=self.labels[index], values=self.values[index])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One committed file."""

    index: int
    """Which shard of the set; its first row is number ``index * shard_rows``."""
    file: str
    """Name within the set's directory."""
    rows: int
    sha256: str
    bytes: int = 0
    """Of the file; 0: not known, as in manifests from before it was kept."""
    seconds: float = 0.0
    """That its maker, or the makers of its parts together, worked on it; 0: not known."""


@dataclass(frozen=True, kw_only=True)
class ShardSetSpec:
    """What a shard set shall hold, before any of it is there."""

    kind: Kind
    rows: int
    shard_rows: int
    dtype: str
    """A numpy dtype name, such as float16 or uint8."""
    shape: tuple[int, ...]
    """Shape of one row's tensor."""
    inputs: dict[str, Any]
    """All that determines the rows' content; a set made from other inputs is refused."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a reader of the files wants to know besides: grid, solver, guidance."""

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return self.rows * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def ids(self, index: int) -> range:
        """Row numbers of one shard."""
        return range(index * self.shard_rows, min(self.rows, (index + 1) * self.shard_rows))

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._identity())

    def _identity(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "dtype": self.dtype,
            "shape": list(self.shape),
            **self.inputs,
        }

    def metadata(self) -> dict[str, Any]:
        """What stands in every shard's schema and in the manifest."""
        return {**self._identity(), "fingerprint": self.fingerprint, **self.details}


def write_shard(folder: Path, spec: ShardSetSpec, index: int, labels: np.ndarray, values: np.ndarray) -> Shard:
    """Commit one shard atomically.

    Args:
        labels: ``(rows,)`` int64.
        values: ``(rows, *spec.shape)`` in ``spec.dtype``.
    """
    ids = np.arange(spec.ids(index).start, spec.ids(index).stop)
    assert values.shape == (len(ids), *spec.shape) and values.dtype == spec.dtype, (values.shape, values.dtype)
    return commit_table(folder, spec, index, tensor_table(ids, labels, values))


def commit_table(folder: Path, spec: ShardSetSpec, index: int, table: pa.Table) -> Shard:
    """Commit the rows of one shard atomically, with what says where they come from."""
    described = table.replace_schema_metadata({METADATA_KEY: json.dumps(spec.metadata()).encode()})
    path = folder / f"part-{index:05d}.parquet"
    with atomic_path(path) as temporary:
        pq.write_table(described, temporary, compression="none", use_dictionary=False, write_statistics=False)
        sha256, size = file_hash(temporary), temporary.stat().st_size
    return Shard(index=index, file=path.name, rows=len(table), sha256=sha256, bytes=size)


def in_dtype(values: np.ndarray, dtype: str, what: str, also: str = "") -> np.ndarray:
    """Values as they are stored. ValueError, with ``also`` at its end, where one is not finite or does not fit."""
    if not np.abs(values).max() <= np.finfo(dtype).max:
        raise ValueError(f"{what} lie outside the range of {dtype}: set precompute.dtype=float32{also}")
    return values.astype(dtype)


def tensor_table(ids: np.ndarray, labels: np.ndarray, values: np.ndarray) -> pa.Table:
    """Rows of tensors of one shape, as the columns that `read_shard` reads."""
    contiguous = np.ascontiguousarray(values)
    width = contiguous.nbytes // len(ids)
    offsets = pa.py_buffer(np.arange(len(ids) + 1, dtype=np.int64) * width)
    column = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(ids), [None, offsets, pa.py_buffer(contiguous.data)]
    )
    columns = [pa.array(ids, pa.int64()), pa.array(labels, pa.int64()), column]
    return pa.table(columns, names=["sample_id", "label", "values"])


def read_shard(path: Path) -> Rows:
    """The rows of one shard file; no copy of the tensors' bytes is made.

    Raises:
        ValueError: it is not one of our shards.
    """
    source = readable(path)  # a store that fails says so itself
    try:
        table = pq.read_table(source, memory_map=False)
        about = json.loads(table.schema.metadata[METADATA_KEY])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no shard of this project, or is damaged: {error}") from None
    return decode(table, about["dtype"], about["shape"])


def readable(path: Path) -> Any:
    """What pyarrow reads a shard from."""
    return pa.BufferReader(read_bytes(path)) if is_remote(path) else path


def decode(table: pa.Table, dtype: str, shape: Sequence[int]) -> Rows:
    """Columns to arrays; raw bytes are viewed in place."""
    column = table.column("values")
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies even one chunk
    _, offsets, data = chunk.buffers()
    start = np.frombuffer(offsets, np.int64)[chunk.offset]
    count = len(chunk) * int(np.prod(shape))
    values = np.frombuffer(data, dtype, count=count, offset=int(start)).reshape(len(chunk), *shape)
    return Rows(sample_ids=table.column("sample_id").to_numpy(), labels=table.column("label").to_numpy(), values=values)


def _listed(manifest: Any, path: Path) -> dict[int, Shard]:
    """The shards of a manifest, by number. ValueError where it is none, or names a file outside its folder."""
    try:
        _ = manifest["fingerprint"]
        shards = [Shard(**entry) for entry in manifest["shards"]]
    except (KeyError, TypeError):
        raise ValueError(f"{path} is no manifest of shards; delete it to have them made again") from None
    for shard in shards:
        plain_name(shard.file, path)
    return {shard.index: shard for shard in shards}


def _orphans(folder: Path, spec: ShardSetSpec, listed: Container[int]) -> dict[int, Shard]:
    """Whole shards of this very set that no manifest lists."""
    named = ((re.fullmatch(r"part-(\d{5,})\.parquet", path.name), path) for path in folder.glob("part-*.parquet"))
    unlisted = {int(name[1]): path for name, path in named if name and int(name[1]) not in listed}
    found = {index: _adopted(path, spec, index) for index, path in sorted(unlisted.items()) if index < spec.num_shards}
    return {index: shard for index, shard in found.items() if shard}


def _adopted(path: Path, spec: ShardSetSpec, index: int) -> Shard | None:
    """A file as a shard; ``None`` where it is not whole, or of another set."""
    try:
        footer = pq.read_metadata(readable(path))
        about = json.loads((footer.metadata or {})[METADATA_KEY])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None
    if about.get("fingerprint") != spec.fingerprint or footer.num_rows != len(spec.ids(index)):
        return None
    return Shard(index=index, file=path.name, rows=footer.num_rows, sha256=file_hash(path), bytes=path.stat().st_size)


class ShardSet:
    """A directory of shards and its manifest."""

    def __init__(self, folder: Path, spec: ShardSetSpec, shards: Mapping[int, Shard]) -> None:
        self.folder = folder.resolve()  # a worker may stand in another directory
        self.spec, self._shards, self._unlisted = spec, dict(shards), False

    @classmethod
    def open(cls, folder: Path, spec: ShardSetSpec) -> "ShardSet":
        """The set as far as it is there; nothing is read but the manifest, and files that it does not list.

        A driver that died may have left such a file, whole: it counts as committed where it is of this very set.

        Raises:
            ValueError: the directory holds a set that was made from other inputs.
        """
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            return cls(folder, spec, {})._adopting()
        shards = _listed(manifest, folder / "manifest.json")
        if manifest["fingerprint"] != spec.fingerprint:
            made_with = {key: manifest.get(key) for key in spec.metadata() if key != "fingerprint"}
            wanted = {key: value for key, value in spec.metadata().items() if key != "fingerprint"}
            differing = "; ".join(differences(made_with, json.loads(json.dumps(wanted))))
            raise ValueError(f"{folder} holds other {spec.kind}: {differing}. Use another --run-dir, or delete it")
        return cls(folder, spec, shards)._adopting()

    def _adopting(self) -> "ShardSet":
        orphans = _orphans(self.folder, self.spec, self._shards)
        self._shards |= orphans
        self._unlisted = bool(orphans)
        return self

    @property
    def missing(self) -> list[int]:
        """Shards that are not committed."""
        return [index for index in range(self.spec.num_shards) if index not in self._shards]

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def shards(self) -> list[Shard]:
        """Committed shards in order."""
        return [self._shards[index] for index in sorted(self._shards)]

    def paths(self, indices: Iterable[int]) -> list[Path]:
        """Files of some shards."""
        return [self.folder / self._shards[index].file for index in indices]

    def damaged(self) -> list[str]:
        """Committed shards whose file is absent or no longer has its hash; they are dropped and count as missing."""
        bad = [shard for shard in self.shards if not self._whole(shard)]
        for shard in bad:
            del self._shards[shard.index]
            (self.folder / shard.file).unlink(missing_ok=True)  # else it would be adopted as whole later
        return [shard.file for shard in bad]

    def _whole(self, shard: Shard) -> bool:
        path = self.folder / shard.file
        return path.is_file() and file_hash(path) == shard.sha256

    def commit(self, shard: Shard) -> None:
        """List a written shard in the manifest."""
        self._shards[shard.index] = shard
        self._list()

    def list_adopted(self) -> None:
        """List those in the manifest that an earlier driver left unlisted, if there are any."""
        if self._unlisted:
            self._list()

    def mend(self) -> list[str]:
        """Drop what is damaged and list what was adopted; the names of what is to be made again."""
        bad = self.damaged()
        self.list_adopted()
        return bad

    def _list(self) -> None:
        self._unlisted = False
        entries = [asdict(entry) for entry in self.shards]
        listed = {**self.spec.metadata(), "complete": self.complete, "shards": entries}
        write_json(self.folder / "manifest.json", listed)

    def read(self, indices: Sequence[int]) -> Rows:
        """Rows of some shards, in that order, in memory."""
        parts = [read_shard(path) for path in self.paths(indices)]
        return Rows(
            sample_ids=np.concatenate([part.sample_ids for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            values=np.concatenate([part.values for part in parts]),
        )

    def __iter__(self) -> Iterator[Rows]:
        return (read_shard(path) for path in self.paths(range(self.spec.num_shards)))
