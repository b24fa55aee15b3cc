"""The main job: precompute, train the stages, evaluate, report; each part reused where it is finished already."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from hd_core.guidance import branches
from hd_core.objectives.turns import first_step_is_analytical
from pipelines.artifacts import RunDir, differences, fingerprint, read_json, write_json
from pipelines.cluster import is_running, stop_ray
from pipelines.costs import Bill, ShardBill, costs_of, metrics_of, with_costs
from pipelines.evaluate import FLOW_MAP, Evaluator, Generator, Reference, teacher_generators
from pipelines.feature_shards import load_feature_maker
from pipelines.features import BUILT_IN, Extractor, load_extractor
from pipelines.inputs import Inputs
from pipelines.journal import Status
from pipelines.perceptual import LPIPS, load_perceptual
from pipelines.process import environment
from pipelines.production import Made, produce, start_for
from pipelines.progress import bar
from pipelines.recipe import TEACHER, Recipe, determining
from pipelines.report import Phase, Report, Row, write_report
from pipelines.shards import ShardSet, write_shard
from pipelines.stages import StageJob, measured_steps, sampling_grid, stage_inputs
from pipelines.storage import local_stand_in
from pipelines.tracking import NoopTracker, Tracker, open_tracker
from pipelines.train import train_stage
from pipelines.trainer import Watch
from pipelines.watching import RemoteWatch, follow, log_point

T = TypeVar("T")


class Run(Inputs):
    """One recipe in one run directory."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, console: Console) -> None:
        super().__init__(recipe, run_dir)
        self.console = console
        self.phases: list[Phase] = []
        self.bill = Bill(run_dir.path / "costs")
        self.tracker: Tracker = NoopTracker()

    @cached_property
    def extractor(self) -> Extractor:
        return self._extractor(self.recipe.evaluate.features)

    @cached_property
    def second_extractor(self) -> Extractor | None:
        name = self.recipe.evaluate.second_features
        return self._extractor(name) if name else None

    @cached_property
    def _perceptual_nets(self) -> dict[str, str]:
        """Fingerprint of each net of a perceptual distance, by its name: loading one takes seconds, so once a run."""
        names = {stage.perceptual for stage in self.recipe.stages.values() if stage.perceptual}
        return {name: load_perceptual(name).fingerprint for name in sorted(names)}

    def _extractor(self, name: str) -> Extractor:
        extractor = load_extractor(name)
        extractor.check(self.splits.train.shape)
        return extractor

    # Stages

    def job(self, name: str) -> StageJob:
        """What a worker needs to train a stage."""
        recipe, stage = self.recipe, self.recipe.stages[name]
        needs = stage.objective.needs
        upstream = {"start": self._start_identity(name)}
        if "trajectories" in needs:
            upstream["trajectories"] = self.trajectories.spec.fingerprint
        if stage.needs_images:
            upstream["images"] = self.images.spec.fingerprint
        latents = self.latents if "images" in needs else None
        if latents:
            upstream["latents"] = latents.spec.fingerprint
        if self.prompts:
            upstream["prompts"] = self.prompts.spec.fingerprint
        if stage.probe.every:
            upstream["probe_features"] = self.extractor.fingerprint
        if stage.perceptual:
            upstream["perceptual"] = self._perceptual_nets[stage.perceptual]
        upstream |= {"teacher": self.teacher.fingerprint, "guidance_scale": f"{stage.guided(recipe.teacher):g}"}
        return StageJob(
            name=name,
            stage=stage,
            train=recipe.train,
            teacher=recipe.teacher,
            seed=recipe.seed,
            folder=str(self.dir.stage(name).resolve()),
            start_weights="" if stage.start == TEACHER else str(self._weights(stage.start)),
            trajectories=self.trajectories if "trajectories" in needs else None,
            images=self.images if stage.needs_images else None,
            inputs=stage_inputs(stage, recipe.train, upstream, recipe.seed, name),
            features=_portable(recipe.evaluate.features) if stage.probe.every else "",
            perceptual=_portable(stage.perceptual),
            start_knows_steps=stage.start != TEACHER and recipe.knows_steps(stage.start),
            latents=latents,
            prompts=self.prompts,
        )

    def _start_identity(self, name: str) -> str:
        """What a stage starts from, as an identity that is known before that exists."""
        start = self.recipe.stages[name].start
        return "teacher" if start == TEACHER else fingerprint(self.job(start).inputs)

    def _weights(self, name: str) -> Path:
        return (self.dir.stage(name) / "student.safetensors").resolve()

    # Generators

    def generators(self) -> list[Generator]:
        """All that the report has a row for, in order."""
        recipe = self.recipe
        from_teacher = teacher_generators(recipe.evaluate, self.teacher, recipe.teacher.guidance_scale)
        return [*from_teacher, *(student for name in recipe.stages for student in self.students(name))]

    def require_trained(self, name: str) -> None:
        """Raises ValueError where a stage is not trained yet."""
        if self.job(name).finished() is None:
            raise ValueError(f"stage {name} is not trained in {self.dir.path}: run `hdistill train` first")

    def students(self, name: str) -> Iterator[Generator]:
        """A trained stage at every number of steps and guidance that is measured."""
        stage, asked = self.recipe.stages[name], self.recipe.evaluate
        for guidance_scale, steps in product(asked.guidance_scales, measured_steps(stage, asked.step_counts)):
            yield self.student(name, steps, guidance_scale)

    def student(self, name: str, steps: int | None = None, guidance_scale: float = 1.0) -> Generator:
        """A trained stage as a generator, of its own number of steps where none is asked for.

        Raises:
            ValueError: its student is not told how many steps there are, or cannot walk so many.
        """
        stage = self.recipe.stages[name]
        grid = tuple(sampling_grid(name, stage, steps).tolist())
        afs = first_step_is_analytical(stage.objective)
        manifests = [read_json(self.dir.stage(link) / "stage.json") for link in self.recipe.chain(name)]
        return Generator(
            label=stage.label or name,
            stage=name,
            solver=FLOW_MAP,
            grid=grid,
            calls_per_image=(len(grid) - 1 - afs) * branches(guidance_scale),
            train_seconds=sum(manifest["train_seconds"] for manifest in manifests if manifest),
            identity=manifests[-1]["sha256"] if manifests[-1] else "",
            weights=str(self._weights(name)),
            afs=afs,
            knows_steps=self.recipe.knows_steps(name),
            guidance_scale=guidance_scale,
        )

    @cached_property
    def reference(self) -> Reference:
        return Reference.of(self.splits, self.extractor)

    @cached_property
    def second_reference(self) -> Reference | None:
        return Reference.of(self.splits, self.second_extractor) if self.second_extractor else None

    def evaluator(self) -> Evaluator:
        """Measures this run's generators."""
        asked = self.recipe.evaluate
        nets = [_portable(net) for net in (asked.features, asked.second_features) if net]
        return Evaluator(
            self.recipe.evaluate,
            self.reader,
            self.reference,
            self.second_reference,
            self.splits.fingerprint,
            self.recipe.seed,
            self.dir.evaluation,
            self.evaluation_labels,
            partial(load_feature_maker, teacher=self.recipe.teacher, prompts=self.prompts, nets=nets),
        )

    # Phases

    def execute(self, started: float) -> Report:
        """Do everything that is not done; ``started`` is when the process began, in `time.time` seconds."""
        _ = self.extractor, self.second_extractor
        with self._session():
            self._record("start", time.time() - started, reused=False)
            self.train_stages(())
            return self.report(self.evaluate())

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
            self._open_tracker()
            try:
                yield
                self.tracker.finish("FINISHED")
            except BaseException as error:
                self.tracker.finish(ending(error))
                raise

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

    def _open_tracker(self) -> None:
        state = read_json(self.dir.state) or {}
        recipe = self.recipe
        self.tracker = open_tracker(
            recipe.track,
            recipe_name=recipe.name,
            run_name=self.dir.path.name,
            run_dir=self.dir.path,
            default_store=default_store(self.dir),
            resume_run_id=state.get("run_id"),
            tags={"recipe": recipe.name, "fingerprint": recipe.fingerprint, "hdistill": version("hdistill")},
        )
        self.tracker.params(recipe.to_dict())
        write_json(self.dir.state, {**state, "run_id": self.tracker.run_id})

    def prepare_shards(self) -> None:
        """Text embeddings, real images, latents and trajectories, as far as this run reads them."""
        needs = {need for stage in self.recipe.stages.values() for need in stage.objective.needs}
        before = is_running()
        if self.prompts and self.vocabulary:
            self._make("prompts", self.prompts, self.prompt_maker(self.prompts, self.vocabulary), "prompts")
        if any(stage.needs_images for stage in self.recipe.stages.values()):
            self._write_images()
        if self.latents and "images" in needs:
            self._make("latents", self.latents, self.latent_maker(self.latents), "latents")
        if "trajectories" in needs:
            self._make("precompute", self.trajectories, self.trajectory_maker(), "teacher trajectories")
        if is_running() and not (before or self.recipe.train.num_workers or self._streams()):
            with self.phase("ray stop"):
                stop_ray()

    def _make(self, phase: str, shards: ShardSet, maker: Made, what: str) -> None:
        """Make a set's missing and damaged shards, or find it whole."""
        for file in shards.damaged():
            self.say(f"[yellow]shard {file} is missing or damaged (its hash does not fit): making it again[/]")
        shards.list_adopted()
        if shards.complete:
            self._record(phase, 0.0, reused=True)
            return
        actors = self.recipe.precompute.actors
        if actors.count and not is_running():
            with self.phase("ray start"):
                start_for(shards, maker, actors)
        with self.phase(phase):
            self._produce(phase, shards, maker, what)

    def _produce(self, phase: str, shards: ShardSet, maker: Made, what: str) -> None:
        billed = ShardBill(self.bill, phase, shards, self._calls_per_row(phase))
        done = sum(shard.rows for shard in shards.shards)
        if done:
            self.say(f"{what}: {done:,} of {shards.spec.rows:,} are there; making the rest")
        with bar(self.console, what, shards.spec.rows) as show:
            counter = _Counter(done, lambda rows: (billed.see(), show(rows)))
            show(done)
            produce(shards, maker, self.recipe.precompute.actors, counter.add)

    def _calls_per_row(self, phase: str) -> int:
        """Network calls for one row of a shard set: encoders run once."""
        if phase != "precompute":
            return 1
        return self.recipe.precompute.calls_per_sample * branches(self.recipe.teacher.guidance_scale)

    def _write_images(self) -> None:
        shards, images, labels = self.images, self.splits.train.images, self.image_labels
        for file in shards.damaged():
            self.say(f"[yellow]shard {file} of images is missing or damaged: writing it again[/]")
        shards.list_adopted()
        for index in shards.missing:
            ids = shards.spec.ids(index)
            part = slice(ids.start, ids.stop)
            shards.commit(write_shard(shards.folder, shards.spec, index, labels[part], images[part]))

    def _streams(self) -> bool:
        return self.recipe.needs_trajectories and self.trajectories.spec.bytes > self.recipe.train.resident_bytes

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
        tracker = self._stage_tracker(job)
        tracker.params(self.recipe.to_dict()["stages"][job.name])
        try:
            with bar(self.console, f"train {job.name}", job.stage.num_steps) as show:
                if job.train.num_workers:
                    self._train_remotely(job, tracker, show)
                else:
                    watch = Watch(progress=show, logged=partial(log_point, tracker), note=self.say)
                    train_stage(job, lambda: watch)
        except BaseException as error:
            tracker.finish(ending(error))
            raise
        tracker.artifact(job.weights, "model")
        tracker.finish("FINISHED")

    def _stage_tracker(self, job: StageJob) -> Tracker:
        return self.tracker.child(job.name, {"stage": job.name, "fingerprint": fingerprint(job.inputs)})

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
        evaluator = self.evaluator()
        rows: list[Row] = []
        with self.phase("evaluate") as phase:
            generators = self.generators()
            found = [evaluator.finished(generator) for generator in generators]
            phase.reused = all(found)
            with bar(self.console, "evaluate", len(generators) * self.recipe.evaluate.num_samples) as show:
                counter = _Counter(0, show)
                for generator, row in zip(generators, found, strict=True):
                    if row is None:
                        row = evaluator.measure(generator, counter.add)
                        self._log_row(row)
                    rows.append(row)
        return rows

    def _log_row(self, row: Row) -> None:
        guided = f"_guided_{row.guidance_scale:g}" if row.guided else ""
        name = f"{row.stage or row.generator}_{row.solver}{guided}"
        metrics = {f"fid_{row.fid_features}": row.fid, "precision": row.precision, "recall": row.recall}
        if row.second_fid is not None:
            metrics[f"fid_{row.second_features}"] = row.second_fid
        self.tracker.metrics({f"{name}/{key}": value for key, value in metrics.items()}, step=row.nfe)
        sampling = row.num_samples / row.images_per_second
        self.bill.add("evaluate", worker_seconds=sampling, network_calls=float(row.num_samples * row.nfe))
        if row.stage and row.samples == f"{self.student(row.stage).key}.npz":
            tracker = self._stage_tracker(self.job(row.stage))
            tracker.metrics(metrics, step=self.recipe.stages[row.stage].num_steps)
            tracker.finish("FINISHED")

    def report(self, rows: list[Row]) -> Report:
        """Write report.json, report.html and the pictures."""
        with self.phase("report", billed=False):
            report = self._write_report(rows)
            for phase in report.phases:
                self.tracker.metrics(metrics_of(phase), step=0)
            figures = self.dir.path / "figures"
            for picture in sorted(figures.glob("*.png")):
                self.tracker.figure(picture.stem, picture)
            for name in ("report.json", "report.html"):
                self.tracker.artifact(self.dir.path / name)
            self.tracker.flush()
        return report

    def _write_report(self, rows: list[Row]) -> Report:
        reference = {
            "real_fid": self.reference.real_fid,
            "halves_fid": self.reference.halves_fid,
            "num_reference": len(self.splits.reference),
            "fid_features": self.extractor.name,
        }
        if second := self.second_reference:
            reference["second_real_fid"], reference["second_halves_fid"] = second.real_fid, second.halves_fid
            reference["second_features"] = second.extractor.name
        report = Report(
            recipe=self.recipe.to_dict(),
            fingerprint=self.recipe.fingerprint,
            rows=rows,
            phases=with_costs(self.phases, costs_of(self.dir.path, self.recipe.stages)),
            reference=reference,
            environment=environment(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_report(report, self.dir.path)
        return report

    # Saying what happens

    @contextmanager
    def phase(self, name: str, *, billed: bool = True) -> "Iterator[_Phase]":
        """Time a part of the run and say that it is done, or was before."""
        phase, started = _Phase(), time.perf_counter()
        with self.bill.phase(name) if billed else nullcontext():
            yield phase
            if phase.reused:
                self.bill.forget(name)
        self._record(name, time.perf_counter() - started, reused=phase.reused)

    def _record(self, name: str, seconds: float, *, reused: bool) -> None:
        self.phases.append(Phase(name=name, wall_seconds=seconds, reused=reused))
        how = "[dim]reused[/]" if reused else f"{seconds:.1f} s"
        self.say(f"  {name:<12} {how}")

    def say(self, text: str) -> None:
        """One line to the person who watches."""
        self.console.print(text, highlight=False)


@dataclass
class _Phase:
    reused: bool = False


class _Counter:
    def __init__(self, done: int, show: Callable[[int], object]) -> None:
        self._done, self._show = done, show

    def add(self, count: int) -> None:
        self._done += count
        self._show(self._done)


def _portable(net: str) -> str:
    """A feature net's name, or its folder as a worker in another directory finds it."""
    return net if net in ("", LPIPS, *BUILT_IN) else str(Path(net).expanduser().resolve())


def ending(error: BaseException) -> Status:
    """How a tracked run ended that raised."""
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


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


def default_store(run_dir: RunDir) -> Path:
    """The sqlite file for tracking, shared by the run directories beside this one; `runs/mlflow.db` for remote ones."""
    return local_stand_in(run_dir.path).resolve().parent / "mlflow.db"
