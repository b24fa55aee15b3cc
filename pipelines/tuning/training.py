"""A training of a trial, at one seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from pipelines.artifacts import RunDir
from pipelines.curve import Curve
from pipelines.recipe import Recipe, override
from pipelines.report import Row
from pipelines.run import Run
from pipelines.tuning.copies import take_over
from pipelines.tuning.sharing import prepare, shared_with
from pipelines.tuning.trial import TrialFile
from pipelines.tuning.work import Work

Points = list[list[float]]
"""Steps and scores."""


class _TrialDir(RunDir):
    """A trial's directory, which `perform` holds already."""

    @contextmanager
    def locked(self, say: Callable[[str], None] = lambda _text: None) -> Iterator[None]:
        del say
        yield


class TrialRun(Run):
    """A run of one stage that tells its score whenever it is measured."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, note: Callable[[Points], None], metric: str) -> None:
        super().__init__(recipe, run_dir, Console(quiet=True))
        self._stage = list(recipe.stages)[-1]
        self._note, self._metric = note, metric

    def points(self) -> Points:
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


class Training:
    """A trial's training at a seed; that of the trial's own seed is in its directory, others below it."""

    def __init__(self, work: Work, file: TrialFile, seed: int, note: Callable[[Points], None]) -> None:
        """``note`` is told of all points whenever there are new ones; may raise to stop it.

        Raises:
            ValueError: the trial's changes make no recipe.
        """
        trial, self._stage = file.trial, work.space.stage
        recipe = work.trial_recipe(trial.changes, seed, final=trial.kind == "final")
        before = override(recipe, {"precompute.num_actors": 0})
        shared = prepare(work, before, Console(quiet=True), shared_with(work, trial, seed))
        folder = file.folder if seed == trial.seed else file.folder / f"seed-{seed}"
        self.run = TrialRun(recipe, _TrialDir(folder, shared, self._stage, work.references), note, work.metric)
        if trial.parent:
            take_over(file.folder, self.run.job(self._stage), trial.since)

    def train(self) -> None:
        """Train what is left to train."""
        self.run.partial(lambda job: job.train(self._stage))

    def score(self, step: int) -> float | None:
        """The score at a step, if it has come to it."""
        return next((score for at, score in self.run.points() if at == step), None)

    def measure(self) -> Row:
        """Its student on held-out images."""
        return self.run.partial(lambda _job: self.run.measure())
