"""The worker loop of a stage, the same for every objective and any number of workers."""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hd_core.objectives.dmd import DMD
from hd_core.objectives.turns import Batch
from hd_core.random import Draws
from hd_core.step import train_step
from pipelines.artifacts import atomic_path, file_hash, write_json
from pipelines.cast import build
from pipelines.checkpoints import load_latest, remove_checkpoints, save_checkpoint, save_weights
from pipelines.feed import Feed
from pipelines.probing import BestWeights, Probe, save_looks
from pipelines.process import default_device
from pipelines.stability import Collapsed, StopRule
from pipelines.stages import Curve, Logged, StageJob, TrainConfig, step_seed
from pipelines.teachers import load_teacher


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Whom to tell how training goes; called on the first worker only."""

    progress: Callable[[int], None] = lambda _step: None
    logged: Callable[[int, Logged], None] = lambda _step, _values: None
    note: Callable[[str], None] = lambda _text: None
    done: Callable[[], object] = lambda: None
    """The stage is trained, or stops for good in this process: what waits to be told can be told now."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The workers that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Group":
        """This worker's place, as Ray Train tells it."""
        from ray.train import get_context

        context = get_context()
        return cls(rank=context.get_world_rank(), size=context.get_world_size())

    def rows(self, batch_size: int) -> slice:
        """This worker's rows of a global batch.

        Raises:
            ValueError: the batch does not divide among the workers.
        """
        if batch_size % self.size:
            raise ValueError(f"batch_size {batch_size} does not divide among {self.size} workers")
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average(self, tensors: list[Tensor]) -> None:
        """Average tensors over the workers, in place, as one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the workers."""
        found = value.detach().clone()
        self.average([found])
        return found

    def first(self, found: Exception | None) -> Exception | None:
        """What the first worker that found something found; the same on every worker."""
        if self.size == 1:
            return found
        everyone: list[Exception | None] = [None] * self.size
        torch.distributed.all_gather_object(everyone, found)
        return next(filter(None, everyone), None)

    def wait(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            torch.distributed.barrier()


def _device(train: TrainConfig) -> str:
    if train.num_workers and not train.gpus_per_worker:
        return "cpu"
    return default_device()


class StageTrainer:
    """The worker loop of one stage."""

    def __init__(self, job: StageJob, group: Group, watch: Watch) -> None:
        self.job, self.group, self.watch = job, group, watch
        self.rows = group.rows(job.stage.batch_size)
        self.device = _device(job.train)
        self.teacher = load_teacher(job.teacher, job.prompts).to(self.device)
        self.state, self.cast = build(job, self.teacher, group.mean)
        self.recent, self.rule = _Recent(), StopRule(job.stage.stop)
        leads = group.rank == 0 and job.stage.probe.every > 0
        self.probe = Probe(job, self.teacher, self.cast) if leads else None
        self.best = BestWeights(job) if leads else None

    def restore(self) -> None:
        """Go to the last whole checkpoint, if there is one.

        Raises:
            ValueError: it was made from other inputs.
        """
        damaged = load_latest(self.job.checkpoints, self.state, self.job.inputs)
        if damaged:
            self.watch.note(f"stage {self.job.name}: damaged checkpoint {', '.join(damaged)} passed over")

    def run(self) -> None:
        """Train to the end, then leave the average behind as the stage's result."""
        curve = Curve(self.job.curve, self.state.step) if self.group.rank == 0 else None
        feed = Feed(self.job, self.teacher, self.rows, self.state.step)
        for point in curve.kept if curve else []:
            self.rule.see(point)
        before, started = curve.seconds if curve else 0.0, time.perf_counter()
        self.watch.progress(self.state.step)
        for batch in feed.batches(self.job.stage.num_steps):
            self._iterate(batch.to(self.device), curve, lambda: before + time.perf_counter() - started)
        if self.group.rank == 0:
            self._finish(before + time.perf_counter() - started)
        self.group.wait()

    def _iterate(self, batch: Batch, curve: "Curve | None", seconds: Callable[[], float]) -> None:
        stage, step = self.job.stage, self.state.step
        draws = Draws(seed=step_seed(self.job, step), rows=self.rows, total=stage.batch_size, device=self.device)
        logged = train_step(
            self.state,
            stage.objective,
            self.cast,
            batch,
            draws,
            progress=step / stage.num_steps,
            synchronise=self.group.average,
        )
        self.recent.add(logged)
        done, last = self.state.step, self.state.step == stage.num_steps
        checkpoint = done % stage.checkpoint_every == 0 and not last
        probed = stage.probe.every > 0 and (done % stage.probe.every == 0 or last)
        if done % stage.log_every == 0 or checkpoint or last or probed or done == 1:
            self._log(done, curve, seconds, probed=probed)
        if checkpoint and self.group.rank == 0:
            save_checkpoint(self.job.checkpoints, self.state, self.job.inputs)
        self.watch.progress(done)

    def _look(self, step: int) -> Logged:
        """What the first worker's probe sees; the best weights so far are kept.

        Raises:
            FloatingPointError: on every worker, where the student's samples are not finite.
        """
        values = self.probe.look(self.state) if self.probe else {}
        diverged = self.group.first(self._divergence(step, values))
        if diverged:
            raise diverged
        if self.best:
            self.best.offer(step, values["probe/fid"], self.state.average)
        return values

    def _log(self, step: int, curve: "Curve | None", seconds: Callable[[], float], *, probed: bool) -> None:
        means = self.recent.means()
        values = torch.stack(list(means.values()))
        self.group.average([values])
        numbers = dict(zip(means, values.tolist(), strict=True))
        if diverged := self._divergence(step, numbers):
            raise diverged
        numbers |= self._look(step) if probed else {}
        if curve:
            curve.add(step, {**numbers, "seconds": seconds()})
            self.watch.logged(step, numbers)
        self._stop_collapse(step, self.rule.see(numbers) if curve else None)

    def _divergence(self, step: int, values: Logged) -> FloatingPointError | None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return None
        return FloatingPointError(
            f"stage {self.job.name} diverged: {', '.join(bad)} is not finite at step {step}. The last checkpoint is"
            " kept; a lower learning rate or max_grad_norm usually helps"
        )

    def _stop_collapse(self, step: int, sign: str | None) -> None:
        """Raises Collapsed, on every worker, where the first one has seen a sign."""
        if sign:
            self._save_looks()  # of all stages, this one's are worth seeing
        found = self.group.first(Collapsed(self._farewell(step, sign)) if sign else None)
        if found:
            raise found

    def _farewell(self, step: int, sign: str) -> str:
        best, kept = self.best, ""
        if best is not None and best.step is not None:
            kept = f" The best weights so far, of step {best.step}, are in {best.weights}."
        return (
            f"stage {self.job.name} was stopped at step {step}: {sign}.{kept} Train on regardless with --set"
            f" stages.{self.job.name}.stop.enabled=false"
        )

    def _finish(self, seconds: float) -> None:
        self._save_looks()
        result = {
            "inputs": self.job.inputs,
            "start_sha256": self.job.start_hash(),
            **self._pass_on(),
            "train_seconds": seconds,
            "steps": self.state.step,
        }
        write_json(self.job.manifest, result)
        remove_checkpoints(self.job.checkpoints)

    def _pass_on(self) -> dict[str, Any]:
        """Write the weights that others start from: the last, or the best. What the manifest is to say of them."""
        job, best = self.job, self.best
        if best is None or best.step is None:
            return {"sha256": save_weights(job.weights, self.state.average)}
        about = {"best_step": best.step, "best_probe_fid": best.fid, "kept": job.stage.probe.keep}
        if job.stage.probe.keep == "last":
            return {**about, "sha256": save_weights(job.weights, self.state.average)}
        save_weights(job.other_weights, self.state.average)
        with atomic_path(job.weights) as temporary:
            shutil.copyfile(best.weights, temporary)
        return {**about, "sha256": file_hash(job.weights)}

    def _save_looks(self) -> None:
        """What the discriminator says of some generated and real images at the end."""
        if "discriminator" in self.state.players and isinstance(self.job.stage.objective, DMD):
            save_looks(self.job, self.teacher, self.state, self.cast)


class _Recent:
    """Means of what was logged since the last point of the curve: some players move in some iterations only."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, logged: Mapping[str, Tensor]) -> None:
        """One iteration's scalars."""
        for name, value in logged.items():
            self._values.setdefault(name, []).append(value.float())

    def means(self) -> dict[str, Tensor]:
        """The means, after which it starts anew."""
        values, self._values = self._values, {}
        return {name: torch.stack(some).mean() for name, some in sorted(values.items())}
