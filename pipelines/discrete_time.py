"""The discrete timesteps of a DDPM schedule, read continuously and in this project's own time."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hd_core.paths import log_snr_half, velocity_from_eps, velocity_from_v_prediction
from hd_core.types import Times

PREDICTIONS = {"epsilon": velocity_from_eps, "v_prediction": velocity_from_v_prediction}
"""What such a network may predict, by the schedule's ``prediction_type``, and how a velocity follows from it."""


class DiscretePath:
    """A DDPM schedule of discrete timesteps, read continuously and in this project's time; all in float64.

    Its ``alpha^2 + sigma^2 = 1``, so ``t = sigma / (alpha + sigma)`` gives both. Only the timestep, which the network
    wants to know, needs the table: it is interpolated linearly in log-SNR.
    """

    def __init__(self, alphas_cumprod: Float[Tensor, " steps"], prediction: str) -> None:
        alpha, sigma = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
        self.times = sigma / (alpha + sigma)
        self.to_velocity = PREDICTIONS[prediction]

    def point(self, t: Times) -> "DiscretePoint":
        """The point of the schedule at ``t``; outside of the table (as at 0 and 1) the table's nearest end.

        A time within float32's rounding of a table's entry is that entry: solvers hand times over in float32, and
        the fastest sinusoid of a timestep would see the difference.
        """
        times = self.times.to(t.device)
        t = t.double().clamp(times[0], times[-1])
        above = torch.searchsorted(times, t.detach()).clamp(1, len(times) - 1)
        low, high = log_snr_half(times[above - 1]), log_snr_half(times[above])
        timestep = above - 1 + (low - log_snr_half(t)) / (low - high)
        entry = timestep.detach().round()
        at_entry = (times[entry.long()] - t.detach()).abs() <= 2.0**-24
        timestep, t = (
            torch.where(at_entry, value + (exact - value).detach(), value)  # keeps the derivative
            for value, exact in ((timestep, entry), (t, times[entry.long()]))
        )
        norm = (t**2 + (1 - t) ** 2).sqrt()
        return DiscretePoint(timestep=timestep, t=t, alpha=(1 - t) / norm, sigma=t / norm)


@dataclass(frozen=True, kw_only=True, eq=False)
class DiscretePoint:
    """Where rows stand on a discrete schedule, ``(b,)`` float64 each."""

    timestep: Times
    """Continuous timestep, 0 at the cleanest."""
    t: Times
    """This project's time, held within the table."""
    alpha: Times
    """Scale of the data."""
    sigma: Times
    """Scale of the noise."""
