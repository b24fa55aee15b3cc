"""Cosines of pictures in a folder and their captions under CLIP: decoded and resized on CPUs, then the network."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.artifacts import fingerprint
from pipelines.clip import ROWS, Clip
from pipelines.feature_shards import feature_spec
from pipelines.picture_files import PictureFiles, kept_rows
from pipelines.production import Actors, InParts, Progress
from pipelines.shards import decode, tensor_table

_UNITS_IN_SHARD = 32
_CAPTION = "caption"


def picture_cosines(
    files: PictureFiles,
    captions: Sequence[str],
    clip: Clip,
    folder: Path,
    actors: Actors,
    progress: Progress = lambda _: None,
) -> np.ndarray:
    """``(n,)`` float64 of all pictures in order; what is kept in ``folder`` is not made again.

    Args:
        captions: of each picture.

    Raises:
        ValueError: a picture is damaged, or CLIP cannot be loaded.
    """
    inputs = {"clip": clip.fingerprint, "files": files.identity, "captions": fingerprint(captions)}
    spec = feature_spec(len(files), _UNITS_IN_SHARD * ROWS, np.zeros((1, 1)), inputs)
    reading = partial(_read, files, captions, clip.name)
    parts = InParts(read=reading, encoder=partial(_Encoder, name=clip.name), rows=ROWS)
    return kept_rows(folder / f"clip-{spec.fingerprint[:16]}", spec, parts, actors, progress)[:, 0]


_opened = lru_cache(maxsize=1)(Clip.of)  # one process reads many units


def _read(files: PictureFiles, captions: Sequence[str], name: str, ids: range) -> pa.Table:
    images = np.stack([_opened(name).prepared(files.read(row)) for row in ids])
    table = tensor_table(np.arange(ids.start, ids.stop), np.zeros(len(ids), np.int64), images)
    return table.append_column(_CAPTION, pa.array(captions[ids.start : ids.stop], pa.string()))


class _Encoder:
    """Holds CLIP, and makes cosines of prepared pictures and their captions."""

    def __init__(self, device: str, *, name: str) -> None:
        self._clip = Clip.of(name, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = decode(table, "float32", self._clip.shape)
        cosines = self._clip.of_prepared(rows.values, table.column(_CAPTION).to_pylist())
        return tensor_table(rows.sample_ids, rows.labels, cosines[:, None])
