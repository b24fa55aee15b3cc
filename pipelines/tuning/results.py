"""What a sweep has found: candidates, finalists at fresh seeds, and how sure a difference between them is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hd_core.metrics.estimate import LEVEL
from pipelines.tuning.trial import Kind, Trial
from pipelines.tuning.work import Mode, rank

HAND_SET = "hand-set"
"""The recipe as it is."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trial, and all that it is called: two baselines may be the same schedule."""

    name: str
    trial: Trial


def candidates(trials: Sequence[Trial], baselines: Sequence[Trial]) -> list[Candidate]:
    """Baselines under their names, then what was drawn, the best first; only what was trained to its end."""
    there = {trial.key: trial for trial in trials if trial.state == "done" and trial.kind != "final"}
    names: dict[str, list[str]] = {}
    for trial in baselines:
        names.setdefault(trial.key, []).append(trial.name)
    named = [Candidate(name=" = ".join(called), trial=there[key]) for key, called in names.items() if key in there]
    drawn = [trial for trial in there.values() if trial.key not in names]
    return named + [Candidate(name=f"{trial.kind} {trial.key}", trial=trial) for trial in drawn]


def finalists(found: Sequence[Candidate], mode: Mode, count: int) -> list[Candidate]:
    """All baselines, the best of the search, and the best draw by chance alone."""

    def best(kind: str, most: int) -> list[Candidate]:
        scored = [one for one in found if one.trial.kind == kind and one.trial.score is not None]
        return sorted(scored, key=lambda one: rank(one.trial.score, mode))[:most]

    drawn = [
        Candidate(name=f"{one.trial.kind}, {_ordinal(place)}", trial=one.trial)
        for kind, most in (("search", count), ("random", min(1, count)))
        for place, one in enumerate(best(kind, most))
    ]
    return [one for one in found if one.trial.kind == "baseline"] + drawn


def _ordinal(place: int) -> str:
    return "best" if place == 0 else f"{place + 1}{ {2: 'nd', 3: 'rd'}.get(place + 1, 'th') }"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds with the interval of level `LEVEL` in which it would lie for other seeds; None: one seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Student's interval.

        Raises:
            ValueError: there is no value.
        """
        if not values:
            raise ValueError("a mean needs at least one value")
        count = len(values)
        if count == 1:
            return cls(mean=float(values[0]), half=None)
        error = float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(mean=float(np.mean(values)), half=float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error)

    @property
    def is_zero(self) -> bool:
        """Whether it cannot be told from nothing."""
        return self.half is None or abs(self.mean) <= self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A candidate at fresh seeds, on held-out images."""

    name: str
    kind: Kind
    """Who asked first for its trial."""
    trial: str
    """That trial's key."""
    at_search: float | None
    """The score by which it got here."""
    changes: dict[str, Any]
    fids: Mapping[int, float]
    """FID by seed."""
    nfe: int
    score: Interval
    """FID over the seeds."""
    against: Interval | None
    """FID minus that of the recipe as it is, seed by seed; None for that itself, and where it has none."""


def judged(finals: Sequence[tuple[Candidate, Sequence[Trial]]]) -> list[Finalist]:
    """The finalists with their trials at fresh seeds, the best first; those of which all failed are left out."""
    known = [(one, {trial.seed: trial.row for trial in trials if trial.row}) for one, trials in finals]
    fids = {one.name: {seed: float(row["fid"]) for seed, row in rows.items()} for one, rows in known if rows}
    own = next((found for name, found in fids.items() if HAND_SET in name.split(" = ")), {})
    found = [
        Finalist(
            name=one.name,
            kind=one.trial.kind,
            trial=one.trial.key,
            at_search=one.trial.score,
            changes=one.trial.changes,
            fids=fids[one.name],
            nfe=int(next(iter(rows.values()))["nfe"]),
            score=Interval.of(list(fids[one.name].values())),
            against=_against(fids[one.name], own),
        )
        for one, rows in known
        if rows
    ]
    return sorted(found, key=lambda one: one.score.mean)


def _against(fids: Mapping[int, float], own: Mapping[int, float]) -> Interval | None:
    same = [fids[seed] - own[seed] for seed in fids if seed in own]
    return Interval.of(same) if same and fids is not own else None
