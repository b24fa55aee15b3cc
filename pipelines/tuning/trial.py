"""One trial of a sweep: a recipe with some fields changed, trained in a directory of its own, and scored as it goes.

What is the same for all trials (teacher trajectories, images, the stages before the one that is searched, features of
real images) lies beside them and is made once. A trial that was killed goes on from its last checkpoint; one that is
finished is only read.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from pipelines.artifacts import RunDir, fingerprint, read_json, write_json
from pipelines.curve import Curve
from pipelines.locks import awaited
from pipelines.recipe import Recipe, override
from pipelines.report import Row
from pipelines.run import Run
from pipelines.storage import remove_tree
from pipelines.tuning.copies import take_over
from pipelines.tuning.work import Work

Kind = Literal["baseline", "search", "random", "final"]
State = Literal["running", "paused", "done", "stopped", "failed"]
"""paused: it waits at a rung."""
_ALONE = "own"
"""In a trial's directory: what comes before its stage, where no other trial shares that. Removed at its end."""
_LOCK_SECONDS = 120.0
"""How long a trial waits for an earlier life of itself to end."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is known of one trial; a file in its directory."""

    kind: Kind
    """Who asked for it first. final: it is scored on held-out images, at a seed of its own."""
    name: str = ""
    """What a baseline is called."""
    values: dict[str, Any]
    """The draw of the space's parameters."""
    changes: dict[str, Any]
    """The fields of the recipe that it changes."""
    seed: int
    """The recipe's seed."""
    state: State = "running"
    points: list[list[float]] = field(default_factory=list)
    """Step and score, as they came."""
    seconds: float = 0.0
    """That it has worked, over all its lives."""
    lives: int = 0
    """How often it was begun."""
    ended: float = 0.0
    """When, in seconds since 1970."""
    mistake: str = ""
    """Why it failed."""
    row: dict[str, Any] | None = None
    """What a final one measured on held-out images."""
    parent: str = ""
    """The trial, by its key, that it is a copy of."""
    since: int = 0
    """The iteration from which it differs from that one."""

    @property
    def key(self) -> str:
        """Its directory's name: the same changes with the same seed are the same trial."""
        return fingerprint({"changes": self.changes, "seed": self.seed, "final": self.kind == "final"})[:12]

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("done", "stopped", "failed")

    @property
    def score(self) -> float | None:
        """The last score; ``None`` where there is none, or where it failed."""
        return self.points[-1][1] if self.points and self.state != "failed" else None


def trial_folder(sweep: Path, trial: Trial) -> Path:
    """Where a trial is trained."""
    return sweep / "trials" / trial.key


class TrialFile:
    """A trial on disk."""

    def __init__(self, sweep: Path, trial: Trial) -> None:
        self.folder = trial_folder(sweep, trial)
        there = stored(self.folder)
        self.exists, self.trial = there is not None, there or trial

    def write(self, **changes: Any) -> Trial:
        """Change what is known of it."""
        self.trial = replace(self.trial, **changes)
        if "state" in changes and self.trial.is_over:
            self.trial = replace(self.trial, ended=time.time())
        write_json(self.folder / "trial.json", asdict(self.trial))
        if self.trial.is_over:
            remove_tree(self.folder / _ALONE)
        return self.trial


def stored(folder: Path) -> Trial | None:
    """The trial in a directory; ``None`` where there is none. ValueError where its file is damaged."""
    values = read_json(folder / "trial.json")
    return None if values is None else Trial(**values)


def stored_trials(sweep: Path) -> list[Trial]:
    """All trials of a sweep, by key."""
    folder = sweep / "trials"
    found = [stored(one) for one in sorted(folder.iterdir())] if folder.is_dir() else []
    return [trial for trial in found if trial is not None]


Report = Callable[[int, float], None]
"""Told of a step and its score; may raise to stop the trial."""


class Paused(Exception):
    """A trial has come as far as it shall for now."""


def perform(work: Work, trial: Trial, report: Report, until: int | None = None) -> Trial:
    """Train a trial to its end, or to its score at an iteration, and go on with it where it was begun before.

    One that is over is only read. The last point is reported once everything is written, so that who stops a trial
    there stops nothing.

    Raises:
        OSError: the disk fails. A trial's own mistakes, a ValueError or a divergence, are kept in it and not raised.
    """
    folder = RunDir.create(trial_folder(work.sweep, trial)).path
    with awaited(folder, lambda _text: None, _LOCK_SECONDS):
        attempt = _Attempt(work, TrialFile(work.sweep, trial), report, until)
        if not attempt.file.trial.is_over:
            attempt.make()
            gc.collect()  # a run is in cycles and holds whole data sets; the process goes on to the next trial
        return attempt.tell_the_end()


