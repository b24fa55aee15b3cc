"""A life of a trial: it is trained and scored as it goes, from where an earlier life has left it."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipelines.artifacts import RunDir
from pipelines.locks import awaited
from pipelines.process import give_memory_back
from pipelines.tuning.training import Points, Training
from pipelines.tuning.trial import Trial, TrialFile, trial_folder
from pipelines.tuning.work import Work

_LOCK_SECONDS = 120.0
"""How long a trial waits for an earlier life of itself to end."""

Report = Callable[[int, float], None]
"""Told of a step and its score; may raise to stop the trial."""


class Paused(Exception):
    """A training has come as far as it shall for now."""


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
            give_memory_back()  # a run is in cycles and holds whole data sets; the process goes on to the next trial
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
        trial = self.file.trial
        seeds = [trial.seed] if trial.kind == "final" else self.work.seeds(trial.seed)
        if len(seeds) > 1:
            self._train_in_turn(seeds)
            return None
        training = Training(self.work, self.file, seeds[0], self._note)
        training.train()
        if self.file.trial.kind == "final":
            return asdict(training.measure())
        self._note(training.run.points())
        if not self.file.trial.points:
            raise self._nothing()
        return None

    def _train_in_turn(self, seeds: list[int]) -> None:
        """Train at several seeds, all of them to a rung before one goes further; a score is their mean."""
        for step in self.work.rung_steps[len(self.file.trial.points) :]:
            score = statistics.mean(self._score_at(step, seed) for seed in seeds)
            self._note([*self.file.trial.points, [step, score]])

    def _score_at(self, step: int, seed: int) -> float:
        def enough(points: Points) -> None:
            if step < self.work.num_steps and points and points[-1][0] >= step:
                raise Paused

        training = Training(self.work, self.file, seed, enough)
        if training.score(step) is None:
            with suppress(Paused):
                training.train()
        if (score := training.score(step)) is None:
            raise self._nothing()
        return score

    def _nothing(self) -> ValueError:
        return ValueError(
            f"{self.work.metric} was never reported by stage {self.work.space.stage}: there is nothing to search by"
        )

    def _note(self, points: Points) -> None:
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
