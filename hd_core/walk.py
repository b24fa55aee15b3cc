"""Sampling with a flow map: one jump for each interval of a grid, the first of them analytical where that is asked."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hd_core.paths import expand, jump
from hd_core.types import Condition, FlowMap, Grid, Images, Times


def walk(
    student: FlowMap, grid: Grid, x: Images, condition: Condition, *, afs: bool = False, gradient_steps: int = 0
) -> Images:
    """The samples that a student makes of states ``x`` at the first time of a grid.

    Args:
        afs: take the first step analytically, without the network.
        gradient_steps: how many of the last network calls a gradient goes through; 0: all.
    """
    *_, final = walk_states(student, grid, x, condition, afs=afs, gradient_steps=gradient_steps)
    return final


def walk_states(
    student: FlowMap, grid: Grid, x: Images, condition: Condition, *, afs: bool = False, gradient_steps: int = 0
) -> Iterator[Images]:
    """The states of `walk` at every time of the grid, the first included. The student is told how many steps it is."""
    steps = list(zip(grid, grid[1:], strict=False))
    constant = len(steps) - gradient_steps if gradient_steps else 0
    told = condition.on_walk(x, len(steps))
    yield x
    for n, (t, r) in enumerate(steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and n >= constant):
            t_, r_ = t.expand(len(x)), r.expand(len(x))
            u = afs_velocity(x, t_) if afs and n == 0 else student(x, t_.to(x), r_.to(x), told)
            x = jump(x, u, t_, r_)
        yield x


def afs_velocity(x_t: Images, t: Times) -> Images:
    """The analytical first direction of SFD in this project's time.

    EDM's form is ``d = x / sqrt(1 + sigma^2)``, whose data end is ``D = x - sigma d``. With ``n^2 = (1-t)^2 + t^2``
    that is ``D = x_t (1 - t) / (n (n + t))``, written so that it stays exact at ``t = 1``, where ``D = 0``.
    """
    n = torch.sqrt((1 - t) ** 2 + t**2)
    share: Tensor = (1 - t) / (n * (n + t))
    return x_t * expand((1 - share) / t, x_t)
