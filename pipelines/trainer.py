"""The worker loop of a stage, the same for every objective and any number of workers."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hd_core.objectives.dmd import DMD
from hd_core.objectives.turns import Batch
from hd_core.random import Draws
from hd_core.step import train_step
from pipelines.artifacts import atomic_path, file_hash, write_json
from pipelines.calls import calls_per_row
from pipelines.cast import build
from pipelines.checkpoints import Saver, load_latest, remove_checkpoints, snapshot, weights_of, write_tensors
from pipelines.costs import keep_worker_costs
from pipelines.curve import Curve
from pipelines.feed import Feed
from pipelines.group import Group
from pipelines.probing import BestWeights, Probe, save_looks
from pipelines.process import default_device
from pipelines.scoring import leave, scores, waiting
from pipelines.stability import Collapsed, StopRule
from pipelines.stages import Logged, StageJob, TrainConfig, step_seed
from pipelines.storage import local_copy, located, remove_tree
from pipelines.teachers import load_teacher


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Whom to tell how training goes; called on the first worker only."""

    progress: Callable[[int], None] = lambda _step: None
    logged: Callable[[int, Logged], None] = lambda _step, _values: None
    note: Callable[[str], None] = lambda _text: None
    done: Callable[[], object] = lambda: None
    """The stage is trained, or stops for good in this process: what waits to be told can be told now."""


class Report(Protocol):
    """Tells the group's controller how far training is; every worker calls it at the same moments."""

    def __call__(self, step: int, values: Logged, *, score: bool) -> None:
        """``score``: an average was left that is to be scored beside training."""
        ...

    def wait(self) -> None:
        """Return when all that was to be scored is."""
        ...

    def leaving(self) -> tuple[str, ...]:
        """Machines of the group that are about to be taken away, as all workers agree."""
        ...


class _NoReport:
    def __call__(self, step: int, values: Logged, *, score: bool) -> None: ...
    def wait(self) -> None: ...
    def leaving(self) -> tuple[str, ...]:
        return ()


def _device(train: TrainConfig) -> str:
    if train.num_workers and not train.gpus_per_worker:
        return "cpu"
    return default_device()


