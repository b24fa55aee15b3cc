"""One step as a stock pipeline of diffusers takes it: the network with what it is told folded in, and a scheduler."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.backbones import DiffusersBackbone, DiscreteTimeBackbone
from pipelines.community.kinds import Kind
from pipelines.community.table import Step
from pipelines.diffusers_library import diffusers
from pipelines.discrete_time import PREDICTIONS
from pipelines.teachers import Teacher


def why_not(kind: Kind, teacher: Teacher, steps: Sequence[Step], start: float, whole: Step) -> str:
    """Why the stock pipeline cannot make these pictures; empty where it can.

    Args:
        start: the first time of the grid.
        whole: the step from t = 1 to t = 0, the only one that a stock schedule of one step has.
    """
    if not kind.stock:
        return "diffusers has no class for this network"
    if len(steps) > 1:
        return "every step has a time embedding of its own, and a stock pipeline has one for all"
    if not steps[0].same_map(whole, start):
        return "the grid of times does not run from noise to data, as a stock schedule of one step does"
    if kind.name == "unet" and teacher.num_classes:
        return f"{kind.stock} knows no classes"
    codec = teacher.codec
    if (type(codec.vae).__name__ if codec else "") != kind.codec or (codec and codec.shift):
        return f"{kind.stock} does not decode with this autoencoder"
    return ""


def fold_step(backbone: DiffusersBackbone, kind: Kind, step: Step, whole: Step) -> Any:
    """Make the step a part of the network's weights; returns the scheduler that goes with them.

    Raises:
        ValueError: no DDIM schedule gives this step.
    """
    backbone.fold(step.extra)
    if not isinstance(backbone, DiscreteTimeBackbone):
        network: Any = backbone.model
        timesteps = (step.timestep or 0) / network.config.timestep_scale  # the pipeline scales them for itself
        return getattr(diffusers(), kind.scheduler)(num_train_timesteps=round(timesteps), shift=1.0)
    times = backbone.path.times
    alphas = (1 - times) ** 2 / (times**2 + (1 - times) ** 2)  # squared, as `alphas_cumprod`
    prediction = next(name for name, function in PREDICTIONS.items() if function is backbone.path.to_velocity)
    common = {"num_train_timesteps": len(alphas), "prediction_type": prediction, "timestep_spacing": "trailing"}
    if not kind.ends[0]:
        return getattr(diffusers(), kind.scheduler)(trained_betas=_betas(alphas), steps_offset=1, **common)
    alphas **= math.log(absorb_start(backbone.model, kind.ends, whole, prediction)) / alphas[-1].log()
    return getattr(diffusers(), kind.scheduler)(
        trained_betas=_betas(alphas), clip_sample=False, set_alpha_to_one=True, **common
    )


@torch.no_grad()
def absorb_start(model: nn.Module, ends: tuple[str, str], whole: Step, prediction: str) -> float:
    """Let the network's first and last layer take what DDIM's single step leaves out; returns its ``alpha^2``.

    DDIM shows the network the noise itself, and not ``sigma`` times it; its ``x_0`` is ``(x - s f) / a`` for a noise
    prediction ``f`` and ``a x - s f`` for a v prediction, ``a^2 + s^2 = 1``. The first layer is linear, and so takes
    the scale of its input; ``a`` is set so that the noise has its factor, and the last layer takes the rest of ``s``.
    """
    first, last = (model.get_submodule(name) for name in ends)
    squared = whole.state**-2 if prediction == "epsilon" else whole.state**2
    if not 0 < squared < 1:
        raise ValueError(f"no DDIM schedule has alpha^2 = {squared:.3g}")
    own = (1 - squared) ** 0.5 * (whole.state if prediction == "epsilon" else 1.0)
    for parameter, factor in ((first.weight, whole.scale), *((p, -whole.prediction / own) for p in last.parameters())):
        parameter.mul_(factor)  # pyright: ignore[reportCallIssue]
    return squared


def _betas(alphas: Float[Tensor, " steps"]) -> list[float]:
    """The betas whose products ``1 - beta`` are these."""
    return (1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])).tolist()
