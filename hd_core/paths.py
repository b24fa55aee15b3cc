"""The straight path, and every conversion to and from it. THE time convention of this project:

    t = 0 is data, t = 1 is noise,  x_t = (1 - t) x_0 + t eps,  v = eps - x_0,  D = x_t - t v.

A teacher with another path is converted where it is adapted and nowhere else. A Gaussian path
``alpha x_0 + sigma eps`` becomes ours when divided by ``alpha + sigma``, at ``t = sigma / (alpha + sigma)``.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hd_core.types import Images, PerSample, Times


def expand(value: Times | float, like: Tensor) -> Tensor:
    """A per-row scalar shaped to multiply rows of ``like``, in its dtype and on its device."""
    tensor = torch.as_tensor(value, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def interpolate(x_0: Images, eps: Images, t: Times) -> Images:
    """The point of the straight path at time ``t``."""
    t_ = expand(t, x_0)
    return (1 - t_) * x_0 + t_ * eps


def velocity(x_0: Images, eps: Images) -> Images:
    """The velocity of the straight path from data to noise."""
    return eps - x_0


def denoised(x_t: Images, v: Images, t: Times) -> Images:
    """The data end ``D`` that a velocity points at."""
    return x_t - expand(t, x_t) * v


def noise_end(x_t: Images, v: Images, t: Times) -> Images:
    """The noise end that a velocity points away from."""
    return x_t + (1 - expand(t, x_t)) * v


def velocity_to(x_t: Images, x_0: Images, t: Times) -> Images:
    """The velocity whose data end is ``x_0``; ``t`` must not be 0."""
    return (x_t - x_0) / expand(t, x_t)


def jump(x_t: Images, u: Images, t: Times, r: Times) -> Images:
    """One step of a flow map: ``x_r = x_t - (t - r) u``. The interval is taken in float64."""
    interval = torch.as_tensor(t, dtype=torch.float64) - torch.as_tensor(r, dtype=torch.float64)
    return x_t - expand(interval, x_t) * u


def flatten_mean(value: Float[Tensor, "b ..."]) -> PerSample:
    """Mean over everything but the rows."""
    return value.flatten(1).mean(1)


def sigma_of_t(t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """EDM's noise level of a time (infinite at 1); float64 in, float64 out."""
    return t / (1 - t)


def t_of_sigma(sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The time of an EDM noise level."""
    return torch.where(torch.isinf(sigma), 1.0, sigma / (1 + sigma))


def log_snr_half(t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Half log signal-to-noise ratio ``lambda = log(alpha / sigma)``: infinite at 0, minus infinite at 1."""
    return torch.log1p(-t) - torch.log(t)


class GaussianPoint(NamedTuple):
    """A point of a Gaussian path in this project's coordinates."""

    x_t: Images
    t: Times


def from_gaussian(x: Images, alpha: Times, sigma: Times) -> GaussianPoint:
    """Move ``x = alpha x_0 + sigma eps`` onto the straight path."""
    scale = alpha + sigma
    return GaussianPoint(x / expand(scale, x), sigma / scale)


def to_gaussian(x_t: Images, alpha: Times, sigma: Times) -> Images:
    """The inverse of `from_gaussian`: scale a point of the straight path up to a Gaussian path."""
    return x_t * expand(alpha + sigma, x_t)


def velocity_from_eps(x: Images, eps: Images, alpha: Times, sigma: Times) -> Images:
    """Velocity from a noise prediction at ``x = alpha x_0 + sigma eps``; ``alpha`` must not be 0."""
    return eps - (x - expand(sigma, x) * eps) / expand(alpha, x)


def velocity_from_v_prediction(x: Images, v: Images, alpha: Times, sigma: Times) -> Images:
    """Velocity from DDPM's ``v = alpha eps - sigma x_0`` where ``alpha^2 + sigma^2 = 1`` (Salimans & Ho 2022)."""
    alpha_, sigma_ = expand(alpha, x), expand(sigma, x)
    return (alpha_ * v + sigma_ * x) - (alpha_ * x - sigma_ * v)
