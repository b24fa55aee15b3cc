"""Simple and Fast Distillation (Zhou et al., NeurIPS 2024, Algorithm 2).

The student walks its own few-step trajectory, one optimiser step per time, and at each time is pulled to the
teacher's trajectory from the same noise. Its next state is detached and comes from the weights before the update.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from hd_core.objectives.turns import Batch, Cast, Need, PlayerName, Terms, Turn, Turns
from hd_core.paths import jump
from hd_core.random import Draws
from hd_core.times import GridConfig, nested_positions
from hd_core.types import Condition, FlowMap, Grid, Images, PerSample, Times
from hd_core.walk import afs_velocity

Distance = Literal["l1", "l2", "pseudo_huber"]


@dataclass(frozen=True, kw_only=True)
class SFD:
    """The student's own trajectory, held to the teacher's at the times that sampling will use."""

    name: Literal["sfd"] = "sfd"
    intervals: int = 3
    """Steps from noise to data. Each is a network call, but for the first where ``afs`` is on."""
    grid: GridConfig = field(default_factory=GridConfig)
    """How the times are spread; the stored trajectories must hold them."""
    afs: bool = False
    """Analytical first step: the first direction is computed without the network and saves a call."""
    distance: Distance = "l1"
    """Distance between states, summed over an image; the paper uses l1."""

    def __post_init__(self) -> None:
        least = 2 if self.afs else 1
        if self.intervals < least:
            raise ValueError(f"sfd needs intervals >= {least} (afs: {self.afs}); given {self.intervals}")

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ("student",)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"trajectories"})

    def sampling_grid(self) -> Grid:
        return self.grid.times(self.intervals)

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        assert batch.states is not None and batch.grid is not None
        x, times = batch.states[:, 0], self.sampling_grid()
        positions = nested_positions(batch.states.shape[1] - 1, self.intervals)
        assert torch.allclose(batch.grid[positions], times), "the stored trajectories have other times"
        for n, (t, r) in enumerate(zip(times, times[1:], strict=False)):
            t_, r_ = t.expand(len(x)), r.expand(len(x))
            if self.afs and n == 0:
                x = jump(x, afs_velocity(x, t_), t_, r_)
                continue
            target = batch.states[:, positions[n + 1]]
            carry = yield Turn(
                player="student", terms=partial(self._terms, cast.student, x, t_, r_, batch.condition, target, n)
            )
            assert carry is not None
            x = carry

    def _terms(
        self, student: FlowMap, x: Images, t: Times, r: Times, condition: Condition, target: Images, n: int
    ) -> Terms:
        u = student(x, t.to(x), r.to(x), condition)
        x_r = jump(x, u, t, r)
        loss = distance(x_r, target, self.distance)
        return Terms(losses={f"sfd_{n}": loss}, carry=x_r.detach())


def distance(x: Images, target: Images, kind: Distance) -> PerSample:
    """Distance of each row to its target, summed over the image."""
    difference = (x - target).flatten(1)
    if kind == "l1":
        return difference.abs().sum(1)
    if kind == "l2":
        return difference.square().sum(1)
    # Song & Dhariwal 2024, section 3.3: c = 0.00054 sqrt(dimensions).
    c = 0.00054 * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c
