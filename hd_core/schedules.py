"""Choosing few times out of many: the points of a fine grid at which a student, or an Euler sampler, shall step.

A choice is the places of its times in the fine grid, ascending, from 0 (noise) to the last (data), so that whatever is
stored at the fine grid's times serves every choice.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from hd_core.types import Condition, Grid, Images, PerSample, Velocity

Places = list[int]
Costs = Float[Tensor, "p p"]


def from_gaps(gaps: Sequence[float], points: int) -> Places:
    """The choice whose steps take shares of the fine grid that are the softmax of free numbers (as in LD3, Tong et al.
    2025): any numbers give ascending places, and equal ones give equal steps.

    Raises:
        ValueError: there are more steps than the fine grid has.
    """
    weights = [math.exp(gap - max(gaps)) for gap in gaps]
    shares = [weight / sum(weights) for weight in weights]
    return _between([(points - 1) * share for share in accumulate(shares[:-1])], points)


def to_gaps(places: Places) -> list[float]:
    """Free numbers that `from_gaps` makes a choice of again, the greatest as far above 0 as the least is below."""
    widths = [math.log(after - before) for before, after in pairwise(places)]
    middle = (max(widths) + min(widths)) / 2
    return [width - middle for width in widths]


def nearest(times: Sequence[float], stored: Grid) -> Places:
    """The choice nearest to some times between the fine grid's ends, which it begins and ends with.

    Raises:
        ValueError: there are more steps than the fine grid has.
    """
    return _between([(stored - time).abs().argmin().item() for time in times], len(stored))


def _between(wanted: Sequence[float], points: int) -> Places:
    """Whole places strictly between the ends, each apart from its neighbours."""
    last = points - 1
    if len(wanted) >= last:
        raise ValueError(f"{len(wanted) + 1} steps need as many intervals of a fine grid; it has {last}")
    places = [0, *(round(place) for place in wanted), last]
    for i in range(1, len(wanted) + 1):
        places[i] = max(places[i], places[i - 1] + 1)
    for i in range(len(wanted), 0, -1):
        places[i] = min(places[i], places[i + 1] - 1)
    return places


def polynomial(steps: int, rho: float, sigma_max: float = 80.0, sigma_min: float = 0.002) -> list[float]:
    """The times between the ends of EDM's grid (Karras et al. 2022, Eq. 5), in this project's time."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [_time((high + i / steps * (low - high)) ** rho) for i in range(1, steps)]


def log_snr(steps: int, sigma_max: float = 80.0, sigma_min: float = 0.002) -> list[float]:
    """The times between the ends of a grid of equal ratios of sigma."""
    high, low = math.log(sigma_max), math.log(sigma_min)
    return [_time(math.exp(high + i / steps * (low - high))) for i in range(1, steps)]


def arctan(steps: int, scale: float) -> list[float]:
    """The times between noise and data whose ``arctan(sigma / scale)`` are equally spaced.

    For Gaussian data of that standard deviation no grid brings Euler's sampler nearer to the exact end: its factor over
    a step, relative to the exact one, is the cosine of the angle between, and equal angles maximise their product.
    """
    return [_time(scale * math.tan(math.pi / 2 * (1 - i / steps))) for i in range(1, steps)]


def _time(sigma: float) -> float:
    return sigma / (1 + sigma)


def euler_costs(velocity: Velocity, states: Sequence[Images], times: Grid, condition: Condition) -> Costs:
    """``cost[i, j]``: how far an Euler step from state ``i`` lands from state ``j > i``, on average over rows.

    Args:
        states: a fine trajectory, one state for each of ``times``.
    """
    costs = torch.zeros(len(times), len(times), dtype=torch.float64)
    for i in range(len(times) - 1):
        t = torch.full((len(states[i]),), times[i].item(), dtype=states[i].dtype, device=states[i].device)
        v = velocity(states[i], t, condition)
        for j in range(i + 1, len(times)):
            landed = states[i] + (times[j] - times[i]).item() * v
            costs[i, j] = _lengths(landed - states[j]).mean().item()
    return costs


def _lengths(x: Images) -> PerSample:
    """Euclidean length of each row."""
    return x.flatten(1).square().sum(1).sqrt()


def gits(costs: Costs, steps: int, gamma: float = 1.15) -> Places:
    """The choice with the least discounted sum of costs, by dynamic programming (GITS; Chen et al. 2024, Eq. 12).

    From the data end on: ``V_1[i] = cost[i, last]``, ``V_k[i] = min_j cost[i, j] + gamma V_{k-1}[j]``, so that gamma
    above 1 weighs the later steps more.

    Raises:
        ValueError: there are more steps than the fine grid has.
    """
    last = len(costs) - 1
    if steps > last:
        raise ValueError(f"{steps} steps need as many intervals of a fine grid; it has {last}")
    reachable = torch.ones_like(costs).triu(1).bool()
    value, then = costs[:, last].clone(), list[Tensor]()
    value[last] = math.inf
    for _ in range(steps - 1):
        total = (costs + gamma * value).masked_fill(~reachable, math.inf)
        value, chosen = total.min(dim=1)
        then.append(chosen)
    places = [0]
    for chosen in reversed(then):
        places.append(int(chosen[places[-1]].item()))
    return [*places, last]


def oss(velocity: Velocity, states: Sequence[Images], times: Grid, condition: Condition, steps: int) -> Places:
    """The choice along which an Euler sampler's own state stays near the fine trajectory (OSS; Pei et al. 2025).

    For every row, the sampler's state at a place after ``k`` steps is the one, of all places that it may come from,
    that lands nearest to the trajectory; places are read back from the end, and their median is taken over rows. It
    calls the network at most ``steps`` times for each of the fine grid's times.

    Raises:
        ValueError: there are more steps than the fine grid has.
    """
    last, rows = len(times) - 1, len(states[0])
    if steps > last:
        raise ValueError(f"{steps} steps need as many intervals of a fine grid; it has {last}")
    sampler: dict[int, Images] = {0: states[0]}
    came_from: list[dict[int, Tensor]] = []
    for k in range(1, steps + 1):
        ends = [last] if k == steps else range(k, last - (steps - k) + 1)
        sampler, origins = _one_step(velocity, sampler, states, times, condition, ends)
        came_from.append(origins)
    place = torch.full((rows,), last)
    chosen = [place]
    for origins in reversed(came_from):
        place = torch.stack([origins[int(p)][row] for row, p in enumerate(place)])
        chosen.append(place)
    medians = [float(places.double().quantile(0.5, interpolation="nearest")) for places in reversed(chosen)]
    return _between(medians[1:-1], len(times))


def _one_step(
    velocity: Velocity,
    sampler: dict[int, Images],
    states: Sequence[Images],
    times: Grid,
    condition: Condition,
    ends: Sequence[int],
) -> tuple[dict[int, Images], dict[int, Tensor]]:
    """The sampler's best state at each end, and the place that it came from, row by row."""
    rows, dtype, device = len(states[0]), states[0].dtype, states[0].device
    moving = {
        i: velocity(x, torch.full((rows,), times[i].item(), dtype=dtype, device=device), condition)
        for i, x in sampler.items()
    }
    reached: dict[int, Images] = {}
    origins: dict[int, Tensor] = {}
    for j in ends:
        before = [i for i in sampler if i < j]
        landed = torch.stack([sampler[i] + (times[j] - times[i]).item() * moving[i] for i in before])
        best = torch.stack([_lengths(one - states[j]) for one in landed]).argmin(dim=0)
        reached[j] = landed[best, torch.arange(rows, device=device)]
        origins[j] = torch.tensor(before)[best.cpu()]
    return reached, origins
