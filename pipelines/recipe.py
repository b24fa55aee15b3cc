"""The recipe: one frozen tree of dataclasses that says everything a run does, and the one road to change it.

The parts stand next to the code that they configure; this module puts them together, reads YAML, applies overrides
and explains mistakes. Nothing else imports pydantic or yaml.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hd_core.objectives.dmd import DMD
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.meanflow import MeanFlow
from hd_core.objectives.sfd import SFD
from hd_core.times import positions
from pipelines.artifacts import fingerprint
from pipelines.data import DataConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.mistakes import explain, field_names, nearest, unnamed_objectives
from pipelines.precompute import PrecomputeConfig
from pipelines.stages import FREE_PROBE_FIELDS, FREE_STAGE_FIELDS, StageConfig, TrainConfig, sampling_grid
from pipelines.teacher_training import TeacherTraining
from pipelines.teachers import TeacherConfig
from pipelines.tracking import TrackConfig

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one run does."""

    name: str
    """What the run is called in directories and in the tracker."""
    seed: int = 0
    """Every random number of the run follows from it."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The slow model that is distilled."""
    teacher_training: TeacherTraining | None = None
    """How `hdistill teacher` makes the teacher from the data, where there is none yet."""
    data: DataConfig = field(default_factory=DataConfig)
    """Real images: reference statistics, and what a discriminator compares with."""
    precompute: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    """The teacher trajectories, made once."""
    stages: dict[str, StageConfig]
    """What is trained, in order; each stage names what it starts from."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How training is spread over workers."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """What is measured."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Where it is recorded."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be a plain name; given {self.name!r}")
        earlier = [TEACHER]
        for name, stage in self.stages.items():
            if not name.isidentifier() or name == TEACHER:
                raise ValueError(f"stages.{name}: a stage's name is letters, digits and underscores, and not 'teacher'")
            if stage.start not in earlier:
                raise ValueError(f"stages.{name}.start: {stage.start!r} is not one of {', '.join(earlier)}")
            self._check_batch(name, stage)
            self._check_derivative(name, stage)
            self._check_spread(name, stage)
            self._check_trajectories(name, stage)
            earlier.append(name)

    def _check_batch(self, name: str, stage: StageConfig) -> None:
        if stage.batch_size < self.train.most_workers:
            raise ValueError(
                f"stages.{name}.batch_size: {stage.batch_size} rows are fewer than {self.train.most_workers} workers"
            )
        if "trajectories" in stage.objective.needs and stage.batch_size > self.precompute.num_samples:
            raise ValueError(
                f"stages.{name}.batch_size: {stage.batch_size} rows are more than the {self.precompute.num_samples}"
                " trajectories that there will be (precompute.num_samples)"
            )

    def _check_derivative(self, name: str, stage: StageConfig) -> None:
        exact = isinstance(stage.objective, MeanFlow) and stage.objective.derivative == "exact"
        if exact and self.train.gradient_checkpointing:
            raise ValueError(
                f"stages.{name}.objective: derivative exact cannot go through train.gradient_checkpointing; use"
                " finite_difference, or turn it off"
            )

    def _check_spread(self, name: str, stage: StageConfig) -> None:
        """What does not go with networks that are split among workers, or with a batch that is computed in parts."""
        split, objective = self.train.splits, stage.objective
        if isinstance(objective, MeanFlow) and objective.derivative == "exact" and split("student"):
            raise ValueError(
                f"stages.{name}.objective: derivative exact cannot go through a split student; use finite_difference,"
                " or leave student out of train.sharded"
            )
        if stage.student.kind == "lora" and split("student"):
            raise ValueError(f"stages.{name}.student: adapters need a whole student: leave it out of train.sharded")
        if stage.probe.every and not stage.probe.beside and (split("student") or split("teacher")):
            raise ValueError(
                f"stages.{name}.probe: the first worker alone cannot sample what is split among all: set probe.beside"
            )
        if self.train.micro_batch_size and isinstance(objective, DMD) and objective.adversarial.weighting == "matched":
            raise ValueError(
                f"stages.{name}.objective.adversarial: weighting matched compares gradients over the whole batch: set"
                " train.micro_batch_size to 0, or use fixed"
            )

    def _check_trajectories(self, name: str, stage: StageConfig) -> None:
        grid = self.precompute.grid
        if isinstance(stage.objective, MeanVelocity) and (grid.t_max, grid.t_min) != (1, 0):
            raise ValueError(f"stages.{name}: mean_velocity needs precompute.grid from t_max 1 to t_min 0")
        if isinstance(stage.objective, DMD) and stage.objective.regression_weight:
            own = stage.objective.grid
            if (own.t_max, own.t_min) != (grid.t_max, grid.t_min):
                raise ValueError(
                    f"stages.{name}: regression_weight needs objective.grid to end where precompute.grid does"
                )
        if isinstance(stage.objective, SFD):
            self._check_times(name, stage.objective)
            self._check_start(name, stage)
            for steps in self.evaluate.step_counts if stage.step_counts else ():
                sampling_grid(name, stage, steps)

    def _check_times(self, name: str, objective: SFD) -> None:
        """SFD needs every one of its times to be a point of the trajectory that teaches it."""
        stored = objective.taught_by == "teacher"
        grid, intervals = (self.precompute.grid, self.precompute.intervals) if stored else (objective.grid, None)
        fine = grid.times(intervals or objective.start_intervals)
        for count in objective.counts:
            try:
                positions(fine, objective.grid.times(count))
            except ValueError as error:
                raise ValueError(
                    f"stages.{name}.objective: its times in {count} steps are not all among the {len(fine)} of"
                    f" {'precompute.grid' if stored else 'start_intervals'}: {error}"
                ) from None

    def _check_start(self, name: str, stage: StageConfig) -> None:
        """A student taught by what it starts from is taught on the times that that was trained for."""
        objective = stage.objective
        assert isinstance(objective, SFD)
        start = self.stages[stage.start].objective if stage.start != TEACHER else None
        if objective.taught_by != "start" or not isinstance(start, SFD):
            return
        taught = (start.grid, start.afs) == (objective.grid, objective.start_afs)
        if not taught or objective.start_intervals not in start.counts:
            counts = " or ".join(map(str, start.counts))
            raise ValueError(
                f"stages.{name}.objective: grid, start_afs and start_intervals must be those that {stage.start} was"
                f" trained with (start_afs {str(start.afs).lower()}, start_intervals {counts})"
            )

    def knows_steps(self, name: str) -> bool:
        """Whether a stage's student has an embedding of the number of steps, its own or one that it started with."""
        return any(self.stages[link].step_counts for link in self.chain(name))

    @property
    def needs_trajectories(self) -> bool:
        """Whether any stage reads teacher trajectories."""
        return any("trajectories" in stage.objective.needs for stage in self.stages.values())

    def require_stage(self, name: str) -> None:
        """Raises ValueError where there is no stage of that name."""
        if name not in self.stages:
            near = nearest(name, self.stages)
            raise ValueError(f"there is no stage {name!r}{near}. Stages: {', '.join(self.stages)}")

    def chain(self, name: str) -> list[str]:
        """The stages that lead to one, itself last."""
        start = self.stages[name].start
        return [*([] if start == TEACHER else self.chain(start)), name]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that JSON and Ray can carry."""
        return _ADAPTER.dump_python(self, mode="json")

    @property
    def fingerprint(self) -> str:
        """Hash of all that may change a result."""
        return fingerprint(determining(self.to_dict()))


_ADAPTER = TypeAdapter(Recipe)

_FREE = (
    "name",
    "track",
    "teacher_training",
    "train.num_workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "train.gradient_checkpointing",
    "train.resident_bytes",
    "train.max_failures",
    "train.strategy",
    "train.sharded",
    "train.micro_batch_size",
    "train.keep_checkpoints",
    "train.resize_seconds",
    "precompute.num_actors",
    "precompute.cpus_per_actor",
    "precompute.gpus_per_actor",
    "precompute.batch_size",
    "evaluate.batch_size",
    "evaluate.num_actors",
    "evaluate.cpus_per_actor",
    "evaluate.gpus_per_actor",
    "evaluate.solvers",
    "evaluate.peers",
    "evaluate.clip",
    "evaluate.step_counts",
    "evaluate.guidance_scales",
    *(f"stages.*.{name}" for name in FREE_STAGE_FIELDS),
    *(f"stages.*.probe.{name}" for name in FREE_PROBE_FIELDS),
)
"""Patterns of fields that say how, where and what else, not what: changing them changes no result that is there."""


def determining(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain form without the fields that change no result."""

    def strip(part: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        kept = {
            key: item for key, item in part.items() if not any(fnmatchcase(f"{prefix}{key}", free) for free in _FREE)
        }
        return {k: strip(v, f"{prefix}{k}.") if isinstance(v, Mapping) else v for k, v in kept.items()}

    return strip(values, "")


def from_dict(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Decode and check a recipe.

    Raises:
        ValueError: a line for each mistake, saying which field, what was given and what is allowed.
    """
    unnamed = list(unnamed_objectives(values))
    if unnamed:
        raise ValueError("\n".join(f"{source}: {line}" for line in unnamed))
    try:
        return _ADAPTER.validate_python(dict(values), extra="forbid")
    except ValidationError as error:
        lines = dict.fromkeys(explain(dict(entry), values, Recipe) for entry in error.errors())
        raise ValueError("\n".join(f"{source}: {line}" for line in lines if line)) from None


def load(name_or_path: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a name (`hdistill recipes` lists them) or a file, with ``key=value`` settings applied.

    Raises:
        ValueError: there is no such recipe, or it or a setting is wrong.
    """
    path = find(name_or_path)
    values = read_yaml(path, "recipe", field_names(Recipe))
    recipe = from_dict({"name": path.stem, **values}, str(name_or_path))
    return override(recipe, dict(parse_setting(setting) for setting in settings))


def read_yaml(path: Path, what: str, keys: Sequence[str]) -> Mapping[str, Any]:
    """The mapping in a YAML file; ``keys`` are what it may hold.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{what} {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold a mapping with the keys {', '.join(keys)}")
    return values


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a YAML file."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False)


def names() -> dict[str, Path]:
    """The recipes that come with the package."""
    folder = Path(str(resources.files("pipelines"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name_or_path: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: there is none.
    """
    known, path = names(), Path(name_or_path)
    if name_or_path in known:
        return known[name_or_path]
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(f"recipe file {path} does not exist")
    raise ValueError(
        f"unknown recipe {name_or_path!r}{nearest(name_or_path, known)}. Known: {', '.join(known)}; "
        "a recipe of your own is named by its path, ending in .yaml"
    )


def header(path: Path) -> str:
    """The comment that opens a recipe file."""
    lines = path.read_text().splitlines()
    body = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:body])


