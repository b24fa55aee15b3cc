"""The main job: precompute, train the stages, evaluate, report; each part reused where it is finished already."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from rich.console import Console

from pipelines.artifacts import RunDir, differences, fingerprint, read_json, write_json
from pipelines.costs import costs_of, metrics_of, with_costs
from pipelines.evaluate import Evaluator, Generator
from pipelines.lineage import lineage_of
from pipelines.measures import caution
from pipelines.peer_pictures import measure_pictures
from pipelines.peers import PICTURES
from pipelines.picture_files import PictureFiles
from pipelines.preparation import Preparation
from pipelines.process import environment
from pipelines.progress import Counter
from pipelines.recipe import Recipe, determining
from pipelines.recording import default_store, recorded, tracker_of
from pipelines.report import Report, Row, write_report
from pipelines.report_columns import MEASURES
from pipelines.stages import StageJob
from pipelines.tracked import best_student, best_tags, description, measured_by, summary_of
from pipelines.tracking import NoopTracker, Tracker
from pipelines.train import train_stage
from pipelines.trainer import Watch
from pipelines.watching import RemoteWatch, follow, log_point

T = TypeVar("T")


class Run(Preparation):
    """One recipe in one run directory."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, console: Console) -> None:
        super().__init__(recipe, run_dir, console)
        self.tracker: Tracker = NoopTracker()

    # Phases

    def execute(self, started: float) -> Report:
        """Do everything that is not done; ``started`` is when the process began, in `time.time` seconds."""
        _ = self.extractor, self.second_extractor, self.clip
        with self._session():
            self.record("start", time.time() - started, reused=False)
            self.train_stages(())
            report = self.report(self.evaluate())
            if self.recipe.track.register and self.recipe.track.enabled:
                self._register(report)
            return report

    def _register(self, report: Report) -> None:
        from pipelines.registered import register_best  # which needs this module

        with self.phase("register", billed=False):
            register_best(self, report)

    def partial(self, work: "Callable[[Run], T]") -> "T":
        """Do one part of the job under the directory's lock, recorded as the same run."""
        with self._session():
            return work(self)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Hold the directory, and record how it ended; a directory of another recipe is left as it is."""
        check_recipe(self.dir, self.recipe)
        _ = self.teacher, self.splits  # a mistake in them leaves the directory unclaimed
        with self.dir.locked(self.say):
            self._claim()
            self._say_what_is_skipped()
            self.tracker = tracker_of(self.recipe, self.dir, self._origin())
            self.tracker.params(self.recipe.to_dict())
            with recorded(self.tracker):
                yield

    def train_stages(self, names: Sequence[str]) -> None:
        """Shards, then some stages and all that they start from; every stage where none is named.

        Raises:
            ValueError: there is no such stage.
        """
        for name in names:
            self.recipe.require_stage(name)
        wanted = {link for name in names or self.recipe.stages for link in self.recipe.chain(name)}
        self.prepare_shards()
        for name in self.recipe.stages:
            if name in wanted:
                self.train(name)

    def _claim(self) -> None:
        """See that the directory is this recipe's, and make it so if it is nobody's."""
        check_recipe(self.dir, self.recipe)
        write_json(self.dir.recipe, self.recipe.to_dict())

    def _say_what_is_skipped(self) -> None:
        """Name bad pictures: the first here, all of them in a file."""
        path = self.dir.path / "skipped_pictures.json"
        if self.splits.skipped:
            write_json(path, {picture.name: picture.reason for picture in self.splits.skipped})
        self.splits.say_skipped(self.console, str(path))

    def train(self, name: str) -> None:
        """Train one stage, or find it trained."""
        job = self.job(name)
        with self.phase(name) as phase:
            phase.reused = job.finished() is not None
            if phase.reused:
                return
            self._say_why_again(job)
            self._train(job)

    def _say_why_again(self, job: StageJob) -> None:
        manifest = read_json(job.manifest)
        if manifest and manifest["start_sha256"] != job.start_hash():
            self.say(f"[yellow]what {job.name} started from was made again: training {job.name} again[/]")
        elif manifest:
            self.say(
                f"[yellow]{job.weights} is missing or damaged (its hash does not fit): training {job.name} again[/]"
            )

    def _train(self, job: StageJob) -> None:
        with recorded(self._stage_tracker(job)) as tracker:
            tracker.params(self.recipe.to_dict()["stages"][job.name])
            with self.progress(f"train {job.name}", job.stage.num_steps) as show:
                if job.train.num_workers:
                    self._train_remotely(job, tracker, show)
                else:
                    watch = Watch(progress=show, logged=partial(log_point, tracker), note=self.say)
                    train_stage(job, lambda: watch)
            tracker.artifact(job.weights, "model")

    def _stage_tracker(self, job: StageJob, *, reopen: bool = True) -> Tracker:
        stage = job.stage
        words = {"stage": job.name, "label": stage.label or job.name, "objective": stage.objective.name}
        tags = {**self._origin(), **words, "start": stage.start, "fingerprint": fingerprint(job.inputs)}
        return self.tracker.child(job.name, tags, reopen=reopen)

    def _origin(self) -> dict[str, str]:
        """Tags of what a run and its stages are made of."""
        made_of = {"teacher": self.recipe.teacher.path, "teacher_fingerprint": self.teacher.fingerprint}
        return {"recipe": self.recipe.name, "run": self.dir.path.name, "data": self.splits.fingerprint, **made_of}

    def _train_remotely(self, job: StageJob, tracker: Tracker, show: Callable[[int], None]) -> None:
        remote = RemoteWatch(self.recipe.track, tracker.run_id, self.dir.path.resolve(), default_store(self.dir))
        done = threading.Event()
        follower = threading.Thread(target=follow, args=(job.curve, show, done), daemon=True)
        follower.start()
        try:
            train_stage(job, remote)
        finally:
            done.set()
            follower.join()

    def evaluate(self) -> list[Row]:
        """A row for each generator.

        Raises:
            ValueError: a stage is not trained yet.
        """
        for name in self.recipe.stages:
            self.require_trained(name)
        with self.phase("evaluate") as phase:
            evaluator = self.evaluator()
            generators = self.generators()
            found = [evaluator.finished(generator) for generator in generators]
            phase.reused = all(found)
            missing = [generator for generator, row in zip(generators, found, strict=True) if row is None]
            made = {row.samples: row for row in self._measured(evaluator, missing)}
            return [row or made[f"{one.key}.npz"] for one, row in zip(generators, found, strict=True)]

    def _measured(self, evaluator: Evaluator, generators: Sequence[Generator]) -> Iterator[Row]:
        given = [generator for generator in generators if generator.solver == PICTURES]
        drawn = [generator for generator in generators if generator.solver != PICTURES]
        if drawn:
            with self.progress("evaluate", len(drawn) * self.recipe.evaluate.num_samples) as show:
                yield from evaluator.measure(drawn, Counter(0, show).add, self._log_row)
        for generator in given:
            assert generator.peer
            with self.progress(f"pictures of {generator.label}", len(PictureFiles(generator.peer.path))) as show:
                yield (row := measure_pictures(evaluator, generator, self.nets, show))
            self._log_row(row)

    def _log_row(self, row: Row) -> None:
        guided = f"_guided_{row.guidance_scale:g}" if row.guided else ""
        name = f"{row.stage or row.generator}_{row.solver}{guided}"
        metrics = {f"{name}/{key}": value for key, value in metrics_of_row(row).items()}
        self.tracker.metrics(metrics, step=row.nfe)
        if row.images_per_second:  # else others drew them
            sampling = row.num_samples / row.images_per_second
            self.bill.add("evaluate", worker_seconds=sampling, network_calls=float(row.num_samples * row.nfe))

    def report(self, rows: list[Row]) -> Report:
        """Write report.json, report.html and the pictures."""
        with self.phase("report", billed=False):
            report = self._write_report(rows)
            self._track(report)
            figures = self.dir.path / "figures"
            for picture in sorted(figures.glob("*.png")):
                self.tracker.figure(picture.stem, picture)
            for name in ("report.json", "report.html"):
                self.tracker.artifact(self.dir.path / name)
            self.tracker.flush()
        return report

    def _track(self, report: Report) -> None:
        """Tell the store what came out, under the same names in every run and stage."""
        for phase in report.phases:
            self.tracker.summary(metrics_of(phase), step=0)
        self.tracker.tags({**measured_by(report), **description(report.rows)})
        if best := best_student(report.rows):
            self.tracker.summary(summary_of(best, "best/"), step=0)
            self.tracker.tags(best_tags(best))
        for row in report.rows:
            if row.stage and row.samples == f"{self.student(row.stage).key}.npz":
                child = self._stage_tracker(self.job(row.stage), reopen=False)
                child.summary(summary_of(row), step=self.recipe.stages[row.stage].num_steps)
                child.tags(measured_by(report))

    def _write_report(self, rows: list[Row]) -> Report:
        reference = {
            "real_fid": self.reference.real_fid,
            "halves_fid": self.reference.halves_fid,
            "num_reference": len(self.splits.reference),
            "fid_features": self.extractor.name,
            **self.reference.provenance,
            "data_sha256": self.splits.fingerprint,
            "caution": caution(self.recipe.evaluate.num_samples, self.reference.moments.width),
        }
        if second := self.second_reference:
            reference["second_real_fid"], reference["second_halves_fid"] = second.real_fid, second.halves_fid
            reference["second_features"] = second.extractor.name
        if self.clip:
            reference |= self.clip.provenance
        report = Report(
            recipe=self.recipe.to_dict(),
            fingerprint=self.recipe.fingerprint,
            rows=rows,
            phases=with_costs(self.phases, costs_of(self.dir.path, self.recipe.stages)),
            reference=reference,
            environment=environment(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            lineage=lineage_of(self),
        )
        write_report(report, self.dir.path)
        return report


def metrics_of_row(row: Row) -> dict[str, float]:
    """What a tracked run is told of a generator; FIDs are named by their feature net."""
    names = {"fid": f"fid_{row.fid_features}", "second_fid": f"fid_{row.second_features}"}
    found = {names.get(key, key): getattr(row, key) for key in MEASURES.values()}
    return {name: value for name, value in found.items() if value is not None}


def check_recipe(run_dir: RunDir, recipe: Recipe) -> None:
    """Refuse a directory that another recipe made.

    Raises:
        ValueError: it names the fields that differ.
    """
    made_with = read_json(run_dir.recipe) if run_dir.holds_results else None
    differing = differences(determining(made_with), determining(recipe.to_dict())) if made_with else []
    if differing:
        raise ValueError(
            f"{run_dir.path} was made by another recipe ({'; '.join(differing)}). Use another --run-dir, or go back to"
            " its settings; nothing was changed"
        )
