"""Features of a generator's samples as shards: a row is a sample id's, under every net that is asked for.

One shard is one block of ids that are sampled together. It holds the features, where CLIP was asked for each sample's
cosine with its prompt, and of the first samples the pictures.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.clip import Clip
from pipelines.data import Pixels, to_uint8
from pipelines.extractor import Extractor
from pipelines.features import load_extractor
from pipelines.generators import Generator, make_painter, texts_of
from pipelines.shards import Shard, ShardSet, ShardSetSpec, commit_table, readable, tensor_table
from pipelines.teachers import Teacher, TeacherConfig, load_teacher

PICTURE = "picture"
"""Column of a sample's raw pixels, uint8 (h, w, c); null past those that are kept."""
COSINE = "clip_cosine"
"""Column of the cosine of a sample and its prompt under CLIP, float64; absent where it was not asked for."""


def feature_spec(rows: int, block: int, features: np.ndarray, inputs: dict[str, Any]) -> ShardSetSpec:
    """What the features of a generator's samples are.

    Args:
        rows: samples.
        block: samples that are drawn at once.
        features: some features, ``(n, d)`` under all nets together.
        inputs: all that determines them.
    """
    return ShardSetSpec(
        kind="features",
        rows=rows,
        shard_rows=block,
        dtype=features.dtype.name,
        shape=features.shape[1:],
        inputs=inputs,
        details={"layout": ["feature"]},
    )


@dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """A generator, and where the features of its samples go."""

    generator: Generator
    shards: ShardSet


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """What every generator is asked for."""

    seed: int
    labels: np.ndarray
    """``(rows,)`` int64, of all samples."""
    pictures: int
    """The first samples whose pixels are kept."""


class FeatureMaker:
    """Holds a generator, feature nets and CLIP, and makes shards of its samples' features."""

    def __init__(
        self,
        job: FeatureJob,
        draw: Draw,
        teacher: Teacher,
        extractors: Sequence[Extractor],
        clip: Clip | None = None,
    ) -> None:
        self._shards, self._draw, self._extractors = job.shards, draw, extractors
        self._teacher, self._clip = teacher, clip
        self.samples = make_painter(job.generator, teacher, draw.seed, draw.labels)
        """Images in [-1, 1] of some sample ids, ``(b, c, h, w)``."""

    def shard(self, index: int) -> Shard:
        """Sample a block and commit its features; the shard's seconds are those of sampling alone."""
        spec, (images, seconds) = self._shards.spec, self.block(index)
        ids = spec.ids(index)
        features = np.concatenate([extractor(images) for extractor in self._extractors], axis=1)
        table = tensor_table(np.arange(ids.start, ids.stop), self._draw.labels[ids.start : ids.stop], features)
        table = table.append_column(PICTURE, self._kept(images, ids))
        if self._clip:
            table = table.append_column(COSINE, pa.array(self._clip(images, self._texts(ids)), pa.float64()))
        return replace(commit_table(self._shards.folder, spec, index, table), seconds=seconds)

    def block(self, index: int) -> tuple[Pixels, float]:
        """Samples of a block, and the seconds that they took."""
        started = time.perf_counter()
        return to_uint8(self.samples(self._shards.spec.ids(index))), time.perf_counter() - started

    def _texts(self, ids: range) -> list[str]:
        texts = texts_of(self._teacher, self._draw.labels[ids.start : ids.stop].tolist())
        assert texts is not None  # CLIP is refused where the teacher reads no text
        return texts

    def _kept(self, images: Pixels, ids: range) -> pa.Array:
        kept = [image.tobytes() for image in images[: max(0, self._draw.pictures - ids.start)]]
        return pa.array([*kept, *[None] * (len(ids) - len(kept))], pa.large_binary())


class FeatureMakers:
    """The same for several generators, whose shards are numbered on; holds one of them at a time."""

    def __init__(
        self,
        jobs: Sequence[FeatureJob],
        draw: Draw,
        teacher: Teacher,
        extractors: Sequence[Extractor],
        clip: Clip | None = None,
    ) -> None:
        self._jobs, self._numbers = jobs, numbered([job.shards for job in jobs])
        self._open = lru_cache(maxsize=1)(lambda place: FeatureMaker(jobs[place], draw, teacher, extractors, clip))

    def shard(self, index: int) -> Shard:
        """Make the shard of a number."""
        place, local = self._numbers[index]
        return replace(self.of(place).shard(local), index=index)

    def of(self, place: int) -> FeatureMaker:
        """The maker of one generator."""
        return self._open(place)


def load_feature_makers(
    device: str, *, teacher: TeacherConfig, prompts: ShardSet | None, nets: Sequence[str], clip: str = "", **rest: Any
) -> FeatureMakers:
    """`FeatureMakers` in another process: the teacher, the feature nets and CLIP are loaded there, once."""
    extractors, judge = [load_extractor(net, device) for net in nets], Clip.of(clip, device) if clip else None
    reader = load_teacher(teacher, prompts).to(device)
    return FeatureMakers(teacher=reader, extractors=extractors, clip=judge, **rest)


def numbered(sets: Sequence[ShardSet]) -> list[tuple[int, int]]:
    """Every shard of some sets in order, as the set's place and the shard's number in it."""
    return [(place, local) for place, shards in enumerate(sets) for local in range(shards.spec.num_shards)]


class Joined:
    """Several shard sets as one that can be produced."""

    def __init__(self, sets: Sequence[ShardSet], complete: Callable[[int], None]) -> None:
        """``complete`` is told of the place of a set that was made whole."""
        self._sets, self._numbers, self._complete = sets, numbered(sets), complete

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not committed."""
        absent = {(place, local) for place, shards in enumerate(self._sets) for local in shards.missing}
        return [index for index, which in enumerate(self._numbers) if which in absent]

    def commit(self, shard: Shard) -> None:
        """List a written shard in its set's manifest."""
        place, local = self._numbers[shard.index]
        self._sets[place].commit(replace(shard, index=local))
        if self._sets[place].complete:
            self._complete(place)


def read_pictures(shards: ShardSet, shape: Sequence[int], count: int) -> Pixels:
    """The first samples' pixels, ``(count, *shape)``."""
    kept = _column(shards, PICTURE, range(-(-count // shards.spec.shard_rows)))
    raw = [value.as_py() for value in kept if value.is_valid]
    return np.frombuffer(b"".join(raw), np.uint8).reshape(len(raw), *shape)


def read_cosines(shards: ShardSet) -> np.ndarray:
    """``(rows,)`` float64 of all samples, in the order of their ids."""
    return _column(shards, COSINE, range(shards.spec.num_shards)).to_numpy()


def _column(shards: ShardSet, name: str, blocks: range) -> pa.ChunkedArray:
    tables = [pq.read_table(readable(path), columns=[name]) for path in shards.paths(blocks)]
    return pa.concat_tables(tables).column(name)
