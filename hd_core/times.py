"""Grids of times, from noise down to data, in this project's time and in float64.

A grid is uniform after a warp, so two grids of the same kind whose numbers of intervals divide each other nest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hd_core.paths import t_of_sigma
from hd_core.random import Draws
from hd_core.types import Grid, Times

GridKind = Literal["uniform", "polynomial", "log_snr"]


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """How times are spread between noise and data."""

    kind: GridKind = "uniform"
    """uniform: equal steps of t. polynomial: equal steps of sigma^(1/rho) (EDM). log_snr: equal ratios of sigma."""
    t_max: float = 1.0
    """The noisiest time, in (0, 1]; below 1 for polynomial and log_snr, whose sigma is t / (1 - t)."""
    t_min: float = 0.0
    """The cleanest time, in [0, t_max); above 0 for log_snr."""
    rho: float = 7.0
    """Exponent of the polynomial grid; larger puts more points near data."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"a grid needs 0 <= t_min < t_max <= 1; given t_min={self.t_min}, t_max={self.t_max}")
        if self.kind != "uniform" and self.t_max == 1:
            raise ValueError(f"a {self.kind} grid needs t_max below 1 (its sigma is t / (1 - t)); given 1")
        if self.kind == "log_snr" and self.t_min == 0:
            raise ValueError("a log_snr grid needs t_min above 0; given 0")
        if self.rho <= 0:
            raise ValueError(f"rho must be positive; given {self.rho}")

    def times(self, intervals: int) -> Grid:
        """The grid's ``intervals + 1`` times, descending, float64."""
        if intervals < 1:
            raise ValueError(f"a grid needs at least one interval; given {intervals}")
        fraction = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
        times = self._warped(fraction)
        times[0], times[-1] = self.t_max, self.t_min
        return times

    def _warped(self, fraction: Float[Tensor, " n"]) -> Grid:
        if self.kind == "uniform":
            return self.t_max + fraction * (self.t_min - self.t_max)
        high, low = self.t_max / (1 - self.t_max), self.t_min / (1 - self.t_min)
        if self.kind == "polynomial":
            return t_of_sigma(polynomial_sigmas(fraction, high, low, self.rho))
        return t_of_sigma(torch.exp(math.log(high) + fraction * (math.log(low) - math.log(high))))


@dataclass(frozen=True, kw_only=True)
class TimePairs:
    """How a pair of times ``t >= r`` is drawn for each row, where any times will do (MeanFlow, section 4.3)."""

    kind: Literal["logit_normal", "uniform"] = "logit_normal"
    """logit_normal: the sigmoids of two normals, which dwell on the middle. uniform: two uniforms. t is the greater."""
    t_mean: float = -0.4
    """Mean of the first normal."""
    t_std: float = 1.0
    """Its standard deviation."""
    r_mean: float = -0.4
    """Mean of the second normal; the lower it lies, the longer the intervals."""
    r_std: float = 1.0
    """Its standard deviation."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(mean) for mean in (self.t_mean, self.r_mean)):
            raise ValueError(f"t_mean and r_mean must be finite; given {self.t_mean} and {self.r_mean}")
        if not (0 <= self.t_std < math.inf and 0 <= self.r_std < math.inf):
            raise ValueError(f"t_std and r_std must be finite and >= 0; given {self.t_std} and {self.r_std}")

    def draw(self, draws: Draws) -> tuple[Times, Times]:
        """``(t, r)`` of each row, the greater first."""
        if self.kind == "uniform":
            first, second = draws.uniform("time/first"), draws.uniform("time/second")
        else:
            first = torch.sigmoid(self.t_mean + self.t_std * draws.normal("time/first", ()))
            second = torch.sigmoid(self.r_mean + self.r_std * draws.normal("time/second", ()))
        return torch.maximum(first, second), torch.minimum(first, second)


def polynomial_sigmas(fraction: Float[Tensor, " n"], high: float, low: float, rho: float) -> Float[Tensor, " n"]:
    """EDM's grid (Karras et al. 2022, Eq. 5): ``(high^(1/rho) + fraction (low^(1/rho) - high^(1/rho)))^rho``."""
    start, end = high ** (1 / rho), low ** (1 / rho)
    return (start + fraction * (end - start)) ** rho


def custom(times: Sequence[float]) -> Grid:
    """A grid of given times, checked to descend strictly within [0, 1]."""
    grid = torch.tensor(times, dtype=torch.float64)
    if len(grid) < 2 or grid[0] > 1 or grid[-1] < 0 or not bool((grid.diff() < 0).all()):
        raise ValueError(f"times must descend strictly within [0, 1] and be at least two; given {list(times)}")
    return grid


def nested_positions(fine: int, coarse: int) -> list[int]:
    """Where the points of a grid of ``coarse`` intervals stand in the same kind of grid of ``fine`` intervals."""
    if fine % coarse:
        raise ValueError(f"a grid of {coarse} intervals does not nest in one of {fine}: {fine} is not a multiple")
    return list(range(0, fine + 1, fine // coarse))
