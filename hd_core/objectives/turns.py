"""What an objective is: a value that says, turn by turn, which player moves and what it pays.

An objective owns no network, optimiser, device or schedule. One iteration is a generator of turns. `hd_core.step`
freezes everyone but the turn's player, evaluates the loss, moves the player, and sends the loss's ``carry`` back
into the generator, so that a later turn can build on the state that an earlier one reached.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol, Self, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hd_core.random import Draws
from hd_core.types import Condition, FeatureMap, FlowMap, Grid, Images, Judge, PerSample, Velocity

PlayerName = Literal["student", "fake_score", "discriminator"]
Need = Literal["trajectories", "images", "features", "start", "perceptual"]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What one turn costs, before any reduction."""

    losses: Mapping[str, PerSample]
    """Loss terms by name, one number a row, already weighted."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Scalars worth watching that are not paid for; averaged over the global batch."""
    carry: Tensor | None = None
    """Sent back into the objective's generator; detached."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """The scalar to minimise: the sum of the terms, averaged over rows."""
        return torch.stack([term.mean() for term in self.losses.values()]).sum()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One player's move; ``terms`` is evaluated while every other player is frozen."""

    player: PlayerName
    terms: Callable[[], Terms]


Turns = Generator[Turn, Tensor | None, None]


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The networks that a turn may call. Which of the optional ones are there follows from the objective's players."""

    teacher: Velocity
    """The frozen, guided teacher."""
    student: FlowMap
    fake_score: Velocity | None = None
    discriminator: Judge | None = None
    features: FeatureMap | None = None
    """Tapped features of the frozen teacher."""
    start: FlowMap | None = None
    """A frozen copy of the weights that the student starts from."""
    perceptual: Callable[[Images, Images], PerSample] | None = None
    """A distance of two images as eyes have it."""
    null_condition: Condition | None = None
    """One row of "no class", where the teacher knows it."""
    mean: Callable[[Tensor], Tensor] = field(default=lambda value: value)
    """Mean of a detached tensor over the workers, for what an objective must know of the whole global batch."""
    lockstep: bool = False
    """Whether networks are split among workers: each worker must then call them as often as the others, on any rows."""
    frugal: bool = False
    """Whether several passes make a move: what can be computed again is not kept from one turn to the next."""

    @property
    def fake(self) -> Velocity:
        """The fake score; only objectives that declare it as a player may ask."""
        return cast(Velocity, self.fake_score)

    @property
    def judge(self) -> Judge:
        """The discriminator; only objectives that declare it as a player may ask."""
        return cast(Judge, self.discriminator)

    @property
    def taps(self) -> FeatureMap:
        """The teacher's features; only objectives that need them may ask."""
        return cast(FeatureMap, self.features)

    @property
    def origin(self) -> FlowMap:
        """What the student starts from; only objectives that need it may ask."""
        return cast(FlowMap, self.start)

    @property
    def perception(self) -> Callable[[Images, Images], PerSample]:
        """The perceptual distance; only objectives that need it may ask."""
        return cast(Callable[[Images, Images], PerSample], self.perceptual)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This worker's rows of one global batch."""

    noise: Images
    """The state at the first time of the grid."""
    condition: Condition
    states: Float[Tensor, "b points c h w"] | None = None
    """The teacher's dense trajectory from ``noise``, where the objective needs trajectories."""
    grid: Grid | None = None
    """Times of ``states``."""
    images: Images | None = None
    """Real data, where the objective needs images; independent of ``noise``."""
    images_condition: Condition | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device; the grid stays where it is."""
        return self._with(lambda value: value.to(device))

    def part(self, rows: slice) -> Self:
        """Some of the rows."""
        return self._with(lambda value: value.rows(rows) if isinstance(value, Condition) else value[rows])

    def _with(self, change: Callable[[Tensor | Condition], Tensor | Condition]) -> Self:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "grid"}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


@runtime_checkable
class Objective(Protocol):
    """A distillation method. See `hd_core.objectives` for the known ones."""

    @property
    def players(self) -> tuple[PlayerName, ...]:
        """Those that it trains, the student first."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """What its turns read besides noise and condition."""
        ...

    def sampling_grid(self) -> Grid:
        """The times that its student samples at, from noise to data."""
        ...

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        """The moves of one iteration."""
        ...


def without_classes(cast: Cast, condition: Condition, draws: Draws, share: float) -> Condition:
    """The condition, with a share of its rows replaced by "no class".

    Raises:
        ValueError: the teacher knows no such condition.
    """
    if not share:
        return condition
    if cast.null_condition is None:
        raise ValueError(f'label_dropout needs a teacher that knows "no class"; given {share}, use 0')
    return condition.replaced(draws.uniform("dropout") < share, cast.null_condition)


def first_step_is_analytical(objective: Objective) -> bool:
    """Whether its student's first step is computed without the network: its field ``afs``, where it has one."""
    return bool(getattr(objective, "afs", False))
