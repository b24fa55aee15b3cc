"""A sweep: baselines, a search, the best of both at fresh seeds on held-out images, and the winner as a recipe.

In its directory::

    sweep.json     what it is; another space, recipe or score is refused
    shared/        what trials share, made once: trajectories, images, the stages before the one that is searched
    trials/        a directory for each, with trial.json
    winner.yaml, sweep_report.json, sweep.html, figures/
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pipelines.artifacts import RunDir, ensure_same, read_json, write_json, write_text
from pipelines.locks import held
from pipelines.progress import bar
from pipelines.recipe import determining, to_yaml
from pipelines.recording import recorded, tracker_of
from pipelines.report import Row
from pipelines.run import Run
from pipelines.storage import remove_tree
from pipelines.tracked import summary_of
from pipelines.tracking import NoopTracker, Tracker
from pipelines.tuning.config import SearchConfig
from pipelines.tuning.population import Population, settle
from pipelines.tuning.results import Candidate, candidates, finalists
from pipelines.tuning.search import RAY_FOLDER, Rooms, perform_all, search
from pipelines.tuning.sharing import prepare
from pipelines.tuning.sweep_page import render_sweep
from pipelines.tuning.sweep_report import SweepReport, costs_of
from pipelines.tuning.times import Times
from pipelines.tuning.trial import Trial, TrialFile, stored_trials
from pipelines.tuning.work import Work, rank

_ROWS = 128
"""Stored trajectories from which programmed schedules are found."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What a sweep does besides searching."""

    search: SearchConfig = field(default_factory=SearchConfig)
    num_random: int = 0
    """Trials drawn by chance alone, to compare the search with."""
    num_finalists: int = 3
    """Best trials that meet the baselines at fresh seeds."""
    num_seeds: int = 3
    """Those seeds."""

    def __post_init__(self) -> None:
        if min(self.num_random, self.num_finalists, self.num_seeds) < 0:
            raise ValueError("random, finalists and seeds must not be negative")


