"""Looking at a student while it trains: a small fixed-seed sample, its FID and spread, and how the fake score lags.

The FID of a probe is against images that are kept from training for it (data.validation), or else against the training
images, so that a checkpoint chosen by it leaves the held-out ones unseen.
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hd_core.metrics.diversity import within_class_spread
from hd_core.metrics.frechet import frechet_distance
from hd_core.metrics.statistics import Moments, merge_in_order
from hd_core.objectives.dmd import DMD
from hd_core.objectives.turns import Batch, Cast, Objective, Turn, first_step_is_analytical
from hd_core.random import Draws, fold_in, sample_labels, sample_noise
from hd_core.step import TrainState, only
from hd_core.types import Condition, FlowMap
from hd_core.walk import walk
from pipelines.artifacts import file_hash, read_json, write_arrays, write_json
from pipelines.cast import in_precision
from pipelines.checkpoints import save_weights
from pipelines.data import to_model, to_uint8
from pipelines.features import load_extractor
from pipelines.feed import real_images
from pipelines.stages import StageJob
from pipelines.storage import located
from pipelines.teachers import Teacher


class Probe:
    """Looks at one stage's student; lives on the first worker, or in a task of its own, which has no cast."""

    def __init__(self, job: StageJob, teacher: Teacher, cast: Cast | None = None) -> None:
        self.job, self.teacher, self.cast, self.config = job, teacher, cast, job.stage.probe
        images, features = job.validation or job.images, job.judged_by
        assert images is not None and features is not None
        real = images.read(range(images.spec.num_shards))
        self.extractor = load_extractor(job.features)
        self.real = merge_in_order(Moments.of(features.read([i]).values) for i in range(features.spec.num_shards))
        self.real_spread = within_class_spread(to_model(real.values), self._kinds(torch.from_numpy(real.labels.copy())))
        self.seed = fold_in(job.seed, "stage", job.name, "probe")
        ids = range(self.config.num_samples)
        self.noise = sample_noise(self.seed, ids, teacher.shape)
        self.labels = sample_labels(self.seed, ids, max(1, teacher.num_classes))

    def _kinds(self, labels: Tensor) -> Tensor:
        """What images are compared within: their class; all of them, where every one has a text of its own."""
        return labels if self.teacher.prompts is None else torch.zeros_like(labels)

    def look(self, state: TrainState) -> dict[str, float]:
        """Values of the training curve, by name."""
        values = self.values(state.average)
        if self.config.fake_score_moves and isinstance(self.job.stage.objective, DMD):
            values["probe/fake_score_lag"] = self.fake_score_lag(state, self.job.stage.objective)
        return values

    def values(self, average: torch.nn.Module) -> dict[str, float]:
        """What the samples of a network are worth."""
        samples = self.sample(average)  # pyright: ignore[reportArgumentType]
        images = to_uint8(samples)
        return {
            "probe/fid": frechet_distance(Moments.of(self.extractor(images)), self.real),
            "probe/diversity": within_class_spread(samples, self._kinds(self.labels)) / max(self.real_spread, 1e-12),
        }

    @torch.no_grad()
    def sample(self, student: FlowMap, size: int = 500) -> Tensor:
        """The fixed noises' images in [-1, 1], on the CPU."""
        device, parts = self.teacher.device, []
        for noise, labels in zip(self.noise.split(size), self.labels.split(size), strict=True):
            condition = self.teacher.condition(labels).to(device)
            drawn = _samples(self.job.stage.objective, student, noise.to(device), condition)
            parts.append(self.teacher.decoded(drawn).cpu())
        return torch.cat(parts)

    def fake_score_lag(self, state: TrainState, objective: DMD) -> float:
        """The fake score's loss over a converged one's, minus 1: a copy is trained on while the generator rests."""
        assert self.cast is not None
        converged = copy.deepcopy(state.players["fake_score"])
        networks = [player.network for player in state.players.values()]
        followed = replace(self.cast, fake_score=in_precision(converged.network, self.job.train.autocast))
        for step in range(self.config.fake_score_moves):
            turn = self._fake_turn(objective, followed, state.step, step)
            with only(converged.network, [*networks, converged.network]):
                converged.optimizer.zero_grad(set_to_none=True)
                turn.terms().total.backward()
                converged.optimizer.step()
        losses = [self._held_out_losses(objective, cast, state.step) for cast in (self.cast, followed)]
        return losses[0] / losses[1] - 1

    @torch.no_grad()
    def _held_out_losses(self, objective: DMD, cast: Cast, step: int, batches: int = 8) -> float:
        turns = (self._fake_turn(objective, cast, step, -1 - number) for number in range(batches))
        return float(sum(turn.terms().total for turn in turns)) / batches

    def _fake_turn(self, objective: DMD, cast: Cast, step: int, number: int) -> Turn:
        """The fake score's turn of an iteration in which the generator rests, on noises of the probe's own."""
        rows = self.job.stage.batch_size
        seed = fold_in(self.seed, "lag", step, number)
        draws = Draws(seed=seed, rows=slice(0, rows), total=rows, device=self.teacher.device)
        resting = replace(objective, update_ratio=2, regression_weight=0.0)
        condition = self.teacher.condition(draws.integers("labels", max(1, self.teacher.num_classes)))
        noise = objective.sampling_grid()[0].item() * draws.normal("noise", self.teacher.shape)
        batch = Batch(noise=noise, condition=condition)
        return next(turn for turn in resting.turns(cast, batch, draws, step=1) if turn.player == "fake_score")


