"""Solvers of the flow's ODE ``dx/dt = v(x, t)``, from the first time of a grid down to its last.

Each is a generator that yields the state at every grid point, the start included, so that a caller may keep the
trajectory or only the end. States keep the input's dtype; times and coefficients are float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hd_core.paths import denoised, log_snr_half, noise_end
from hd_core.types import Condition, Grid, Images, Times, Velocity
from hd_core.walk import afs_velocity

States = Iterator[Images]


def _full(x: Images, t: Tensor) -> Tensor:
    return torch.full((len(x),), t.item(), dtype=x.dtype, device=x.device)


def euler(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """First order: ``x_r = x_t - (t - r) v(x_t, t)``. On this path it is DDIM."""
    yield x
    for t, r in zip(grid, grid[1:], strict=False):
        x = x - (t - r).item() * velocity(x, _full(x, t), condition)
        yield x


def heun(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """Second order, two calls a step: the trapezoid rule on a predicted end point."""
    yield x
    for t, r in zip(grid, grid[1:], strict=False):
        h = (t - r).item()
        v = velocity(x, _full(x, t), condition)
        v_end = velocity(x - h * v, _full(x, r), condition)
        x = x - h * (v + v_end) / 2
        yield x


def dpm_solver_2(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """DPM-Solver-2 (Lu et al. 2022, Alg. 1, r = 1/2): second order, two calls a step, as a midpoint rule in sigma.

    In EDM's coordinates (sigma = t / (1 - t), the state over 1 - t, the noise prediction as direction) an Euler step
    leads to the geometric mean of the two sigmas, and the direction there makes the whole step. Where an end has no
    such mean (t = 1, whose sigma is infinite, or r = 0, whose sigma is 0) the step is the plain midpoint rule in t,
    which is of second order too.
    """
    yield x
    for t, r in zip(grid, grid[1:], strict=False):
        s = _middle(t, r)
        v = velocity(x, _full(x, t), condition)
        v_s = velocity(x - (t - s).item() * v, _full(x, s), condition)
        if t < 1 and r > 0:
            # The velocity from x to the noise end that v_s points away from, without a difference of large states.
            v_s = ((1 - s) / (1 - t)).item() * v_s - ((t - s) / (1 - t)).item() * v
        x = x - (t - r).item() * v_s
        yield x


def _middle(t: Tensor, r: Tensor) -> Tensor:
    """The time of the geometric mean of two sigmas; the plain mean where one of them is 0 or infinite."""
    if t == 1 or r == 0:
        return (t + r) / 2
    noise, data = torch.sqrt(t * r), torch.sqrt((1 - t) * (1 - r))
    return noise / (noise + data)


def ipndm_2(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """iPNDM (Zhang & Chen 2023) of two noise predictions."""
    return _ipndm(velocity, x, grid, condition, max_order=2)


def ipndm_3(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """iPNDM (Zhang & Chen 2023) of three noise predictions."""
    return _ipndm(velocity, x, grid, condition, max_order=3)


def ipndm_4(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """iPNDM (Zhang & Chen 2023) of four noise predictions, its authors' choice.

    The coefficients are those of equal steps of sigma and are kept where steps differ, as its authors do, so the error
    falls with the square of the step on other grids. On a grid of equal steps of sigma it falls with the fourth power,
    as long as the first steps, which are of lower order, cross a range where the noise prediction hardly changes.
    """
    return _ipndm(velocity, x, grid, condition, max_order=4)


_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _ipndm(velocity: Velocity, x: Images, grid: Grid, condition: Condition, *, max_order: int) -> States:
    """Adams-Bashforth in sigma on the noise prediction; the first steps have the order that the history allows."""
    yield x
    history: list[Images] = []
    for t, r in zip(grid, grid[1:], strict=False):
        t_ = _full(x, t)
        v = velocity(x, t_, condition)
        history = [noise_end(x, v, t_), *history[: max_order - 1]]
        if len(history) > 1:  # the first step is Euler's, also from t = 1, where nothing may be divided by 1 - t
            weights = _ADAMS_BASHFORTH[len(history) - 1]
            noise = torch.stack([weight * d for weight, d in zip(weights, history, strict=True)]).sum(0)
            v = v + (noise - history[0]) / (1 - t).item()
        x = x - (t - r).item() * v
        yield x


def dpmpp_2m(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): second order, one call a step, predicting the data end."""
    return _dpmpp(velocity, x, grid, condition, max_order=2)