class Sweep:
    """One space searched with one recipe, in one directory."""

    def __init__(self, work: Work, name: str, config: SweepConfig, console: Console) -> None:
        """``name`` is the space's."""
        self.work, self.name, self.config, self.console = work, name, config, console
        search = config.search
        self.population = Population(work, search.num_trials, search.seed) if search.scheduler == "pbt" else None
        self.folder = work.sweep
        self.tracker: Tracker = NoopTracker()
        self._deaths: list[str] = []

    def execute(self) -> SweepReport:
        """Do all that is not done.

        Raises:
            ValueError: the directory holds another sweep; no trial fits the machine; or no trial could be scored.
            ChildProcessError: the process of a trial died again and again.
        """
        RunDir.create(self.folder)
        with held(self.folder, self.say):
            self._claim()
            for left in self.folder.glob(f"{RAY_FOLDER}*"):  # by a session that was killed
                remove_tree(left)
            self.tracker = self._tracker()
            with recorded(self.tracker):
                return self._all()

    def _all(self) -> SweepReport:
        self._times = Times(self.folder)
        self.rooms = Rooms(self.config.search, self.work)
        for trial in stored_trials(self.folder):
            self._log(trial)
        shared, *_ = [self._prepare(seed, final=False) for seed in self.work.seeds(self.work.recipe.seed)]
        baselines = [self._trial("baseline", name, values) for name, values in self._baselines(shared).items()]
        chance = [
            self._trial("random", "", self.work.space.draw(f"{self.config.search.seed}-random-{number}"))
            for number in range(self.config.num_random)
        ]
        self._perform("baselines", baselines)
        self._perform("random search", chance)
        if self.population:
            self._evolve(self.population)
        else:
            self._search()
        finals = self._finals(baselines)
        trials = stored_trials(self.folder)
        costs = costs_of(self.work, self._times.seconds, trials, self.rooms.slots)
        report = SweepReport.of(self.work, self.name, trials, baselines, finals, costs)
        self._leave(report)
        return report

    # What it is

    def _claim(self) -> None:
        work = self.work
        wanted = {
            "space": self.name,
            "stage": work.space.stage,
            "parameters": {name: repr(one) for name, one in work.space.parameters.items()},
            "recipe": determining(work.recipe.to_dict()),
            "score": {
                "metric": work.metric,
                "rungs": work.rungs,
                "num_samples": work.num_samples,
                "seeds": work.score_seeds,
            },
        }
        path = self.folder / "sweep.json"
        if (made_with := read_json(path)) is not None:
            ensure_same(f"the sweep in {self.folder}", made_with, wanted)
        write_json(path, wanted)

    def _tracker(self) -> Tracker:
        recipe = self.work.recipe
        tags = {"recipe": recipe.name, "space": self.name, "kind": "sweep"}
        tracker = tracker_of(recipe, RunDir(self.folder), tags)
        tracker.params({"space": self.name, "metric": self.work.metric, "search": asdict(self.config.search)})
        return tracker

    # What is made once

    def _prepare(self, seed: int, *, final: bool) -> Path:
        recipe = self.work.trial_recipe(self.work.space.always, seed, final=final)
        return prepare(self.work, recipe, self.console, self.work.shared_folder(recipe), check=True)

    def _baselines(self, shared: Path) -> Mapping[str, Mapping[str, Any]]:
        space = self.work.space
        if space.from_trajectories is None:
            return space.baselines
        recipe = self.work.trial_recipe(space.always, self.work.recipe.seed, final=False)
        run = Run(recipe, RunDir(shared), self.console)
        rows = run.trajectories.read([0])
        states = torch.from_numpy(rows.values[:_ROWS].copy()).float().unbind(1)
        condition = run.reader.condition(torch.from_numpy(rows.labels[:_ROWS].copy()))
        grid = recipe.precompute.grid.times(recipe.precompute.intervals)
        velocity = run.teacher.velocity(recipe.teacher.guidance_scale)
        device = run.teacher.device
        with torch.no_grad():
            found = space.from_trajectories(velocity, [x.to(device) for x in states], grid, condition.to(device))
        return {**space.baselines, **found}

    # Trials

    def _trial(self, kind: Any, name: str, values: Mapping[str, Any]) -> Trial:
        changes = self.work.space.overrides(values)
        return Trial(kind=kind, name=name, values=dict(values), changes=changes, seed=self.work.recipe.seed)

    def _perform(self, title: str, trials: Sequence[Trial]) -> None:
        """Perform those that have not ended."""
        ended = {trial.key for trial in stored_trials(self.folder) if trial.is_over}
        left = list({trial.key: trial for trial in reversed(trials) if trial.key not in ended}.values())[::-1]
        if not left:
            return
        with bar(self.console, title, len(left)) as show, self._times:
            perform_all(self.work, left, self.rooms, self._watcher(title, len(left), show))
        self._raise_deaths()

    def _search(self) -> None:
        """Draw until there are as many trials as are asked for, or nothing new is drawn."""
        wanted, before = self.config.search.num_trials, -1
        while before < (there := len(self._searched())) < wanted:
            before = there
            with bar(self.console, "search", wanted) as show, self._times:
                watcher = self._watcher("search", wanted, show, there)
                search(self.work, self.config.search, stored_trials(self.folder), self.rooms, watcher)
            self._raise_deaths()
        if there < wanted:
            self.say(f"  the search draws what it has drawn before: it ends with {there} different trials of {wanted}")

    def _searched(self) -> list[Trial]:
        return [one for one in stored_trials(self.folder) if one.kind == "search" and one.is_over]

    def _evolve(self, population: Population) -> None:
        """Train the population from rung to rung, copying the best over the worst between them."""
        members = population.first()
        for step in self.work.rung_steps:
            members = self._trained(members, step)
            if step == self.work.num_steps:
                return
            found = population.next(members, step)
            kept = {one.key for one, model in found if model is None}
            for one in members:
                if one.key not in kept and not one.is_over:
                    self._log(TrialFile(self.folder, one).write(state="stopped"))
            members = [one if model is None else settle(self.work, one, model) for one, model in found]

    def _trained(self, members: Sequence[Trial], step: int) -> list[Trial]:
        """The members, each scored at a rung, or failed."""
        there = [TrialFile(self.folder, one).trial for one in members]
        short = {one.key: one for one in there if not one.is_over and not (one.points and one.points[-1][0] >= step)}
        if short:
            title = f"population, step {step}"
            with bar(self.console, title, len(short)) as show, self._times:
                watcher = self._watcher(title, len(short), show)
                perform_all(self.work, list(short.values()), self.rooms, watcher, step)
            self._raise_deaths()
        return [TrialFile(self.folder, one).trial for one in members]

    def _finals(self, baselines: Sequence[Trial]) -> list[tuple[Candidate, list[Trial]]]:
        """The best and the baselines, each at fresh seeds."""
        found = candidates(stored_trials(self.folder), baselines)
        chosen = finalists(found, self.work.mode, self.config.num_finalists)
        if not chosen:
            raise ValueError(self._why_nothing())
        seeds = [self.work.recipe.seed + 1 + number for number in range(self.config.num_seeds)]
        for seed in seeds:
            self._prepare(seed, final=True)
        asked = [(one, [self._final(one, seed) for seed in seeds]) for one in chosen]
        self._perform("finalists", [trial for _, trials in asked for trial in trials])
        there = {trial.key: trial for trial in stored_trials(self.folder)}
        return [(one, [there[trial.key] for trial in trials]) for one, trials in asked]

    @staticmethod
    def _final(one: Candidate, seed: int) -> Trial:
        """The same training, of a population's copy with all that it has changed on the way, at another seed."""
        return Trial(kind="final", name=one.name, values=one.trial.values, changes=one.trial.changes, seed=seed)

    def _why_nothing(self) -> str:
        mistakes = {trial.mistake for trial in stored_trials(self.folder) if trial.mistake}
        return f"no trial could be scored: {'; '.join(sorted(mistakes)[:3]) or 'none was asked for'}"

    # Who watches

    def _watcher(self, title: str, total: int, show: Any, ended: int = 0) -> Any:
        count, there = ended, stored_trials(self.folder)
        scores = [one.score for one in there if one.kind != "final" and one.score is not None]
        over = {one.key for one in there if one.is_over}

        def done(trial: Trial) -> None:
            nonlocal count
            if trial.key in over:  # drawn again: it has only been read
                return
            over.add(trial.key)
            count += 1
            show(count)
            self._times.save()
            if trial.state == "running":
                self._deaths.append(f"trial {trial.key}: {trial.mistake}")
            self._log(trial)
            if trial.score is not None:
                scores.append(trial.score)
            best = min(scores, key=lambda score: rank(score, self.work.mode), default=None)
            told = "" if best is None or trial.kind == "final" else f"   best {best:.4g}"
            self.say(f"  {title} {count}/{total}  {trial.key}  {_outcome(trial)}{told}")

        return done

    def _raise_deaths(self) -> None:
        if self._deaths:
            raise ChildProcessError(
                f"{len(self._deaths)} of the trials' processes died again and again: {'; '.join(self._deaths[:3])}. All"
                " that has ended is kept: run the same command again, with fewer --slots where memory is short"
            )

    def _log(self, trial: Trial) -> None:
        """Tell the tracker of a trial, as a run within the sweep's; telling it again changes nothing."""
        tags = {"kind": trial.kind, "name": trial.name, "trial": trial.key, "space": self.name}
        child = self.tracker.child(f"{trial.name or trial.kind} {trial.key[:6]}", tags, reopen=False)
        child.params({**trial.values, "seed": trial.seed})
        for step, score in trial.points:
            child.metrics({"score": score, self.work.metric: score}, int(step))
        if trial.row:
            child.summary(summary_of(Row(**trial.row)), self.work.num_steps)
        child.tags({"state": trial.state, "mistake": trial.mistake})
        if trial.state == "failed":
            child.finish("FAILED")

    def say(self, text: str) -> None:
        """One line to the person who watches."""
        self.console.print(text, highlight=False)

    # What it leaves

    def _leave(self, report: SweepReport) -> None:
        winner = report.winner
        recipe = self.work.winner(winner.changes)
        write_text(self.folder / "winner.yaml", report.lineage(self.folder, recipe) + to_yaml(recipe))
        write_json(self.folder / "sweep_report.json", report.to_dict())
        pictures = render_sweep(report, self.work, self.folder)
        for picture in pictures:
            self.tracker.figure(picture.stem, picture)
        for name in ("winner.yaml", "sweep_report.json", "sweep.html"):
            self.tracker.artifact(self.folder / name)
        self.tracker.tags({"winner": winner.name})
        self.tracker.summary(report.metrics(), step=0)
        self.tracker.flush()


def _outcome(trial: Trial) -> str:
    if trial.state == "failed":
        return f"failed: {trial.mistake}"
    if trial.row:
        return f"FID {trial.row['fid']:.4g} at seed {trial.seed}, {trial.seconds:.0f} s"
    how = {"stopped": "stopped early at", "paused": "so far"}.get(trial.state, "score")
    return f"{how} {trial.score:.4g}, {trial.seconds:.0f} s" if trial.score is not None else trial.state
