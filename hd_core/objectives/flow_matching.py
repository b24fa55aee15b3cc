"""Conditional flow matching on the straight path (Lipman et al. 2023): how a teacher is trained from images.

L = mean |v(x_t, t, c) - (eps - x_0)|^2
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from hd_core.objectives.turns import Batch, Cast, Need, PlayerName, Terms, Turn, Turns, without_classes
from hd_core.paths import flatten_mean, interpolate, velocity
from hd_core.random import Draws
from hd_core.times import custom
from hd_core.types import Grid


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Regression to the velocity between an image and independent noise; the student is called with ``r = t``."""

    name: Literal["flow_matching"] = "flow_matching"
    uniform_share: float = 0.25
    """Share of rows whose time is uniform; the others' is logit-normal, which dwells on the middle."""
    label_dropout: float = 0.1
    """Share of rows that are trained without a class, for guidance."""

    def __post_init__(self) -> None:
        for name in ("uniform_share", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of rows, between 0 and 1; given {getattr(self, name)}")

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ("student",)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"images"})

    def sampling_grid(self) -> Grid:
        return custom([1.0, 0.0])

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        yield Turn(player="student", terms=partial(self._terms, cast, batch, draws))

    def _terms(self, cast: Cast, batch: Batch, draws: Draws) -> Terms:
        assert batch.images is not None and batch.images_condition is not None
        logit_normal = torch.sigmoid(draws.normal("logit", ()))
        t = torch.where(draws.uniform("kind") < self.uniform_share, draws.uniform("time"), logit_normal)
        dropped = self.label_dropout if cast.null_condition else 0.0  # images without classes have none to lose
        condition = without_classes(cast, batch.images_condition, draws, dropped)
        v = cast.student(interpolate(batch.images, batch.noise, t), t, t, condition)
        return Terms(losses={"flow_matching": flatten_mean((v - velocity(batch.images, batch.noise)).square())})
