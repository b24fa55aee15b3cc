"""Features of a generator's samples as shards: a row is a sample id's, under every net that is asked for.

One shard is one block of ids that are sampled together. It holds the features, and of the first samples the pictures.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hd_core.random import sample_noise
from pipelines.data import Pixels, to_uint8
from pipelines.features import Extractor, load_extractor
from pipelines.generators import Generator, evaluation_seed, make_sampler
from pipelines.shards import Shard, ShardSet, ShardSetSpec, commit_table, readable, tensor_table
from pipelines.teachers import Teacher, TeacherConfig, load_teacher

PICTURE = "picture"
"""Column of a sample's raw pixels, uint8 (h, w, c); null past those that are kept."""


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


class FeatureMaker:
    """Holds a generator and feature nets, and makes shards of its samples' features."""

    def __init__(
        self,
        *,
        shards: ShardSet,
        teacher: Teacher,
        extractors: Sequence[Extractor],
        generator: Generator,
        seed: int,
        labels: np.ndarray,
        pictures: int,
    ) -> None:
        """``labels`` are of all samples, ``pictures`` the number of them whose pixels are kept."""
        self._shards, self._teacher, self._extractors = shards, teacher, extractors
        self._generator, self._seed, self._labels, self._pictures = generator, seed, labels, pictures
        self._sampler = make_sampler(generator, teacher)

    def shard(self, index: int) -> Shard:
        """Sample a block and commit its features; the shard's seconds are those of sampling alone."""
        spec, (images, seconds) = self._shards.spec, self.block(index)
        ids = spec.ids(index)
        features = np.concatenate([extractor(images) for extractor in self._extractors], axis=1)
        table = tensor_table(np.arange(ids.start, ids.stop), self._labels[ids.start : ids.stop], features)
        table = table.append_column(PICTURE, self._kept(images, ids))
        return replace(commit_table(self._shards.folder, spec, index, table), seconds=seconds)

    def block(self, index: int) -> tuple[Pixels, float]:
        """Samples of a block, and the seconds that they took."""
        started = time.perf_counter()
        return to_uint8(self.samples(self._shards.spec.ids(index))), time.perf_counter() - started

    def samples(self, ids: range) -> Tensor:
        """Images in [-1, 1] of some sample ids, ``(b, c, h, w)``."""
        teacher = self._teacher
        noise = sample_noise(evaluation_seed(self._seed), ids, teacher.shape).to(teacher.device)
        labels = torch.tensor(self._labels[ids.start : ids.stop])
        condition = teacher.condition(labels).to(teacher.device)
        return teacher.decoded(self._sampler(self._generator.grid[0] * noise, condition))

    def _kept(self, images: Pixels, ids: range) -> pa.Array:
        kept = [image.tobytes() for image in images[: max(0, self._pictures - ids.start)]]
        return pa.array([*kept, *[None] * (len(ids) - len(kept))], pa.large_binary())


def load_feature_maker(
    device: str, *, teacher: TeacherConfig, prompts: ShardSet | None, nets: Sequence[str], **rest: Any
) -> FeatureMaker:
    """A `FeatureMaker` in another process: its teacher and its feature nets are loaded there."""
    extractors = [load_extractor(net) for net in nets]
    return FeatureMaker(teacher=load_teacher(teacher, prompts).to(device), extractors=extractors, **rest)


def read_pictures(shards: ShardSet, shape: Sequence[int], count: int) -> Pixels:
    """The first samples' pixels, ``(count, *shape)``."""
    blocks = range(-(-count // shards.spec.shard_rows))
    columns = [pq.read_table(readable(path), columns=[PICTURE]).column(PICTURE) for path in shards.paths(blocks)]
    raw = [value.as_py() for column in columns for value in column if value.is_valid]
    return np.frombuffer(b"".join(raw), np.uint8).reshape(len(raw), *shape)
