"""Features of pictures in a folder, of any sizes, as clean-fid has them: decoded and resized on CPUs, then the net."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.artifacts import fingerprint
from pipelines.data_config import DataConfig
from pipelines.extractor import Extractor, resized
from pipelines.feature_shards import feature_spec
from pipelines.features import load_extractor
from pipelines.pictures import FORMATS, BadPicture, Picture, as_bad
from pipelines.production import Actors, InParts, Progress, produce_rest
from pipelines.shards import ShardSet, ShardSetSpec, decode, tensor_table
from pipelines.sources import FolderSource

_UNITS_IN_SHARD = 32


@dataclass(frozen=True)
class PictureFiles:
    """A folder of pictures; a first folder below it is a category."""

    folder: str

    @cached_property
    def source(self) -> FolderSource:
        """The files in the order of their paths. ValueError where there are none."""
        return FolderSource(DataConfig(kind="folder", path=self.folder))

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def identity(self) -> str:
        """Of names, sizes and times of writing: pictures that change are looked at again."""
        stats = [(name, (self.source.root / name).stat()) for name in self.source.names]
        return fingerprint([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])

    @cached_property
    def categories(self) -> dict[str, np.ndarray]:
        """Rows of each first folder below the root; empty where pictures lie in the root itself."""
        names = np.array([name.partition("/")[0] for name in self.source.names])
        if self.source.labels is None:
            return {}
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}

    def read(self, row: int) -> Picture:
        """One picture in colour, as clean-fid decodes it. ValueError names the file where it is damaged."""
        try:
            with self.source.open(row) as stream, as_bad(), Image.open(stream, formats=FORMATS) as opened:
                return np.asarray(opened.convert("RGB"))
        except BadPicture as bad:
            raise ValueError(f"{self.source.name(row)} is no whole picture: {bad}") from None


def picture_features(
    files: PictureFiles, net: str, extractor: Extractor, folder: Path, actors: Actors, progress: Progress
) -> np.ndarray:
    """``(n, d)`` of all pictures in order; what is kept in ``folder`` is not made again.

    Args:
        net: how a process elsewhere loads the extractor.

    Raises:
        ValueError: a picture is damaged, or is not for this net.
    """
    some = extractor.of_resized(_prepared(files, 0, extractor.size, extractor.shape)[None])
    inputs = {"feature_net": extractor.fingerprint, "files": files.identity}
    rows = min(extractor.rows_at_once, 32)
    spec = feature_spec(len(files), _UNITS_IN_SHARD * rows, some, inputs)
    reading = partial(_read, files, extractor.size, extractor.shape)
    parts = InParts(read=reading, encoder=partial(_Encoder, net=net), rows=rows)
    return kept_rows(folder / f"{extractor.name}-{spec.fingerprint[:16]}", spec, parts, actors, progress)


def kept_rows(folder: Path, spec: ShardSetSpec, parts: InParts, actors: Actors, progress: Progress) -> np.ndarray:
    """``(n, *spec.shape)`` of all rows of a set that is kept in a folder; what is missing there is made."""
    shards = ShardSet.open(folder, spec)
    shards.mend()
    if not shards.complete:
        produce_rest(shards, parts, actors, progress)
    return shards.read(range(spec.num_shards)).values


def _read(files: PictureFiles, size: int, only: tuple[int, int, int] | None, ids: range) -> pa.Table:
    images = np.stack([_prepared(files, row, size, only) for row in ids])
    return tensor_table(np.arange(ids.start, ids.stop), np.zeros(len(ids), np.int64), images)


def _prepared(files: PictureFiles, row: int, size: int, only: tuple[int, int, int] | None) -> np.ndarray:
    """A picture as the net takes it. ValueError where the net takes no other size than its own."""
    image = files.read(row)
    height, width = image.shape[:2]
    if only and (height, width) != only[1:]:
        raise ValueError(
            f"{files.source.name(row)} is {width}x{height}, and the feature net takes {only[2]}x{only[1]} alone: use"
            " inception, or train a net on pictures of that size with `hdistill features`"
        )
    return resized(image, size)


class _Encoder:
    """Holds a feature net, and makes features of resized pictures."""

    def __init__(self, device: str, *, net: str) -> None:
        self._extractor = load_extractor(net, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        size = self._extractor.size
        rows = decode(table, "float32", (3, size, size))
        return tensor_table(rows.sample_ids, rows.labels, self._extractor.of_resized(rows.values))