class StageTrainer:
    """The worker loop of one stage."""

    def __init__(self, job: StageJob, group: Group, watch: Watch, report: Report | None = None) -> None:
        self.born = time.perf_counter()
        self.job, self.group, self.watch, self.report = job, group, watch, report or _NoReport()
        self.rows = group.rows(job.stage.batch_size)
        self.passes = group.passes(job.stage.batch_size, job.train.micro_batch_size)
        self.device = _device(job.train)
        self.teacher = load_teacher(job.teacher, job.prompts).to(self.device)
        self.state, self.cast = build(job, self.teacher, group)
        self.recent, self.rule = _Recent(), StopRule(job.stage.stop)
        self.saver = Saver(job.checkpoints, job.inputs, job.train.keep_checkpoints)
        probes = group.leads and job.stage.probe.every > 0
        self.probe = Probe(job, self.teacher, self.cast) if probes and not job.scored_beside else None
        self.best = BestWeights(job) if probes else None
        self.leaving: tuple[str, ...] = ()
        self.waited, self.calls, self.bytes_left = 0.0, 0, 0
        """Seconds that this worker has waited for batches, its network calls, and bytes of the weights that it left."""
        self.now = job.stage
        """The stage with what has changed by this iteration."""

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
        curve = Curve(self.job.curve, self.state.step) if self.group.leads else None
        self.feed = feed = Feed(self.job, self.teacher, self.rows, self.state.step)
        for point in curve.kept if curve else []:
            self.rule.see(point)
        before, started = curve.seconds if curve else 0.0, time.perf_counter()
        self._follow(self.state.step)
        self.watch.progress(self.state.step)
        self._bill()
        self._report_unscored()
        with self.saver:
            for batch in self._timed(feed.batches(self.job.stage.num_steps)):
                self._iterate(batch.to(self.device), curve, lambda: before + time.perf_counter() - started)
        self._finish(curve, before + time.perf_counter() - started)
        self._bill()
        self.group.wait()

    def _bill(self) -> None:
        """Keep what this worker has spent in its life."""
        keep_worker_costs(
            located(self.job.folder),
            self.group.rank,
            worker_seconds=time.perf_counter() - self.born,
            waiting_seconds=self.waited,
            network_calls=float(self.calls),
            bytes_read=float(self.feed.bytes_read),
            bytes_written=float(self.saver.bytes_written + self.bytes_left),
        )

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def _iterate(self, batch: Batch, curve: "Curve | None", seconds: Callable[[], float]) -> None:
        stage, step = self.job.stage, self.state.step
        if step in stage.later:
            self._follow(step)
        draws = Draws(seed=step_seed(self.job, step), rows=self.rows, total=stage.batch_size, device=self.device)
        logged = train_step(
            self.state,
            self.now.objective,
            self.cast,
            batch,
            draws,
            progress=step / stage.num_steps,
            synchronise=self.group.average,
            workers=self.group.size,
            passes=self.passes,
        )
        self.recent.add(logged)
        self.calls += (self.rows.stop - self.rows.start) * calls_per_row(self.now, self.job.guidance_scale)
        done, last = self.state.step, self.state.step == stage.num_steps
        checkpoint = done % stage.checkpoint_every == 0 and not last
        probed = stage.probe.every > 0 and (done % stage.probe.every == 0 or last)
        if done % stage.log_every == 0 or checkpoint or last or probed or done == 1:
            self._log(done, curve, seconds, probed=probed)
            checkpoint |= self._is_warned() and not last
        if checkpoint or (last and self.job.scored_beside):  # what waits for scores can be killed, too
            self._save(curve)
        self.watch.progress(done)

    def _follow(self, step: int) -> None:
        """Go on as the stage is from an iteration on."""
        self.now = self.job.stage.at(step)
        self.state.ema_decay = self.now.ema_decay
        for name, player in self.state.players.items():
            player.config = getattr(self.now.optimizers, name)

    def _is_warned(self) -> bool:
        """Whether the cloud has said since the last call that it takes a machine of the group back."""
        before, self.leaving = self.leaving, self.report.leaving()
        return bool(set(self.leaving) - set(before))

    def _save(self, curve: "Curve | None") -> None:
        """Begin to write a checkpoint; the curve up to it is written first."""
        self._bill()
        if curve:
            curve.flush()
        if self.group.leads or self.cast.lockstep:
            taken = snapshot(self.state)
            if self.group.leads:
                self.saver.save(taken)

    def _leave(self, step: int, numbers: Logged) -> None:
        """Leave the average to be scored beside training."""
        weights = weights_of(self.state.average) if self.group.leads or self.cast.lockstep else {}
        if self.group.leads:
            leave(self.job, step, weights)
        self.report(step, numbers, score=True)

    def _report_unscored(self) -> None:
        """Have averages scored that an earlier life of this stage left behind."""
        if self.job.scored_beside:
            for step in self.group.tell(waiting(self.job, self.state.step) if self.group.leads else []):
                self.report(step, {}, score=True)

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
        if probed and self.job.scored_beside:
            self._leave(step, numbers)
        elif probed:
            numbers |= self._look(step)
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

    def _finish(self, curve: "Curve | None", seconds: float) -> None:
        shares = self.group.leads or self.cast.lockstep
        if shares:
            self._save_looks()
        last = weights_of(self.state.average) if shares else {}
        if self.job.scored_beside:
            self.report.wait()
        if curve is None:
            return
        self.bytes_left = sum(weights.nbytes for weights in last.values())
        if self.job.scored_beside:
            self._take_scores(curve)
        curve.flush()
        result = {
            "inputs": self.job.inputs,
            "start_sha256": self.job.start_hash(),
            **self._pass_on(last),
            "train_seconds": seconds,
            "steps": self.state.step,
        }
        write_json(self.job.manifest, result)
        remove_checkpoints(self.job.checkpoints)
        remove_tree(self.job.scores)

    def _take_scores(self, curve: Curve) -> None:
        """Put the scores into the curve, and see which average is best."""
        found = scores(self.job)
        curve.add_to(found)
        for step, values in sorted(found.items()):
            self.watch.logged(step, values)
        self.best = BestWeights(self.job)
        if self.job.stage.probe.keep == "best" and self.best.step is None:
            raise ValueError(
                f"stage {self.job.name}: none of its averages could be scored, so there is no best one. Ray's log says"
                " why; run it again, or set probe.beside to false"
            )

    def _pass_on(self, last: dict[str, Tensor]) -> dict[str, Any]:
        """Write the weights that others start from: the last, or the best. What the manifest is to say of them."""
        job, best = self.job, self.best
        if best is None or best.step is None:
            return {"sha256": write_tensors(job.weights, last)}
        about = {"best_step": best.step, "best_probe_fid": best.fid, "kept": job.stage.probe.keep}
        if job.stage.probe.keep == "last":
            return {**about, "sha256": write_tensors(job.weights, last)}
        write_tensors(job.other_weights, last)
        with local_copy(best.weights) as file, atomic_path(job.weights) as temporary:
            shutil.copyfile(file, temporary)
            return {**about, "sha256": file_hash(temporary)}

    def _save_looks(self) -> None:
        """What the discriminator says of some generated and real images at the end."""
        if "discriminator" in self.state.players and isinstance(self.job.stage.objective, DMD):
            job = replace(self.job, stage=self.now)
            save_looks(job, self.teacher, self.state, self.cast, write=self.group.leads)


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