class _Attempt:
    """One life of a trial."""

    def __init__(self, work: Work, file: TrialFile, report: Report, until: int | None) -> None:
        self.work, self.file, self._report, self._until = work, file, report, until
        self._started, self._before = time.perf_counter(), file.trial.seconds

    def make(self) -> None:
        """Train what is left to train."""
        for step, score in self.file.trial.points:  # who listens may not be the one who heard them first
            self._tell(int(step), score)
        self.file.write(state="running", lives=self.file.trial.lives + 1)
        try:
            self.file.write(row=self._train(), state="done", seconds=self._seconds())
        except Paused:
            self.file.write(state="paused", seconds=self._seconds())
        except (ValueError, FloatingPointError) as error:
            self.file.write(state="failed", mistake=str(error), seconds=self._seconds())

    def tell_the_end(self) -> Trial:
        """Report the last point, once there is one: infinitely bad, where the trial failed."""
        trial = self.file.trial
        if trial.kind != "final" and trial.is_over:
            self._report(self.work.num_steps, self.work.worst if trial.score is None else trial.score)
        return trial

    def _train(self) -> dict[str, Any] | None:
        trial, work = self.file.trial, self.work
        recipe = work.trial_recipe(trial.changes, trial.seed, final=trial.kind == "final")
        before = override(recipe, {"precompute.num_actors": 0})
        shared = prepare(work, before, Console(quiet=True), shared_with(work, trial))
        folder = _TrialDir(self.file.folder, shared, work.space.stage, work.references)
        run = TrialRun(recipe, folder, self._note_all, work.metric)
        if trial.parent:
            take_over(self.file.folder, run.job(work.space.stage), trial.since)
        run.partial(lambda job: job.train(work.space.stage))
        self._note_all(run.points())
        if trial.kind == "final":
            return asdict(run.partial(lambda _job: run.measure()))
        if not self.file.trial.points:
            raise ValueError(
                f"{work.metric} was never reported by stage {work.space.stage}: there is nothing to search by"
            )
        return None

    def _note_all(self, points: list[list[float]]) -> None:
        known = self.file.trial.points
        for step, score in points[len(known) :]:
            self.file.write(points=[*self.file.trial.points, [step, score]], seconds=self._seconds())
            self._tell(int(step), score)
            if self._until is not None and self._until <= step < self.work.num_steps:
                raise Paused

    def _tell(self, step: int, score: float) -> None:
        if step < self.work.num_steps and self.file.trial.kind != "final":
            self._report(step, score)

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._started


class _TrialDir(RunDir):
    """A trial's directory, which `perform` holds already."""

    @contextmanager
    def locked(self, say: Callable[[str], None] = lambda _text: None) -> Iterator[None]:
        del say
        yield


class TrialRun(Run):
    """A run of one stage that tells its score whenever it is measured."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, note: Callable[[list[list[float]]], None], metric: str) -> None:
        super().__init__(recipe, run_dir, Console(quiet=True))
        self._stage = list(recipe.stages)[-1]
        self._note, self._metric = note, metric

    def points(self) -> list[list[float]]:
        """Step and score, as far as the stage's curve has them."""
        curve = Curve.read(self.dir.stage(self._stage) / "metrics.jsonl")
        return [[record["step"], record[self._metric]] for record in curve if self._metric in record]

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Nobody sees a bar; the curve is looked into where the next score is due."""
        del title
        every, seen = self.recipe.stages[self._stage].probe.every, 0

        def look(done: int) -> None:
            nonlocal seen
            if every and done >= min(total, every * (seen + 1)):
                self._note(points := self.points())
                seen = len(points)

        yield look

    def measure(self) -> Row:
        """The stage's student on held-out images."""
        evaluator, student = self.evaluator(), self.student(self._stage)
        return evaluator.finished(student) or evaluator.measure([student])[0]


# What trials share


def shared_with(work: Work, trial: Trial) -> Path:
    """Where what comes before a trial's searched stage is: a folder that trials share, or the trial's own.

    Raises:
        ValueError: its changes make no recipe.
    """
    if work.space.alone(trial.values):
        return trial_folder(work.sweep, trial) / _ALONE
    return work.shared_folder(work.trial_recipe(trial.changes, trial.seed, final=trial.kind == "final"))


def prepare(work: Work, recipe: Recipe, console: Console, folder: Path, *, check: bool = False) -> Path:
    """Make, once for all trials that share a folder, all that comes before the searched stage; returns the folder.

    Whoever comes first makes it; the others wait. ``check`` sees by their hashes that files are as they were made.
    """
    if _is_ready(folder) and not check:
        return folder
    RunDir.create(folder)
    with awaited(folder, lambda _text: None, float("inf")):
        if check or not _is_ready(folder):
            run = Run(recipe, RunDir(folder, references=work.references), console)
            _make_shared(run, work.space.stage, folder)
    return folder


def _is_ready(folder: Path) -> bool:
    return read_json(folder / "ready.json") is not None


def _make_shared(run: Run, stage: str, folder: Path) -> None:
    before, started = read_json(folder / "seconds.json") or 0.0, time.perf_counter()
    try:
        run.prepare_shards()
        for name in run.recipe.chain(stage)[:-1]:
            run.train(name)
        if not run.recipe.stages[stage].probe.every:
            _ = run.reference, run.second_reference  # what final trials are compared with
    finally:
        seconds = before + time.perf_counter() - started
        write_json(folder / "seconds.json", seconds)
    write_json(folder / "ready.json", {"seconds": seconds})
