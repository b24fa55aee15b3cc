"""Simple and Fast Distillation (Zhou et al., NeurIPS 2024), its baseline, its variable form and its second stage.

The student walks its own few-step trajectory, one optimiser step per time, and at each time is pulled to the
teacher's trajectory from the same noise (Algorithm 2). Its next state is detached and comes from the weights before
the update. With ``states: teacher`` it starts each step from the teacher's state instead, which is plain trajectory
distillation (Algorithm 1): the error that it has accumulated is then never seen, and never corrected.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import torch

from hd_core.objectives.turns import Batch, Cast, Need, PlayerName, Terms, Turn, Turns
from hd_core.paths import jump
from hd_core.random import Draws, fold_in
from hd_core.times import GridConfig, positions
from hd_core.types import Condition, Grid, Images, PerSample, Times
from hd_core.walk import afs_velocity, walk_states

Distance = Literal["l1", "l2", "pseudo_huber"]


@dataclass(frozen=True, kw_only=True)
class SFD:
    """The student's own trajectory, held to the teacher's at the times that sampling will use."""

    name: Literal["sfd"] = "sfd"
    intervals: int = 3
    """Steps from noise to data. Each is a network call, but for the first where ``afs`` is on."""
    step_counts: tuple[int, ...] = ()
    """SFD-v: numbers of steps, one of which is drawn for each iteration and told to the student; ``intervals``, which
    must be among them, is the one that it is sampled at where nothing else is said. Empty: always ``intervals``."""
    grid: GridConfig = field(default_factory=GridConfig)
    """How the times are spread; the stored trajectories must hold them."""
    afs: bool = False
    """Analytical first step: the first direction is computed without the network and saves a call."""
    states: Literal["own", "teacher"] = "own"
    """Where a step starts. own: where the student has come to (SFD). teacher: the teacher's state (Algorithm 1)."""
    distance: Distance = "l1"
    """Distance between states, summed over an image; the paper uses l1."""
    perceptual_weight: float = 0.0
    """Weight of a perceptual distance at the last time, beside the other one; 0: none. The official second stage has
    LPIPS there at channels x height x width."""
    taught_by: Literal["teacher", "start"] = "teacher"
    """teacher: by stored trajectories. start: by the weights that it starts from, which is the second stage of SFD."""
    start_intervals: int = 6
    """Steps in which those weights make their trajectory; a multiple of this student's own."""
    start_afs: bool = False
    """Whether the first of those is analytical."""

    def __post_init__(self) -> None:
        least = 2 if self.afs else 1
        for intervals in (self.intervals, *self.step_counts):
            if intervals < least:
                raise ValueError(f"sfd needs intervals >= {least} (afs: {self.afs}); given {intervals}")
            if self.taught_by == "start" and self.start_intervals % intervals:
                raise ValueError(
                    f"start_intervals must be a multiple of intervals and of every one of step_counts; given"
                    f" {self.start_intervals} and {intervals}"
                )
        if self.step_counts and self.intervals not in self.step_counts:
            raise ValueError(f"intervals must be among step_counts; given {self.intervals}, {list(self.step_counts)}")
        if len(set(self.step_counts)) < len(self.step_counts):
            raise ValueError(f"step_counts: each once; given {list(self.step_counts)}")
        if self.perceptual_weight < 0:
            raise ValueError(f"perceptual_weight must not be negative; given {self.perceptual_weight}")

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ("student",)

    @property
    def needs(self) -> frozenset[Need]:
        taught: Need = "trajectories" if self.taught_by == "teacher" else "start"
        return frozenset({taught, "perceptual"} if self.perceptual_weight else {taught})

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of steps that it trains for."""
        return self.step_counts or (self.intervals,)

    def sampling_grid(self) -> Grid:
        return self.grid.times(self.intervals)

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        grid = self.grid.times(self._count(draws))
        targets = self._targets(cast, batch, grid)
        x, condition = targets[0], batch.condition.on_walk(targets[0], len(grid) - 1)
        for n, (t, r) in enumerate(pairwise(grid)):
            t_, r_ = t.expand(len(x)), r.expand(len(x))
            if self.afs and n == 0:
                x = jump(x, afs_velocity(x, t_), t_, r_)
                continue
            start = targets[n] if self.states == "teacher" else x
            last = n == len(grid) - 2
            yields = partial(self._terms, cast, start, t_, r_, condition, targets[n + 1], f"sfd_{n}", last)
            carry = yield Turn(player="student", terms=yields)
            assert carry is not None
            x = carry

    def _count(self, draws: Draws) -> int:
        """The number of steps of one iteration, the same on every worker."""
        return self.counts[fold_in(draws.seed, "steps") % len(self.counts)]

    def _targets(self, cast: Cast, batch: Batch, grid: Grid) -> list[Images]:
        """The trajectory to follow at the times of a grid, from the batch's noise."""
        if self.taught_by == "teacher":
            assert batch.states is not None and batch.grid is not None
            return list(batch.states[:, positions(batch.grid, grid)].unbind(1))
        fine = self.grid.times(self.start_intervals)
        with torch.no_grad():
            states = list(walk_states(cast.origin, fine, batch.noise, batch.condition, afs=self.start_afs))
        return [states[place] for place in positions(fine, grid)]

    def _terms(
        self,
        cast: Cast,
        x: Images,
        t: Times,
        r: Times,
        condition: Condition,
        target: Images,
        name: str,
        last: bool,
    ) -> Terms:
        x_r = jump(x, cast.student(x, t.to(x), r.to(x), condition), t, r)
        losses = {name: distance(x_r, target, self.distance)}
        if last and self.perceptual_weight:
            losses["perceptual"] = self.perceptual_weight * cast.perception(x_r, target)
        return Terms(losses=losses, carry=x_r.detach())


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
