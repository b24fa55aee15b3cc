"""The report of a sweep: a table for the terminal, `sweep_report.json`, figures, and a page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from pipelines.artifacts import read_json
from pipelines.recipe import Recipe
from pipelines.tuning.importance import importances
from pipelines.tuning.results import HAND_SET, Candidate, Finalist, Interval, candidates, judged
from pipelines.tuning.sharing import shared_with
from pipelines.tuning.trial import Trial
from pipelines.tuning.work import Mode, Work, rank


@dataclass(frozen=True, kw_only=True)
class Winner:
    """What the sweep proposes."""

    name: str
    changes: dict[str, Any]
    fid: Interval | None
    """On held-out images, over seeds; None where there were no finalists."""
    against: Interval | None
    """The same minus that of the recipe as it is."""
    score: float | None
    """By which the search chose it."""
    trial: str
    """Its key among the trials."""


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """All that a sweep has found."""

    space: str
    stage: str
    recipe: str
    stages: list[str]
    """The recipe's."""
    metric: str
    scored_on: str
    """The real images behind the scores."""
    trials: list[Trial]
    """Baselines and draws, the best score first."""
    finalists: list[Finalist]
    importances: dict[str, float]
    """Share of the scores' variance that each parameter explains."""
    winner: Winner
    costs: dict[str, float]
    """Seconds: wall (of performing trials), work (sum over trials), slots, ideal (work / slots), shared, saved."""

    @classmethod
    def of(
        cls,
        work: Work,
        name: str,
        stored: Sequence[Trial],
        baselines: Sequence[Trial],
        finals: Sequence[tuple[Candidate, Sequence[Trial]]],
        costs: Mapping[str, float],
    ) -> "SweepReport":
        """Put together what the trials say."""
        finalists = judged(finals)
        drawn = [trial for trial in stored if trial.kind != "final"]
        return cls(
            space=name,
            stage=work.space.stage,
            recipe=work.recipe.name,
            stages=list(work.recipe.stages),
            metric=work.metric,
            scored_on=work.scored_on,
            trials=sorted(drawn, key=lambda one: rank(one.score, work.mode)),
            finalists=finalists,
            importances=importances(work, drawn),
            winner=_winner(finalists, candidates(stored, baselines), work.mode),
            costs=dict(costs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for JSON."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Numbers for a tracked run."""
        told = {"trials": float(len(self.trials)), **{f"seconds/{name}": value for name, value in self.costs.items()}}
        told |= {f"importance/{name}": value for name, value in self.importances.items()}
        if self.winner.fid:
            told["best/fid"] = self.winner.fid.mean
        if self.winner.against:
            told["best/fid_against_recipe"] = self.winner.against.mean
        return told

    def lineage(self, folder: Path, winner: Recipe) -> str:
        """The comment that opens the winner's recipe."""
        left_out = [name for name in self.stages if name not in winner.stages]
        changed = [f"  {key}: {value}" for key, value in self.winner.changes.items()]
        lines = [
            f"Found by `hdistill tune {self.space} {self.recipe}` in {folder.name}: {self.winner.name}, trial"
            f" {self.winner.trial}.",
            *self.verdict(),
            *(["Changed from the recipe:", *changed] if changed else ["Nothing is changed from the recipe."]),
            *([f"Left out, since they need other trajectories: {', '.join(left_out)}."] if left_out else []),
        ]
        return "".join(f"# {line}\n" for line in lines) + "\n"

    def summary(self) -> str:
        """How much was tried, and what that took."""
        costs = self.costs
        return (
            f"{len(self.trials)} trials by {self.metric}, {costs['work']:,.0f} s of work in {costs['wall']:,.0f} s at"
            f" {costs['slots']:.0f} side by side (ideal {costs['ideal']:,.0f}); what they share took"
            f" {costs['shared']:,.0f} s and saved {costs['saved']:,.0f}."
        )

    def verdict(self) -> list[str]:
        """What the sweep found, in sentences."""
        winner = self.winner
        if winner.fid is None:
            return [f"{self.metric} {winner.score:.4g} at the sweep's own seed; not confirmed at any other."]
        seeds = len(self.finalists[0].fids)
        told = [f"FID {winner.fid} on held-out images, {winner.name}, mean over {seeds} fresh seed(s)."]
        if HAND_SET in winner.name.split(" = "):
            return [*told, "Nothing that was tried is better than the recipe as it is."]
        if winner.against is None:
            return [*told, "It was not compared with the recipe as it is, which could not be trained to its end."]
        gain = f"Against the recipe as it is: {winner.against} (below 0 is better), seed by seed"
        if winner.against.half is None:
            return [*told, f"{gain}. One seed says nothing about another."]
        flattered = f", the first of {len(self.finalists)}" if len(self.finalists) > 2 else ""
        told[0] = told[0].replace(winner.name, f"{winner.name}{flattered}")
        sure = "which cannot be told from no gain" if winner.against.is_zero else "a gain beyond the spread of seeds"
        return [*told, f"{gain}: {sure}."]


def _winner(finals: Sequence[Finalist], found: Sequence[Candidate], mode: Mode) -> Winner:
    """The first of the finalists; where there are none, the best of what was trained to its end."""
    if finals:
        first = finals[0]
        known = {"name": first.name, "trial": first.trial, "changes": first.changes, "score": first.at_search}
        return Winner(**known, fid=first.score, against=first.against)
    best = min(found, key=lambda one: rank(one.trial.score, mode))
    known = {"name": best.name, "trial": best.trial.key, "changes": best.trial.changes, "score": best.trial.score}
    return Winner(**known, fid=None, against=None)


def costs_of(work: Work, times: Mapping[str, float], trials: Sequence[Trial], slots: int) -> dict[str, float]:
    """Seconds of a sweep: as they were, as they would ideally be, and what sharing has saved."""
    worked = sum(trial.seconds for trial in trials)
    users = Counter(folder for trial in trials for folder in _shared(work, trial))
    made = {folder: _seconds(folder) for folder in users}
    return {
        "wall": times["trials"],
        "work": worked,
        "slots": float(slots),
        "ideal": worked / slots,
        "shared": sum(made.values()),
        "saved": sum(seconds * (users[folder] - 1) for folder, seconds in made.items()),
        "sessions": times["sessions"],
    }


def _shared(work: Work, trial: Trial) -> list[Path]:
    """What a trial shares with others, if it is a recipe and shares anything."""
    seeds = [trial.seed] if trial.kind == "final" else work.seeds(trial.seed)
    try:
        return [] if work.space.alone(trial.values) else [shared_with(work, trial, seed) for seed in seeds]
    except ValueError:
        return []


def _seconds(folder: Path) -> float:
    return float((read_json(folder / "ready.json") or {"seconds": 0.0})["seconds"])


def print_sweep(report: SweepReport, console: Console, folder: Path, most: int = 10) -> None:
    """The best trials, the finalists, and what they say."""
    console.print(_trials_table(report, most))
    if report.finalists:
        console.print(_finalists_table(report))
    for line in report.verdict():
        console.print(line, highlight=False)
    console.print(report.summary(), highlight=False)
    console.print(f"recipe of the best: {folder / 'winner.yaml'}\npage: {folder / 'sweep.html'}", highlight=False)


def _trials_table(report: SweepReport, most: int) -> Table:
    ended = {kind: sum(one.state == kind for one in report.trials) for kind in ("done", "stopped", "failed")}
    title = f"{report.space}: {', '.join(f'{count} {kind}' for kind, count in ended.items() if count)}"
    table = Table(title=title, box=HORIZONTALS, title_justify="left")
    for heading in ("Trial", "Kind", report.metric, "Seconds", "Values"):
        table.add_column(heading, justify="right" if heading in (report.metric, "Seconds") else "left")
    for trial in report.trials[:most]:
        score = "-" if trial.score is None else f"{trial.score:.4g}{' (early)' if trial.state == 'stopped' else ''}"
        table.add_row(trial.key, trial.name or trial.kind, score, f"{trial.seconds:,.0f}", values_text(trial.values))
    return table


def _finalists_table(report: SweepReport) -> Table:
    seeds = len(report.finalists[0].fids)
    table = Table(title=f"finalists, {seeds} fresh seed(s), held-out images", box=HORIZONTALS, title_justify="left")
    for heading in ("Finalist", "Calls", "FID", "Against the recipe"):
        table.add_column(heading, justify="left" if heading == "Finalist" else "right")
    for one in report.finalists:
        table.add_row(one.name, str(one.nfe), str(one.score), "-" if one.against is None else str(one.against))
    return table


def values_text(values: Mapping[str, Any]) -> str:
    """A draw in one line."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