def dpmpp_3m(velocity: Velocity, x: Images, grid: Grid, condition: Condition) -> States:
    """DPM-Solver++(3M) as released and as SFD uses it, starting and ending at lower orders.

    The release leaves Taylor's factor 2 out of the second difference, so the error falls with the square of the step
    and not with its cube. It is kept: from some ten to fifty steps it is nearer to the exact flow than 2M, and on the
    grids of SFD often nearer than the third-order form.
    """
    return _dpmpp(velocity, x, grid, condition, max_order=3)


def _dpmpp(velocity: Velocity, x: Images, grid: Grid, condition: Condition, *, max_order: int) -> States:
    yield x
    lambdas, intervals = log_snr_half(grid), len(grid) - 1
    history: list[Images] = []
    for i in range(intervals):
        t = _full(x, grid[i])
        history = [denoised(x, velocity(x, t, condition), t), *history[: max_order - 1]]
        order = min(max_order, i + 1, intervals - i)
        x = _dpmpp_update(x, history[:order], grid[i], grid[i + 1], lambdas[: i + 2].flip(0))
        yield x


def _dpmpp_update(x: Images, history: list[Images], t: Tensor, r: Tensor, lambdas: Tensor) -> Images:
    """One multistep update; ``history`` holds D newest first, ``lambdas`` the half log-SNR from ``r`` backwards.

    With ``phi_1 = e^-h - 1``, ``phi_2 = phi_1 / h + 1`` and ``phi_3 = phi_2 / h - 1/2`` the data end is integrated as
    ``-phi_1 D + phi_2 D_1 - phi_3 D_2`` over a step ``h`` of half log-SNR, where ``D_1`` estimates the slope of D and
    ``D_2`` is its second divided difference (order 2 keeps the cheaper ``-phi_1/2 D_1``).
    """
    steps = lambdas[:-1] - lambdas[1:]
    h = steps[0]
    phi_1 = torch.expm1(-h)
    data = -phi_1.item() * history[0]
    if len(history) == 2:
        data = data - (phi_1 / 2 * (h / steps[1])).item() * (history[0] - history[1])
    if len(history) == 3:
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        first, second = _differences(history, (steps[1] / h).item(), (steps[2] / h).item())
        data = data + phi_2.item() * first - phi_3.item() * second
    return (r / t).item() * x + (1 - r).item() * data


def _differences(history: list[Images], r_0: float, r_1: float) -> tuple[Images, Images]:
    """Slope and second divided difference of D in units of the coming step (a step from t = 1 is infinitely long)."""
    newer = (history[0] - history[1]) / r_0
    older = (history[1] - history[2]) / r_1
    change = (newer - older) / (r_0 + r_1)
    return newer + r_0 * change, change


def analytical_first(velocity: Velocity, first: float) -> Velocity:
    """A velocity whose call at time ``first`` is answered analytically (AFS) and costs no network call."""

    def analytical_or_called(x_t: Images, t: Times, condition: Condition) -> Images:
        if bool((t == torch.full_like(t, first)).all()):
            return afs_velocity(x_t, torch.full_like(t, first, dtype=torch.float64))
        return velocity(x_t, t, condition)

    return analytical_or_called


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver and what it costs."""

    states: Callable[[Velocity, Images, Grid, Condition], States]
    """The generator of states."""
    order: int
    """Measured order of convergence in the step size."""
    calls_per_step: int = 1
    """Network calls per interval of the grid."""


SOLVERS: dict[str, Solver] = {
    "euler": Solver(states=euler, order=1),
    "heun": Solver(states=heun, order=2, calls_per_step=2),
    "dpm_solver_2": Solver(states=dpm_solver_2, order=2, calls_per_step=2),
    "ipndm_2": Solver(states=ipndm_2, order=2),
    "ipndm_3": Solver(states=ipndm_3, order=2),
    "ipndm_4": Solver(states=ipndm_4, order=2),
    "dpmpp_2m": Solver(states=dpmpp_2m, order=2),
    "dpmpp_3m": Solver(states=dpmpp_3m, order=2),
}


def last(states: States) -> Images:
    """The final state; the others are dropped as they come."""
    *_, final = states
    return final


def trajectory(states: States) -> Tensor:
    """All states, stacked after the rows: ``(b, points, c, h, w)``."""
    return torch.stack(list(states), dim=1)
