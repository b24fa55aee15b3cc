"""Population-based training (Jaderberg et al. 2017): at each rung the worst trials go on as copies of the best.

A copy is a recipe like any other: that of the trial which it copies, whose numbers change from the rung on
(``stages.*.later``). So the weights that it takes over are those that it would have come to by itself; what wins can be
trained again, whole, at any seed; and an interrupted search goes on where it was, since every choice follows from the
seed and the scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from pipelines.recipe import override
from pipelines.tuning.copies import hand_over
from pipelines.tuning.trial import Trial, TrialFile, trial_folder
from pipelines.tuning.work import Work, chained, rank
from tune_spaces.space import Choice, Distribution, Integer, Uniform

_SHARE = 4
"""One trial in so many is replaced at a rung, by a copy of one of as many that are best."""
_AFRESH = 0.25
"""How likely a number of a copy is drawn anew; else it goes a step up or down."""
_STEP = 0.1
"""Such a step, as a share of the number's range (of its logarithm, where that is what is uniform)."""


@dataclass(frozen=True)
class Population:
    """Trials that train side by side."""

    work: Work
    size: int
    seed: int

    def __post_init__(self) -> None:
        stage = self.work.space.stage
        if self.size < 2:
            raise ValueError(f"pbt needs at least 2 trials side by side in training; given {self.size}")
        if self.work.rungs < 2:
            raise ValueError("pbt changes trials at the rungs before their end: it needs at least 2 rungs; given 1")
        if self.work.score_seeds > 1:
            raise ValueError(f"pbt scores a trial by one training; given {self.work.score_seeds} seeds")
        if self.work.recipe.train.num_workers:
            raise ValueError(
                "pbt goes with trials that train in their own process: set train.num_workers to 0 (over Ray Train's"
                " workers it would do nothing)"
            )
        if self.work.recipe.stages[stage].later:
            raise ValueError(f"pbt changes numbers of stage {stage} while it trains, and so does its later: take one")
        if not self.numbers:
            raise ValueError(
                f"pbt changes numbers of a stage while it trains, and none of {', '.join(self.work.space.parameters)}"
                " may change then: they decide what is built. Use another scheduler"
            )

    @cached_property
    def numbers(self) -> list[str]:
        """Parameters that may change while a trial trains."""
        return [name for name in self.work.space.parameters if _may_change(self.work, name)]

    def first(self) -> list[Trial]:
        """The trials at the start, by chance."""
        drawn = (self.work.space.draw(f"{self.seed}-population-{place}") for place in range(self.size))
        changes = self.work.space.overrides
        return [Trial(kind="search", values=one, changes=changes(one), seed=self.work.recipe.seed) for one in drawn]

    def next(self, members: Sequence[Trial], step: int) -> list[tuple[Trial, Trial | None]]:
        """The trials from a rung on, each with whom it is a copy of, if it is a new one."""
        order = sorted(
            range(self.size), key=lambda place: (rank(_score_at(members[place], step), self.work.mode), place)
        )
        few = max(1, self.size // _SHARE)
        found: list[tuple[Trial, Trial | None]] = [(one, None) for one in members]
        for place in order[-few:]:
            chance = Random(f"{self.seed}-{step}-{place}")
            model = members[order[chance.randrange(few)]]
            if _score_at(model, step) is not None:
                found[place] = self._copy(model, step, chance), model
        return found

    def _copy(self, model: Trial, step: int, chance: Random) -> Trial:
        space, stage = self.work.space, self.work.space.stage
        values = {
            **model.values,
            **{name: _explored(space.parameters[name], model.values[name], chance) for name in self.numbers},
        }
        before, after = space.overrides(model.values), space.overrides(values)
        moved = {
            key.removeprefix(f"stages.{stage}."): value for key, value in after.items() if value != before.get(key)
        }
        later = {**model.changes.get(_later(stage), {}), **({str(step): moved} if moved else {})}
        return Trial(
            kind="search",
            values=values,
            changes={**model.changes, **({_later(stage): later} if later else {})},
            seed=model.seed,
            state="paused",
            points=[point for point in model.points if point[0] <= step],
            parent=model.key,
            since=step,
        )


def _later(stage: str) -> str:
    return f"stages.{stage}.later"


def _score_at(trial: Trial, step: int) -> float | None:
    if trial.state == "failed":
        return None
    return next((score for at, score in trial.points if at == step), None)


def _may_change(work: Work, name: str) -> bool:
    """Whether a parameter is one or more numbers of the stage that need not be there from the start."""
    space, one = work.space, work.space.parameters[name]
    base = space.draw("base")
    drawn = [space.overrides({**base, name: one.draw(Random(f"{name}-{number}"))}) for number in range(12)]
    keys = sorted(
        {key for changes in drawn for key in changes if any(changes[key] != other.get(key) for other in drawn)}
    )
    start = f"stages.{space.stage}."
    if not keys or not all(key.startswith(start) for key in keys):
        return False
    try:
        for changes in drawn:
            later = {key.removeprefix(start): changes[key] for key in keys}
            override(chained(work.recipe, space.stage), {**drawn[0], _later(space.stage): {"1": later}})
    except ValueError:
        return False
    return True


def _explored(one: Distribution, value: Any, chance: Random) -> Any:
    """Another value, near or anywhere."""
    if chance.random() < _AFRESH:
        return one.draw(chance)
    way = chance.choice((-1, 1))
    if isinstance(one, Choice):
        place = list(one.values).index(value) + way
        return one.values[min(max(place, 0), len(one.values) - 1)]
    if isinstance(one, Integer):
        return min(max(value + way * max(1, round(_STEP * (one.high - one.low))), one.low), one.high)
    return _stepped(one, value, way * _STEP)


def _stepped(one: Uniform, value: float, share: float) -> float:
    moved = value * (one.high / one.low) ** share if one.log else value + share * (one.high - one.low)
    return min(max(moved, one.low), one.high)


def settle(work: Work, copy: Trial, model: Trial) -> Trial:
    """Put a copy beside the trial that it copies, with what it takes over of that one; done once."""
    file = TrialFile(work.sweep, copy)
    if not file.exists:
        hand_over(trial_folder(work.sweep, model) / "stages" / work.space.stage, file.folder, copy.since)
        file.write()
    return file.trial
