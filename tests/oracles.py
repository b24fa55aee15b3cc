"""Flows with a closed form, in this project's time and in float64, to hold the code against.

Everything acts on images of any shape ``(b, ...)``; times are per row. The formulas are written out here from the
definition ``x_t = (1 - t) x_0 + t eps`` and share no code with `hd_core`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hd_core.types import Condition


def wide(t: Tensor | float, x: Tensor) -> Tensor:
    """A time as float64, shaped to multiply rows of ``x``."""
    return torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class GaussianFlow:
    """Data whose pixels are independent ``N(mean, std^2)``.

    ``x_t`` is ``N((1 - t) mean, s_t^2)`` with ``s_t^2 = (1 - t)^2 std^2 + t^2``, and the flow moves a point so that it
    keeps its number of standard deviations.
    """

    mean: float
    std: float

    def _variance(self, t: Tensor) -> Tensor:
        return (1 - t) ** 2 * self.std**2 + t**2

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        t_ = wide(t, x)
        return -(x - (1 - t_) * self.mean) / self._variance(t_)

    def denoised(self, x: Tensor, t: Tensor | float) -> Tensor:
        """``E[x_0 | x_t]``."""
        t_ = wide(t, x)
        return self.mean + (1 - t_) * self.std**2 / self._variance(t_) * (x - (1 - t_) * self.mean)

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """``E[eps | x_t]``."""
        t_ = wide(t, x)
        return t_ / self._variance(t_) * (x - (1 - t_) * self.mean)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.noise(x, t) - self.denoised(x, t)

    def flow_map(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """Where the point ``x`` of time ``t`` is at time ``r``."""
        t_, r_ = wide(t, x), wide(r, x)
        stretch = (self._variance(r_) / self._variance(t_)).sqrt()
        return (1 - r_) * self.mean + stretch * (x - (1 - t_) * self.mean)

    def mean_velocity(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """``(x_t - x_r) / (t - r)``; the times must differ."""
        return (x - self.flow_map(x, t, r)) / (wide(t, x) - wide(r, x))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity, as `hd_core.types.Velocity`."""
        return self.velocity(x_t, t)


@dataclass(frozen=True, kw_only=True)
class MixtureFlow:
    """Data from a mixture of isotropic Gaussians in the space of flattened images: a flow that is not linear."""

    means: tuple[tuple[float, ...], ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]
    substeps: int = 100
    """Runge-Kutta steps of the flow map; its error is below 3e-8 for the mixtures in these tests."""

    def _responsible(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per row and component: log joint density, offset from the component's mean, its variance, and its mean."""
        flat, t_ = x.flatten(1).unsqueeze(1), torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1)
        means = torch.tensor(self.means, dtype=torch.float64)
        variance = (1 - t_) ** 2 * torch.tensor(self.stds, dtype=torch.float64).reshape(1, -1, 1) ** 2 + t_**2
        offset = flat - (1 - t_) * means
        square, d = offset.square().sum(2, keepdim=True), flat.shape[2]
        weights = torch.tensor(self.weights, dtype=torch.float64).reshape(1, -1, 1)
        log_joint = weights.log() - 0.5 * (square / variance + d * torch.log(2 * torch.pi * variance))
        return log_joint, offset, variance, means

    def log_density(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._responsible(x, t)[0].logsumexp(1).squeeze(1)

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        log_joint, offset, variance, _ = self._responsible(x, t)
        return (log_joint.softmax(1) * -offset / variance).sum(1).reshape(x.shape)

    def denoised(self, x: Tensor, t: Tensor | float) -> Tensor:
        log_joint, offset, variance, means = self._responsible(x, t)
        t_ = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1)
        stds = torch.tensor(self.stds, dtype=torch.float64).reshape(1, -1, 1)
        return (log_joint.softmax(1) * (means + (1 - t_) * stds**2 / variance * offset)).sum(1).reshape(x.shape)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """``E[eps | x_t] - E[x_0 | x_t]``, where ``E[eps | x_t] = -t score``."""
        return -wide(t, x) * self.score(x, t) - self.denoised(x, t)

    def flow_map(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """Classical fourth-order Runge-Kutta from ``t`` to ``r``."""
        t_ = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        h = (torch.as_tensor(r, dtype=torch.float64) - t_) / self.substeps
        for i in range(self.substeps):
            s = t_ + i * h
            k_1 = self.velocity(x, s)
            k_2 = self.velocity(x + wide(h / 2, x) * k_1, s + h / 2)
            k_3 = self.velocity(x + wide(h / 2, x) * k_2, s + h / 2)
            k_4 = self.velocity(x + wide(h, x) * k_3, s + h)
            x = x + wide(h, x) / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        return x

    def mean_velocity(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        return (x - self.flow_map(x, t, r)) / (wide(t, x) - wide(r, x))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity, as `hd_core.types.Velocity`."""
        return self.velocity(x_t, t)


GAUSSIAN = GaussianFlow(mean=0.7, std=0.5)
LINE = MixtureFlow(means=((-1.0,), (1.5,)), stds=(0.4, 0.6), weights=(0.3, 0.7))
PLANE = MixtureFlow(means=((-1.0, 0.5), (1.2, 0.0), (0.0, -1.5)), stds=(0.5, 0.4, 0.6), weights=(0.2, 0.5, 0.3))


def no_condition(rows: int) -> Condition:
    """A condition that says nothing but how many rows there are."""
    return Condition(labels=torch.zeros(rows, dtype=torch.int64))


def points(rows: int, *shape: int, seed: int = 0) -> Tensor:
    """Reproducible float64 normals."""
    return torch.randn(rows, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
