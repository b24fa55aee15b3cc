"""Grids of times, from noise down to data, in this project's time and in float64.

A grid is uniform after a warp, or between each two of its knots, so two grids of the same configuration whose numbers
of intervals divide each other nest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hd_core.paths import t_of_sigma
from hd_core.random import Draws
from hd_core.types import Grid, Times

GridKind = Literal["uniform", "polynomial", "log_snr", "vp_time", "discrete"]

_VP_BETA_D, _VP_BETA_MIN = 19.9, 0.1
_INDICES = torch.arange(1, 1001, dtype=torch.float64) / 1000  # of 1000 training steps (Lu et al. 2022, DPM-Solver)
_REACH_TOLERANCE = 1e-6  # in schedule time, so that an end written with nine digits still passes
_SAME_TIME = 1e-9


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """How times are spread between noise and data."""

    kind: GridKind = "uniform"
    """uniform: equal steps of t. polynomial: equal steps of sigma^(1/rho) (EDM). log_snr: equal ratios of sigma.
    vp_time: equal steps of s^(1/rho), s the time of a VP schedule (beta_d 19.9, beta_min 0.1). discrete: equal steps of
    the training index of a latent model, whose schedule is ``betas``."""
    t_max: float = 1.0
    """The noisiest time, in (0, 1]; below 1 for all but uniform (sigma is t / (1 - t)), and within the schedule."""
    t_min: float = 0.0
    """The cleanest time, in [0, t_max); above 0 for log_snr."""
    rho: float = 7.0
    """Exponent of polynomial (EDM: 7) and of vp_time (1: equal steps of s); larger puts more points near data."""
    betas: tuple[float, float] = (0.00085, 0.012)
    """First and last beta of discrete's 1000 steps, equally spaced in their square roots; Stable Diffusion's."""
    knots: tuple[float, ...] = ()
    """Free times strictly between t_max and t_min, descending; between neighbours points are spread as the kind says.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"a grid needs 0 <= t_min < t_max <= 1; given t_min={self.t_min}, t_max={self.t_max}")
        if self.kind != "uniform" and self.t_max == 1:
            raise ValueError(f"a {self.kind} grid needs t_max below 1 (its sigma is t / (1 - t)); given 1")
        if self.kind == "log_snr" and self.t_min == 0:
            raise ValueError("a log_snr grid needs t_min above 0; given 0")
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be positive and finite; given {self.rho}")
        if not 0 < self.betas[0] <= self.betas[1] < 1:
            raise ValueError(f"betas need 0 < first <= last < 1; given {list(self.betas)}")
        if not all(high > low for high, low in pairwise(self._ends)):
            raise ValueError(
                f"knots must descend strictly between t_max={self.t_max} and t_min={self.t_min};"
                f" given {list(self.knots)}"
            )
        self._check_reach()

    def _check_reach(self) -> None:
        """Both schedules start without noise, so that only the noisy end can lie outside them."""
        if self.kind not in ("vp_time", "discrete"):
            return
        warp = _WARPS[self.kind]
        if warp.of_time(self, self.t_max) > 1 + _REACH_TOLERANCE:
            reach = warp.to_time(self, torch.ones(1, dtype=torch.float64)).item()
            raise ValueError(f"a {self.kind} grid reaches up to t_max={reach:.9f}; given {self.t_max}")

    @property
    def _ends(self) -> tuple[float, ...]:
        return (self.t_max, *self.knots, self.t_min)

    def times(self, intervals: int) -> Grid:
        """The grid's ``intervals + 1`` times, descending, float64. Each stretch between knots gets equally many."""
        stretches = len(self._ends) - 1
        if intervals < 1:
            raise ValueError(f"a grid needs at least one interval; given {intervals}")
        if intervals % stretches:
            raise ValueError(
                f"{len(self.knots)} knots make {stretches} stretches, and intervals must be a multiple of {stretches};"
                f" given {intervals}"
            )
        fraction = torch.linspace(0, 1, intervals // stretches + 1, dtype=torch.float64)
        parts = [self._stretch(high, low, fraction)[:-1] for high, low in pairwise(self._ends)]
        return torch.cat([*parts, torch.tensor([self.t_min], dtype=torch.float64)])

    def _stretch(self, high: float, low: float, fraction: Float[Tensor, " n"]) -> Grid:
        warp = _WARPS[self.kind]
        start, end = warp.of_time(self, high), warp.of_time(self, low)
        times = warp.to_time(self, start + fraction * (end - start))
        times[0] = high  # exact where the warp rounds
        return times


class _Warp(NamedTuple):
    """The coordinate in which a kind of grid takes equal steps."""

    of_time: Callable[[GridConfig, float], float]
    to_time: Callable[[GridConfig, Float[Tensor, " n"]], Grid]


def _time_itself(config: GridConfig, t: float) -> float:
    return t


def _times_themselves(config: GridConfig, times: Grid) -> Grid:
    return times


def _root_of_time(config: GridConfig, t: float) -> float:
    """EDM's ``sigma^(1/rho)`` (Karras et al. 2022, Eq. 5)."""
    return _sigma(t) ** (1 / config.rho)


def _root_to_time(config: GridConfig, root: Float[Tensor, " n"]) -> Grid:
    return t_of_sigma(root**config.rho)


def _log_sigma_of_time(config: GridConfig, t: float) -> float:
    return math.log(_sigma(t))


def _log_sigma_to_time(config: GridConfig, log_sigma: Float[Tensor, " n"]) -> Grid:
    return t_of_sigma(torch.exp(log_sigma))


def _vp_of_time(config: GridConfig, t: float) -> float:
    """VP's ``log(1 + sigma^2) = beta_d s^2 / 2 + beta_min s`` (Karras et al. 2022, Table 1), solved for ``s``."""
    noise = math.log1p(_sigma(t) ** 2)
    # This form of the quadratic's root does not cancel near s = 0.
    s = 2 * noise / (math.sqrt(_VP_BETA_MIN**2 + 2 * _VP_BETA_D * noise) + _VP_BETA_MIN)
    return s ** (1 / config.rho)


def _vp_to_time(config: GridConfig, root: Float[Tensor, " n"]) -> Grid:
    s = root**config.rho
    return _time_of_noise(_VP_BETA_D * s**2 / 2 + _VP_BETA_MIN * s)


def _index_of_time(config: GridConfig, t: float) -> float:
    noise = torch.tensor([_sigma(t) ** 2], dtype=torch.float64).log1p()
    return _interpolate(noise, _discrete_noise(config.betas), _INDICES).item()


def _index_to_time(config: GridConfig, index: Float[Tensor, " n"]) -> Grid:
    return _time_of_noise(_interpolate(index, _INDICES, _discrete_noise(config.betas)))


_WARPS: dict[GridKind, _Warp] = {
    "uniform": _Warp(_time_itself, _times_themselves),
    "polynomial": _Warp(_root_of_time, _root_to_time),
    "log_snr": _Warp(_log_sigma_of_time, _log_sigma_to_time),
    "vp_time": _Warp(_vp_of_time, _vp_to_time),
    "discrete": _Warp(_index_of_time, _index_to_time),
}


def _sigma(t: float) -> float:
    return t / (1 - t)


def _time_of_noise(noise: Float[Tensor, " n"]) -> Grid:
    """The time whose ``-2 log alpha = log(1 + sigma^2)``, for ``alpha^2 + sigma_VP^2 = 1``, is given."""
    return t_of_sigma(torch.sqrt(torch.expm1(noise)))


def _discrete_noise(betas: tuple[float, float]) -> Float[Tensor, " steps"]:
    """``-2 log alpha`` at the training steps of a latent model."""
    roots = torch.linspace(math.sqrt(betas[0]), math.sqrt(betas[1]), len(_INDICES), dtype=torch.float64)
    return -torch.cumsum(torch.log1p(-(roots**2)), 0)


def _interpolate(
    x: Float[Tensor, " n"], nodes: Float[Tensor, " m"], values: Float[Tensor, " m"]
) -> Float[Tensor, " n"]:
    """Linear between ascending nodes; the outer segments go on, so that less noise than the first step's is reached."""
    right = torch.searchsorted(nodes, x).clamp(1, len(nodes) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (nodes[right] - nodes[left])
    return values[left] + (x - nodes[left]) * slope


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


def custom(times: Sequence[float]) -> Grid:
    """A grid of given times, checked to descend strictly within [0, 1]."""
    grid = torch.tensor(times, dtype=torch.float64)
    if len(grid) < 2 or grid[0] > 1 or grid[-1] < 0 or not bool((grid.diff() < 0).all()):
        raise ValueError(f"times must descend strictly within [0, 1] and be at least two; given {list(times)}")
    return grid


def positions(stored: Float[Tensor, " stored"], wanted: Float[Tensor, " wanted"]) -> list[int]:
    """Where each of the wanted times stands in a stored grid.

    Raises:
        ValueError: a wanted time is not stored.
    """
    return [_position(stored, time) for time in wanted]


def _position(stored: Grid, time: Tensor) -> int:
    gap, index = (stored - time).abs().min(0)
    if not gap <= _SAME_TIME:
        nearest = stored[index].item()
        raise ValueError(f"time {time.item():.10g} is not stored; the nearest stored time is {nearest:.10g}")
    return int(index.item())