def _samples(objective: Objective, student: FlowMap, noise: Tensor, condition: Condition) -> Tensor:
    """What a student makes of noises, on the times of its objective."""
    grid = objective.sampling_grid()
    first = (grid[0] * noise).to(noise)
    return walk(student, grid, first, condition, afs=first_step_is_analytical(objective))


class BestWeights:
    """The average with the best FID of a probe so far, on disk from the moment it is found."""

    def __init__(self, job: StageJob) -> None:
        folder = located(job.folder)
        self.weights, self.about = folder / "student-best.safetensors", folder / "best.json"
        self.inputs = job.identity()
        stored = self._stored()
        self.step: int | None = stored["step"] if stored else None
        self.fid: float = stored["fid"] if stored else float("inf")

    def _stored(self) -> dict[str, Any] | None:
        """What is on disk, if it is whole and of this training."""
        stored = read_json(self.about)
        if stored is None or stored["inputs"] != self.inputs or not self.weights.is_file():
            return None
        return stored if file_hash(self.weights) == stored["sha256"] else None

    def offer(self, step: int, fid: float, average: torch.nn.Module) -> bool:
        """Keep these weights if they are better than all before."""
        if not fid < self.fid:
            return False
        self.step, self.fid = step, fid
        sha256 = save_weights(self.weights, average)
        write_json(self.about, {"step": step, "fid": fid, "sha256": sha256, "inputs": self.inputs})
        return True


@torch.no_grad()
def save_looks(
    job: StageJob, teacher: Teacher, state: TrainState, cast: Cast, *, write: bool = True, rows: int = 32
) -> None:
    """Write what the discriminator says of some generated and some real images: images, logits and token weights.

    Where networks are split among workers, all of them must call it, and one of them writes.
    """
    assert job.real is not None and isinstance(job.stage.objective, DMD)
    seed, objective = fold_in(job.seed, "stage", job.name, "looks"), job.stage.objective
    noise = sample_noise(seed, range(rows), teacher.shape)
    labels = sample_labels(seed, range(rows), max(1, teacher.num_classes))
    state.players["discriminator"].network.eval()  # a look must not move spectral norm's estimates
    first, condition = job.real.read([0]), teacher.condition(labels).to(teacher.device)
    first = first.take(np.arange(min(rows, len(first.labels))))
    fake = _samples(objective, state.average, noise.to(teacher.device), condition)  # pyright: ignore[reportArgumentType]
    posterior = Draws(seed=seed, rows=slice(0, len(first.labels)), total=len(first.labels))
    real = real_images(teacher, first, posterior).to(teacher.device)
    real_condition = teacher.condition(torch.from_numpy(first.labels.copy())).to(teacher.device)
    arrays: dict[str, Any] = {}
    for kind, images, asked in (("fake", fake, condition), ("real", real, real_condition)):
        draws = Draws(seed=seed, rows=slice(0, len(images)), total=len(images), device=teacher.device)
        judged = objective.adversarial.judge(cast, images, asked, draws, "look")
        arrays[f"{kind}_images"] = to_uint8(teacher.decoded(images))
        arrays[f"{kind}_logits"], arrays[f"{kind}_weights"] = judged.logits.cpu().numpy(), judged.weights.cpu().numpy()
    if write:
        write_arrays(job.looks, **arrays)
