"""Mean velocity from stored trajectories: the sketch of HD without a Jacobian (HD, Propositions 1 and 2).

Between two points of the teacher's own trajectory the mean velocity is a difference quotient,

    u(x_t, t, r) = (x_t - x_r) / (t - r),

so the student regresses to it directly: no teacher call and no derivative in the training step. The points are those
of the stored grid; between them nothing is interpolated, for an error of the state would be divided by ``t - r``.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hd_core.objectives.turns import Batch, Cast, Need, PlayerName, Terms, Turn, Turns
from hd_core.paths import expand, flatten_mean
from hd_core.random import Draws
from hd_core.times import custom
from hd_core.types import Grid
from hd_core.weighting import adaptive, require_adaptive

Pairs = Literal["uniform", "ends", "adjacent", "to_data"]


@dataclass(frozen=True, kw_only=True)
class MeanVelocity:
    """Regression to the teacher's mean velocity between two points of its stored trajectory."""

    name: Literal["mean_velocity"] = "mean_velocity"
    full_share: float = 0.5
    """Share of rows that cross the whole interval, from noise to data, as sampling does; the others draw a pair."""
    pairs: Pairs = "uniform"
    """uniform: two different points. ends: noise and any later point. adjacent: neighbours. to_data: any point and the
    data."""
    power: float = 0.0
    """Adaptive weight (MeanFlow): the squared error divided by its own detached ``(error + constant)^power``."""
    constant: float = 1e-3
    """Keeps the adaptive weight finite."""

    def __post_init__(self) -> None:
        if not 0 <= self.full_share <= 1:
            raise ValueError(f"full_share is a share of rows, between 0 and 1; given {self.full_share}")
        require_adaptive(power=self.power, constant=self.constant)

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ("student",)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"trajectories"})

    def sampling_grid(self) -> Grid:
        return custom([1.0, 0.0])

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        yield Turn(player="student", terms=partial(self._terms, cast, batch, draws))

    def _terms(self, cast: Cast, batch: Batch, draws: Draws) -> Terms:
        assert batch.states is not None and batch.grid is not None
        start, end = self.positions(draws, len(batch.grid))
        rows, times = torch.arange(len(start), device=start.device), batch.grid.to(start.device)
        x_t, x_r = batch.states[rows, start], batch.states[rows, end]
        t, r = times[start], times[end]
        target = (x_t - x_r) / expand(t - r, x_t)
        u = cast.student(x_t, t.to(x_t.dtype), r.to(x_t.dtype), batch.condition)
        error = flatten_mean((u - target).square())
        weighted = adaptive(error, power=self.power, constant=self.constant)
        return Terms(losses={"mean_velocity": weighted}, metrics={"squared_error": error.detach().mean()})

    def positions(self, draws: Draws, points: int) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Positions of ``t`` and ``r`` in the grid: a drawn pair each, or its two ends."""
        start, end = self._pair(draws, points)
        full = draws.uniform("full") < self.full_share
        return torch.where(full, 0, start), torch.where(full, points - 1, end)

    def _pair(self, draws: Draws, points: int) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        if self.pairs == "ends":
            end = 1 + draws.integers("end", points - 1)
            return torch.zeros_like(end), end
        if self.pairs != "uniform":
            start = draws.integers("start", points - 1)
            return start, start + 1 if self.pairs == "adjacent" else torch.full_like(start, points - 1)
        first = draws.integers("start", points)
        second = (first + 1 + draws.integers("end", points - 1)) % points
        return torch.minimum(first, second), torch.maximum(first, second)
