"""Batches of a stage: rows of its shards in the planned order, or fresh noise."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from hd_core.objectives.turns import Batch
from hd_core.random import Draws, fold_in
from hd_core.types import Condition, Images
from pipelines.batches import BatchPlan, resident, streamed
from pipelines.data import to_model
from pipelines.shards import Rows, ShardSet
from pipelines.stages import StageJob, step_seed
from pipelines.teachers import Teacher


def batch_plan(job: StageJob, shards: ShardSet) -> BatchPlan:
    """The order in which a stage reads a shard set.

    Raises:
        ValueError: the batch is larger than the data.
    """
    return BatchPlan(
        shard_sizes=tuple(shard.rows for shard in shards.shards),
        batch_size=job.stage.batch_size,
        seed=fold_in(job.seed, "stage", job.name, "order", shards.spec.kind),
    )


class Feed:
    """Batches of a stage from a step on."""

    def __init__(self, job: StageJob, teacher: Teacher, rows: slice, first_step: int) -> None:
        self.job, self.teacher, self.rows, self.first_step = job, teacher, rows, first_step
        self.bytes_read = 0
        """Of shards, so far."""

    def batches(self, last_step: int) -> Iterator[Batch]:
        """This worker's rows of each step's batch."""
        needs = self.job.stage.objective.needs
        trajectories = self._rows(self.job.trajectories, last_step) if "trajectories" in needs else None
        images = self._rows(self.job.real, last_step) if "images" in needs else None
        for step in range(self.first_step, last_step):
            batch = self._from_noise(step) if trajectories is None else self._from_trajectory(next(trajectories))
            yield batch if images is None else self._with_images(batch, next(images), step)

    def _rows(self, shards: ShardSet | None, last_step: int) -> Iterator[Rows]:
        assert shards is not None
        plan = batch_plan(self.job, shards)
        if shards.spec.bytes <= self.job.train.resident_bytes:
            self.bytes_read += shards.spec.bytes
            return resident(shards, plan, self.first_step, self.rows)
        return self._counted(streamed(shards, plan, self.first_step, last_step, self.rows))

    def _counted(self, parts: Iterator[Rows]) -> Iterator[Rows]:
        for rows in parts:
            self.bytes_read += rows.values.nbytes
            yield rows

    def _from_noise(self, step: int) -> Batch:
        draws = self._draws(step)
        labels = draws.integers("labels", max(1, self.teacher.num_classes))
        first = float(self.job.stage.objective.sampling_grid()[0])  # the state there is the noise times it
        return Batch(noise=first * draws.normal("noise", self.teacher.shape), condition=self.teacher.condition(labels))

    def _draws(self, step: int) -> Draws:
        return Draws(seed=step_seed(self.job, step), rows=self.rows, total=self.job.stage.batch_size)

    def _from_trajectory(self, rows: Rows) -> Batch:
        assert self.job.trajectories is not None
        states = torch.from_numpy(rows.values.astype("float32"))
        times = torch.tensor(self.job.trajectories.spec.details["times"], dtype=torch.float64)
        condition = self._condition(rows)
        return Batch(noise=states[:, 0], condition=condition, states=states, grid=times)

    def _with_images(self, batch: Batch, rows: Rows, step: int) -> Batch:
        real = real_images(self.teacher, rows, self._draws(step))
        return replace(batch, images=real, images_condition=self._condition(rows))

    def _condition(self, rows: Rows) -> Condition:
        return self.teacher.condition(torch.from_numpy(rows.labels.copy()))


def real_images(teacher: Teacher, rows: Rows, draws: Draws) -> Images:
    """Real images as the teacher's flow has them: pixels in [-1, 1], or a draw of each latent's posterior."""
    if teacher.codec is None:
        return to_model(rows.values)
    stored = torch.from_numpy(rows.values.astype("float32"))
    return teacher.codec.drawn(stored, draws.normal("posterior", teacher.shape))
