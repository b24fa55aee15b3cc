"""What every trial of a sweep is told: plain values, which travel to any process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.artifacts import fingerprint
from pipelines.recipe import Recipe, determining, from_dict, override
from tune_spaces.space import Space

Mode = Literal["min", "max"]
_FAR = 1_000_000
METRICS: dict[str, Mode] = {"probe/fid": "min", "probe/diversity": "max"}
"""What trials may be scored by, and which way is better. A training loss is none of them: as soon as schedule or
weights change it measures something else."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One sweep, as its trials know it."""

    sweep: Path
    """The sweep's directory."""
    recipe: Recipe
    """What is changed."""
    space: Space
    """What it is changed over."""
    metric: str = "probe/fid"
    """The score: a value of the stage's probes."""
    rungs: int = 4
    """How often a trial is scored, its end included."""
    num_samples: int = 2000
    """Samples behind a score; the same noises for every trial."""
    score_seeds: int = 1
    """Trainings behind a score, which is their mean, each at a seed of its own."""
    cpus: float = 1.0
    """CPUs of a trial, which set its threads."""
    pauses: bool = False
    """Whether trials wait for each other at their rungs."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"trials cannot be scored by {self.metric!r}: choose one of {', '.join(METRICS)}")
        if self.rungs < 1 or self.num_samples < 2:
            raise ValueError(f"rungs must be at least 1 and samples 2; given {self.rungs} and {self.num_samples}")
        if self.score_seeds < 1:
            raise ValueError(f"a score needs at least 1 training behind it; given {self.score_seeds}")

    @property
    def scored_on(self) -> str:
        """The real images behind the scores."""
        return "images that are kept from training" if self.recipe.data.validation else "the training images"

    @property
    def is_flattered(self) -> bool:
        """Whether the searched stage learns from the very images that it is scored on."""
        return "images" in self.recipe.stages[self.space.stage].objective.needs and not self.recipe.data.validation

    @property
    def num_steps(self) -> int:
        """Iterations of a whole trial."""
        return self.recipe.stages[self.space.stage].num_steps

    @property
    def mode(self) -> Mode:
        """Whether the lowest or the highest score is the best."""
        return METRICS[self.metric]

    @property
    def worst(self) -> float:
        """The score of a trial that has none."""
        return float("inf") if self.mode == "min" else float("-inf")

    @property
    def every(self) -> int:
        """Iterations between scores."""
        return -(-self.num_steps // self.rungs)

    @property
    def rung_steps(self) -> list[int]:
        """Iterations after which trials are scored, the last one at the end."""
        return [*range(self.every, self.num_steps, self.every), self.num_steps]

    def trial_recipe(self, changes: Mapping[str, Any], seed: int, *, final: bool) -> Recipe:
        """The sweep's recipe with a trial's changes, and with nothing after the searched stage.

        Raises:
            ValueError: a field does not exist, or a value is not allowed.
        """
        stage = self.space.stage
        probe = {"every": 0 if final else self.every, "num_samples": self.num_samples, "keep": "last", "beside": False}
        changed = override(chained(self.recipe, stage), {"seed": seed, **changes})
        fixed = {
            "track.enabled": False,
            "evaluate.num_actors": 0,
            **{f"stages.{stage}.probe.{key}": value for key, value in probe.items()},
            **({f"stages.{stage}.checkpoint_every": self.every} if self.pauses or self.score_seeds > 1 else {}),
        }
        return override(changed, fixed)

    @property
    def references(self) -> Path:
        """Features of real images."""
        return self.sweep / "references"

    def seeds(self, seed: int) -> list[int]:
        """Seeds at which a trial of a seed is trained for its score, far from those of finalists."""
        return [seed + _FAR * number for number in range(self.score_seeds)]

    def winner(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with the changes of a trial; without the stages that these leave no trajectories for."""
        try:
            return override(self.recipe, changes)
        except ValueError:
            return override(chained(self.recipe, self.space.stage), changes)

    def shared_folder(self, recipe: Recipe) -> Path:
        """Where what comes before the searched stage is kept: the same folder wherever that is the same."""
        values = determining(recipe.to_dict())
        before = {name: values["stages"][name] for name in recipe.chain(self.space.stage)[:-1]}
        kinds = {"probes": recipe.stages[self.space.stage].probe.every > 0}  # a final trial reads no images
        made_of = {key: values[key] for key in ("seed", "teacher", "data", "precompute", "train", "evaluate")}
        return self.sweep / "shared" / fingerprint({**made_of, "stages": before, **kinds})[:12]


def chained(recipe: Recipe, stage: str) -> Recipe:
    """A recipe with no stages but one and those that lead to it."""
    values = recipe.to_dict()
    return from_dict({**values, "stages": {name: values["stages"][name] for name in recipe.chain(stage)}})


def rank(score: float | None, mode: Mode) -> float:
    """What to sort by to have the best score first, and no score last."""
    if score is None:
        return float("inf")
    return score if mode == "min" else -score
