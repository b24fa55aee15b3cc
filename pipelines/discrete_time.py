"""Networks over the discrete timesteps of a DDPM schedule, as velocities in this project's own time."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hd_core.paths import expand, log_snr_half, to_gaussian, velocity_from_eps, velocity_from_v_prediction
from hd_core.types import Condition, Images, Times

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


class DiscreteTimeBackbone(nn.Module):
    """A diffusers network over discrete timesteps as a velocity; satisfies `hd_core.types.Backbone`.

    Beyond the table's noisy end the data prediction is held, so an Euler step from t = 1 is DDIM's first step. The
    network's own class and parameter names stay, under ``model``; conditioning and taps are forward hooks.
    """

    def __init__(self, model: nn.Module, path: DiscretePath, *, embedding_width: int, has_classes: bool) -> None:
        super().__init__()
        self.model, self.path = model, path
        self.embedding_width, self.has_classes = embedding_width, has_classes
        self.tokens = nn.ModuleList()
        self._extra: Tensor | None = None

    def add_extra_to(self, embedder: nn.Module) -> None:
        """Let ``extra`` be added to what a module of the network puts out."""
        embedder.register_forward_hook(self._with_extra)

    def show_tokens_of(self, block: nn.Module) -> nn.Module:
        """A module whose output is the output of a convolutional block as tokens (b, h * w, c)."""
        tokens = _Tokens()
        self.tokens.append(tokens)
        block.register_forward_hook(tokens.hook)
        return tokens

    def forward(self, x_t: Images, t: Times, condition: Condition, extra: Float[Tensor, "b d"] | None = None) -> Images:
        point = self.path.point(t)
        x = to_gaussian(x_t, point.alpha, point.sigma)
        prediction = self._predict(x, point.timestep.float(), condition, extra)[:, : x.shape[1]]  # no learned variance
        held = point.t / torch.maximum(t.double(), point.t)
        return expand(held, x) * self.path.to_velocity(x, prediction, point.alpha, point.sigma)

    def _predict(self, x: Images, timestep: Times, condition: Condition, extra: Tensor | None) -> Images:
        labels = condition.labels if self.has_classes else None
        if extra is not None and torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing recomputes time embeddings without a student's interval: turn it off"
            )
        self._extra = extra
        try:
            return self.model(x, timestep, class_labels=labels, return_dict=False)[0]
        finally:
            self._extra = None

    def _with_extra(self, _module: nn.Module, _inputs: tuple[Any, ...], embedding: Tensor) -> Tensor:
        return embedding if self._extra is None else embedding + self._extra


class _Tokens(nn.Module):
    def forward(self, images: Images) -> Float[Tensor, "b n d"]:
        return images.flatten(2).transpose(1, 2)

    def hook(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Any]) -> None:
        self(output[0] if isinstance(output, tuple) else output)
