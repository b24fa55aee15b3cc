"""How fast progressive distillation and consistency models come to the mean velocity, nothing being learned.

Both propositions are about exact optima, which can be computed. Two targets: two broad modes, and the toy.
"""

import torch
from torch import Tensor

from examples.theory.target import SHAPE, RingOfRings, flow_ends, no_condition
from hd_core.random import generator
from hd_core.solvers import euler, heun, last
from hd_core.times import GridConfig, custom

BROAD = RingOfRings(clusters=2, modes=1, radius=1.2, mode_radius=0.0, std=0.5, dtype=torch.float64)
HALVINGS = "progressive distillation"
HEUN = "consistency, Heun steps"
RESIDUAL = "identity by differences"


def halved(target: RingOfRings, steps: int, x: Tensor, t: float, interval: float) -> Tensor:
    """The student after ``log2(steps)`` halvings, ``v_S(x_t) = 1/2 [v_T(x_t) + v_T(x_{t-D})]``, T being one before."""
    if steps == 1:
        return target(x, torch.full((len(x),), t, dtype=x.dtype), no_condition(len(x)))
    first = halved(target, steps // 2, x, t, interval / 2)
    return (first + halved(target, steps // 2, x - interval / 2 * first, t - interval / 2, interval / 2)) / 2


def convergence(target: RingOfRings, *, rows: int, most: int, fine: int) -> dict[str, list[float]]:
    """Root mean square errors by name at 1, 2, 4, ... ``2^most`` steps; the truth takes ``fine`` Heun steps.

    A discrete consistency model whose teacher takes Euler's steps has the chord of Euler's solver for its optimum,
    which is what the halvings compose to, so one line stands for both.
    """
    x = torch.randn(rows, *SHAPE, dtype=torch.float64, generator=generator(0, "convergence"))
    u = x - flow_ends(target, x, fine)
    errors: dict[str, list[float]] = {HALVINGS: [], HEUN: [], RESIDUAL: []}
    for steps in (2**n for n in range(most + 1)):
        grid = GridConfig().times(steps)
        errors[HALVINGS].append(_size(halved(target, steps, x, 1.0, 1.0) - u))
        errors[HEUN].append(_size(x - last(heun(target, x, grid, no_condition(rows))) - u))
        errors[RESIDUAL].append(_size(_residual(target, x, u, 1 / steps, fine)))
    return errors


def euler_gap(target: RingOfRings, steps: int = 64) -> float:
    """Greatest difference between composed halvings and Euler's chord: rounding."""
    x = torch.randn(64, *SHAPE, dtype=torch.float64, generator=generator(0, "gap"))
    chord = x - last(euler(target, x, GridConfig().times(steps), no_condition(len(x))))
    return (halved(target, steps, x, 1.0, 1.0) - chord).abs().max().item()


def _residual(target: RingOfRings, x: Tensor, u: Tensor, step: float, fine: int) -> Tensor:
    """``F - (v - t dF/dt)`` at noise, the derivative over one step back along the exact flow; F there ends alike."""
    if step == 1:
        return torch.full_like(x, torch.nan)
    grid = custom((1 - step * torch.linspace(0, 1, fine // 8 + 1, dtype=torch.float64)).tolist())
    before = last(heun(target, x, grid, no_condition(len(x))))
    change = (u - (before - (x - u)) / (1 - step)) / step
    v = target(x, torch.ones(len(x), dtype=x.dtype), no_condition(len(x)))
    return u - (v - change)


def _size(value: Tensor) -> float:
    return value.flatten(1).square().sum(1).mean().sqrt().item()


def orders(errors: list[float]) -> list[float]:
    """Measured order between neighbours, which are a factor of two apart in the step."""
    values = torch.tensor(errors, dtype=torch.float64)
    return (values[:-1] / values[1:]).log2().tolist()
