"""MeanFlow distillation: the mean velocity from its differential identity (Geng et al. 2025; HD, stage 1).

Along the teacher's flow ``dx_t/dt = v`` the mean velocity over ``[r, t]`` obeys

    u(x_t, t, r) = v(x_t, t) - (t - r) du/dt,        du/dt = v . grad_x u + d_t u,

so the student regresses to the right-hand side with its own derivative, held fixed. The guided teacher is both the
velocity of the identity and the direction of the derivative; images say only where it is asked.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from hd_core.jvp import derivative, difference
from hd_core.objectives.turns import Batch, Cast, Need, PlayerName, Terms, Turn, Turns, without_classes
from hd_core.paths import expand, flatten_mean, interpolate
from hd_core.random import Draws
from hd_core.times import TimePairs, custom
from hd_core.types import Condition, Grid, Images, Times
from hd_core.weighting import adaptive, require_adaptive


@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """Regression to the teacher's velocity less the student's own derivative times the interval."""

    name: Literal["meanflow"] = "meanflow"
    times: TimePairs = field(default_factory=TimePairs)
    """How ``t`` and ``r`` are drawn, apart from the rows below."""
    equal_share: float = 0.75
    """Share of rows with ``r = t``, which repeat the teacher and need no derivative."""
    full_share: float = 0.125
    """Share of rows from noise to data (``t = 1``, ``r = 0``): all that one-step sampling asks, and seldom drawn."""
    power: float = 1.0
    """Adaptive weight: the squared error divided by its own detached ``(error + constant)^power``."""
    constant: float = 1e-3
    """Keeps the adaptive weight finite."""
    tangent_warmup_steps: int = 0
    """Steps over which the derivative's weight rises linearly from 0; before its end the target is biased towards v."""
    derivative: Literal["exact", "finite_difference"] = "finite_difference"
    """finite_difference: two more calls along the flow. exact: forward-mode differentiation, for networks that are
    smooth in time: it also sees what no step of this size does (docs/decisions/0007-meanflow.md)."""
    epsilon: float = 0.05
    """Step in time of the finite difference: small against the flow's own changes, large against the network's."""
    label_dropout: float = 0.0
    """Share of rows that are trained without a class; 0 where the student need not be guided."""

    def __post_init__(self) -> None:
        for name in ("equal_share", "full_share", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of rows, between 0 and 1; given {getattr(self, name)}")
        if self.equal_share + self.full_share > 1:
            given = f"{self.equal_share} + {self.full_share}"
            raise ValueError(f"equal_share and full_share are of different rows, together at most 1; given {given}")
        if self.tangent_warmup_steps < 0:
            raise ValueError(f"tangent_warmup_steps must not be negative; given {self.tangent_warmup_steps}")
        if not 0 < self.epsilon <= 0.25:
            raise ValueError(f"epsilon must lie in (0, 0.25]; given {self.epsilon}")
        require_adaptive(power=self.power, constant=self.constant)

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ("student",)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"images"})

    def sampling_grid(self) -> Grid:
        return custom([1.0, 0.0])

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        yield Turn(player="student", terms=partial(self._terms, cast, batch, draws, step))

    def _terms(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Terms:
        assert batch.images is not None and batch.images_condition is not None
        t, r = (time.to(batch.images.dtype) for time in self.pairs(draws))
        x_t = interpolate(batch.images, batch.noise, t)
        condition = without_classes(cast, batch.images_condition, draws, self.label_dropout)
        with torch.no_grad():
            v = cast.teacher(x_t, t, condition)
        u = cast.student(x_t, t, r, condition)
        change = self._change(cast, x_t, v, t, r, condition, u.detach(), step)
        error = flatten_mean((u - (v - change)).square())
        weighted = adaptive(error, power=self.power, constant=self.constant)
        metrics = {"squared_error": error.detach().mean(), "squared_change": change.square().mean()}
        return Terms(losses={"meanflow": weighted}, metrics=metrics)

    def pairs(self, draws: Draws) -> tuple[Times, Times]:
        """``t`` and ``r`` of each row: the whole interval, two equal times, or a drawn pair."""
        t, r = self.times.draw(draws)
        share = draws.uniform("share")
        full, equal = share < self.full_share, share >= 1 - self.equal_share
        return torch.where(full, 1, t), torch.where(full, 0, torch.where(equal, t, r))

    def _change(
        self, cast: Cast, x_t: Images, v: Images, t: Times, r: Times, condition: Condition, u: Images, step: int
    ) -> Images:
        """``(t - r) du/dt`` under its warm-up; zero, and not computed, where ``r = t``."""
        change, weight = torch.zeros_like(v), self.tangent_weight(step)
        moving = (r < t).nonzero().squeeze(1)
        if cast.lockstep and not len(moving):  # a call on any row, whose change is zero
            moving = moving.new_zeros(1)
        if not len(moving) or not weight:
            return change
        at = x_t[moving], v[moving], t[moving], r[moving], condition.rows(moving)
        # A pass of its own, without gradients: one pass for u and its derivative saves a forward of these rows, but
        # splits the batch in two and takes attention apart under gradients, which costs as much as it saves.
        if self.derivative == "exact":
            du_dt = derivative(cast.student, *at)
        else:
            du_dt = difference(cast.student, *at, u[moving], epsilon=self.epsilon)
        change[moving] = weight * expand(t[moving] - r[moving], du_dt) * du_dt
        return change

    def tangent_weight(self, step: int) -> float:
        """Weight of the derivative at a step."""
        return min(1.0, step / self.tangent_warmup_steps) if self.tangent_warmup_steps else 1.0
