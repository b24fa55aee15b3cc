"""The data of the toy: eight clusters on a ring, each a small ring of seven modes, with the exact velocity of its flow.

Points are images of two channels and one pixel, so that everything in `hd_core` takes them as they are.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hd_core.paths import expand
from hd_core.random import generator
from hd_core.solvers import heun, last
from hd_core.times import GridConfig
from hd_core.types import Condition

SHAPE = (2, 1, 1)


def no_condition(rows: int) -> Condition:
    """A condition that says nothing but how many rows there are."""
    return Condition(labels=torch.zeros(rows, dtype=torch.int64))


@dataclass(frozen=True, kw_only=True)
class RingOfRings:
    """An even mixture of isotropic Gaussians: coarse structure (the clusters) and fine structure (their modes)."""

    clusters: int = 8
    """Coarse modes, evenly on a ring around 0."""
    modes: int = 7
    """Fine modes of each cluster, evenly on a small ring around its middle."""
    radius: float = 1.6
    """Radius of the ring of clusters."""
    mode_radius: float = 0.3
    """Radius of the ring of modes; neighbours are ``2 sin(pi / modes)`` times as far apart."""
    std: float = 0.03
    """Standard deviation of a mode along each axis."""
    dtype: torch.dtype = torch.float32
    """What the velocity is computed in."""

    @cached_property
    def means(self) -> Tensor:
        """Where the modes are, ``(clusters * modes, 2)``, a cluster's modes one after another."""
        return (self._ring(self.clusters, self.radius)[:, None] + self._ring(self.modes, self.mode_radius)).flatten(
            0, 1
        )

    def _ring(self, points: int, radius: float) -> Tensor:
        angles = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
        return (radius * torch.stack([angles.cos(), angles.sin()], dim=1)).to(self.dtype)

    def sample(self, rows: int, seed: int) -> Tensor:
        """Independent data."""
        source = generator(seed, "target")
        which = torch.randint(len(self.means), (rows,), generator=source)
        points = self.means[which] + self.std * torch.randn(rows, 2, generator=source, dtype=self.dtype)
        return points.reshape(rows, *SHAPE)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity ``E[eps | x_t] - E[x_0 | x_t]``, as `hd_core.types.Velocity`; exact at every time.

        Given its mode with mean ``m``, ``x_t`` is normal about ``(1 - t) m`` with variance
        ``s = (1 - t)^2 std^2 + t^2``, and both expectations are linear in ``x_t - (1 - t) m``.
        """
        x = x_t.flatten(1)
        t_ = expand(t, x)
        keep = 1 - t_
        s = (keep * self.std) ** 2 + t_**2
        logits = (keep * (x @ self.means.T) - 0.5 * keep**2 * self.means.square().sum(1)) / s
        mean = logits.softmax(1) @ self.means
        offset = x - keep * mean
        return (t_ / s * offset - mean - keep * self.std**2 / s * offset).reshape(x_t.shape)


def flow_ends(target: RingOfRings, noise: Tensor, intervals: int = 128) -> Tensor:
    """Where the flow takes each noise, by Heun's method; 128 steps are within 5e-4 (root mean square) of its limit."""
    grid = GridConfig().times(intervals)
    # In pieces that stay in a core's cache.
    return torch.cat([last(heun(target, piece, grid, no_condition(len(piece)))) for piece in noise.split(2048)])
