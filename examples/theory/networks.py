"""Several perceptrons of one size trained side by side: one for each seed, or for each start and seed."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.random import generator
from hd_core.types import Condition, Velocity


class Members(nn.Module):
    """Independent perceptrons, each on its own equal share of the rows, in order.

    It is a velocity ``(x_t, t, condition)`` or a flow map ``(x_t, t, r, condition)``, by the number of its times.
    A loss that is a mean over rows gives each member its own gradient over the number of members, which AdamW's
    normalisation takes out again.
    """

    def __init__(
        self, members: int, width: int, *, times: int, depth: int = 3, seed: int = 0, waves: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.members, self.times, self.waves = members, times, tuple(waves)
        sizes = [2 + 4 * len(waves) + times, *[width] * depth, 2]
        source = generator(seed, "members", width, times)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            spread = math.sqrt(2 / fan_in) if fan_out != 2 else math.sqrt(1 / fan_in)
            self.weights.append(nn.Parameter(spread * torch.randn(members, fan_in, fan_out, generator=source)))
            self.biases.append(nn.Parameter(0.1 * torch.randn(members, 1, fan_out, generator=source)))

    @property
    def parameters_each(self) -> int:
        """Parameters of one member."""
        return sum(parameter.numel() for parameter in self.parameters()) // self.members

    def forward(self, x_t: Tensor, *rest: Tensor | Condition) -> Tensor:
        times = [time.to(x_t)[:, None] for time in rest if isinstance(time, Tensor)]
        flat = x_t.flatten(1)
        waves = [wave(rate * flat) for rate in self.waves for wave in (torch.sin, torch.cos)]
        x = torch.cat([flat, *waves, *times], dim=1).unflatten(0, (self.members, -1))
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.silu(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).flatten(0, 1).reshape(x_t.shape)

    @torch.no_grad()
    def set_members(self, first: int, other: Self) -> None:
        """Overwrite the members from ``first`` on by another network's."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine[first : first + other.members] = theirs


class Correction(nn.Module):
    """A fake score that starts as the teacher, as DMD's does: the exact velocity and a network that starts at zero."""

    def __init__(self, teacher: Velocity, network: Members) -> None:
        super().__init__()
        self.teacher, self.network = teacher, network
        nn.init.zeros_(network.weights[-1])
        nn.init.zeros_(network.biases[-1])

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        # Near data scores turn over ranges of t that are a small part of [0, 1]: the network is told log t.
        return self.teacher(x_t, t, condition) + self.network(x_t, 0.25 * (t + 0.01).log(), condition)
