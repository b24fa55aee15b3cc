"""A student's walk as a table: every step of it is ``x <- state * x + prediction * network(scale * x, timestep)``.

The network is the one of diffusers, with a constant vector added to its time embedding. That form holds for every path
and prediction, since all conversions between them are linear in the state and in what the network says.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hd_core.networks.student import FlowMapStudent
from hd_core.paths import jump
from hd_core.times import custom
from hd_core.types import Condition, Images, Times
from hd_core.walk import afs_velocity, walk
from pipelines.backbones import DiscreteTimeBackbone, FlowTimeBackbone
from pipelines.discrete_time import DiscretePath
from pipelines.evaluate import Generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step, for every row the same."""

    timestep: float | None
    """What the network is told of the time; None where the step is analytical and does not call it."""
    scale: float
    """Factor of the state on its way into the network."""
    state: float
    """Factor of the state in the next one."""
    prediction: float
    """Factor of what the network says."""
    extra: Float[Tensor, " d"]
    """Added to the network's time embedding."""

    def same_map(self, other: "Step", start: float) -> bool:
        """Whether ``start * noise`` goes into the network, and comes out of the step, as noise does with the other."""
        if self.timestep != other.timestep:
            return False
        mine = torch.tensor([start * self.scale, start * self.state, self.prediction])
        return torch.allclose(mine, torch.tensor([other.scale, other.state, other.prediction]), rtol=1e-6, atol=0)


def steps_of(student: FlowMapStudent, generator: Generator) -> list[Step]:
    """The steps of a student on the grid of a generator, at guidance scale 1."""
    calls = iter(_calls(student, generator))
    return [
        _analytical(t, r, student) if generator.afs and n == 0 else _step(student.backbone, *next(calls), t - r)
        for n, (t, r) in enumerate(pairwise(generator.grid))
    ]


class _Recorder(nn.Module):
    """Stands where a student's backbone does, and keeps what that would be told."""

    def __init__(self, embedding_width: int) -> None:
        super().__init__()
        self.embedding_width = embedding_width
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Images, t: Times, condition: Condition, extra: Float[Tensor, "1 d"]) -> Images:
        self.seen.append((t[0].cpu(), extra[0].cpu()))
        return torch.zeros_like(x_t)


@torch.no_grad()
def _calls(student: FlowMapStudent, generator: Generator) -> list[tuple[Tensor, Tensor]]:
    """Time and added embedding at every call of the network, as sampling itself gives them."""
    backbone, recorder = student.backbone, _Recorder(_width(student))
    x = torch.zeros(1, 1, 1, 1, device=next(student.parameters()).device)
    student.backbone = recorder
    try:
        walk(student, custom(generator.grid), x, Condition(), afs=generator.afs)
    finally:
        student.backbone = backbone
    return recorder.seen


def _analytical(t: float, r: float, student: FlowMapStudent) -> Step:
    one, times = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([[t], [r]], dtype=torch.float64)
    factor = jump(one, afs_velocity(one, times[0]), times[0], times[1]).item()
    return Step(timestep=None, scale=1.0, state=factor, prediction=0.0, extra=torch.zeros(_width(student)))


def _width(student: FlowMapStudent) -> int:
    return cast(int, student.backbone.embedding_width)


def _step(backbone: nn.Module, t: Tensor, extra: Tensor, interval: float) -> Step:
    if isinstance(backbone, DiscreteTimeBackbone):
        return _discrete_step(backbone.path, t, extra, interval)
    timestep = backbone.timesteps * t if isinstance(backbone, FlowTimeBackbone) else t
    return Step(timestep=timestep.item(), scale=1.0, state=1.0, prediction=-interval, extra=extra)


def _discrete_step(path: DiscretePath, t: Tensor, extra: Tensor, interval: float) -> Step:
    """``x_r = (1 - share) x + share x_0`` with ``share = interval / t``, where `DiscreteTimeBackbone` finds ``x_0``."""
    point = path.point(t[None])
    held, alpha, sigma = point.t.item(), point.alpha.expand(2), point.sigma.expand(2)
    time = max(t.double().item(), held)
    scale, share = held / time * (alpha + sigma)[0].item(), interval / time
    unit = torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1, 1)
    of_input, of_prediction = path.to_velocity(unit[0], unit[1], alpha, sigma).flatten().tolist()
    return Step(
        timestep=point.timestep.float().item(),
        scale=scale,
        state=1 - share + share * held * (1 / time - of_input * scale),
        prediction=-share * held * of_prediction,
        extra=extra,
    )
