"""What a search is over: named parameters, and the fields of a recipe that a draw of them changes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hd_core.types import Condition, Grid, Images, Velocity

Values = Mapping[str, Any]
Changes = dict[str, Any]
"""Fields of a recipe by dotted key."""
FromTrajectories = Callable[[Velocity, Sequence[Images], Grid, Condition], Mapping[str, Values]]
"""From the teacher's velocity, the states at each time of a grid, the grid, and what the rows are of: draws by name."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """A number between two."""

    low: float
    high: float
    log: bool = False
    """Uniform in the logarithm."""

    def __post_init__(self) -> None:
        if not self.low < self.high or not all(map(math.isfinite, (self.low, self.high))):
            raise ValueError(f"a range needs low below high; given {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range lies above 0; given {self.low:g}")

    def contains(self, value: Any) -> bool:
        """Whether it may be drawn."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def draw(self, chance: Random) -> float:
        """A value by chance alone."""
        if self.log:
            return math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
        return chance.uniform(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Integer:
    """A whole number, both ends included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a range needs low below high; given {self.low} and {self.high}")

    def contains(self, value: Any) -> bool:
        """Whether it may be drawn."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def draw(self, chance: Random) -> int:
        """A value by chance alone."""
        return chance.randint(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of some values."""

    values: Sequence[Any]

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError(f"a choice needs at least two values; given {list(self.values)}")

    def contains(self, value: Any) -> bool:
        """Whether it may be drawn."""
        return value in self.values

    def draw(self, chance: Random) -> Any:
        """A value by chance alone."""
        return chance.choice(list(self.values))


Distribution = Uniform | Integer | Choice


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched, for one stage of one recipe."""

    stage: str
    """The stage whose samples are scored."""
    parameters: Mapping[str, Distribution]
    changes: Callable[[Values], Changes]
    """What a draw of the parameters changes in the recipe."""
    always: Changes = field(default_factory=dict)
    """What every trial changes, so that all of them can share what is made once."""
    baselines: Mapping[str, Values] = field(default_factory=dict)
    """Draws to compare with, by what a table calls them; ``hand-set``, the empty one, is the recipe as it is."""
    from_trajectories: FromTrajectories | None = None
    """Further baselines, found on some of the teacher's trajectories that are stored."""
    alone: Callable[[Values], bool] = lambda values: False
    """Whether a draw needs trajectories that no other needs: they are not kept."""
    in_parameters: Callable[[Values], Values] = lambda values: values
    """A baseline in the words of the parameters, so that a sampler can learn from it."""

    def as_draw(self, baseline: Values) -> dict[str, Any] | None:
        """The draw that a baseline would have been; ``None`` where it lies outside of what is searched."""
        values = self.in_parameters(baseline)
        allowed = all(name in values and one.contains(values[name]) for name, one in self.parameters.items())
        return {name: values[name] for name in self.parameters} if allowed else None

    def draw(self, seed: str) -> dict[str, Any]:
        """Every parameter by chance alone, from a seed."""
        return {name: one.draw(Random(f"{seed}/{name}")) for name, one in self.parameters.items()}

    def overrides(self, values: Values) -> Changes:
        """All that a trial changes in the recipe: nothing, where nothing is drawn."""
        return {**self.always, **self.changes(values)} if values else {}


def first_stage(recipe: Values, asked: str, fits: Callable[[Values], bool], what: str) -> str:
    """The stage that is asked for, or the recipe's first that fits.

    Raises:
        ValueError: there is none, or the one that is asked for does not fit.
    """
    stages: Values = recipe["stages"]
    found = [name for name, stage in stages.items() if fits(stage)]
    if asked and asked not in stages:
        raise ValueError(f"the recipe has no stage {asked!r}; it has {', '.join(stages)}")
    if asked and asked not in found:
        raise ValueError(f"stage {asked} has no {what}; of this recipe {', '.join(found) or 'no stage'} has")
    if not found:
        raise ValueError(f"no stage of the recipe has {what}")
    return asked or found[0]