def parse_setting(setting: str) -> tuple[str, Any]:
    """``key=value`` with the value read as YAML.

    Raises:
        ValueError: there is no ``=``, or the value is not YAML.
    """
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes key=value, such as seed=1; given {setting!r}")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {key.strip()}: {value!r} is not a YAML value") from None


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields changed, by dotted key; the one road for ``--set`` and for tuning trials.

    Raises:
        ValueError: a key does not exist (the nearest is named), or a value is not allowed.
    """
    if not changes:
        return recipe
    values = recipe.to_dict()
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = values
        for depth, part in enumerate(parents):
            inner = _step_into(inner, part, ".".join(parents[:depth]))
        if not isinstance(inner, dict) or last not in inner:
            raise ValueError(f"unknown key {key!r}{nearest(last, inner)}. {_allowed('.'.join(parents), inner)}")
        inner[last] = value
    return from_dict(values)


def _step_into(inner: Any, part: str, path: str) -> Any:
    if not isinstance(inner, dict) or part not in inner:
        raise ValueError(f"unknown key {part!r}{nearest(part, inner)}. {_allowed(path, inner)}")
    return inner[part]


def _allowed(path: str, inner: Any) -> str:
    if not isinstance(inner, Mapping):
        return f"{path} is a single value"
    return f"Keys {'of ' + path if path else 'at the top'}: {', '.join(inner)}"
