"""Schedules against brute force, closed forms and the flows of the oracles."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hd_core.schedules import arctan, euler_costs, from_gaps, gits, log_snr, nearest, oss, polynomial, to_gaps
from hd_core.solvers import euler, heun, last
from hd_core.times import GridConfig
from hd_core.types import Condition
from tests.oracles import GaussianFlow, no_condition, points

FINE = GridConfig().times(12)


@given(gaps=st.lists(st.floats(-50, 50), min_size=1, max_size=8), intervals=st.integers(8, 40))
def test_any_gaps_give_a_choice(gaps: list[float], intervals: int):
    places = from_gaps(gaps, intervals + 1)
    assert places[0] == 0 and places[-1] == intervals and len(places) == len(gaps) + 1
    assert all(after > before for before, after in pairwise(places))


@given(places=st.sets(st.integers(1, 47), min_size=1, max_size=6))
def test_a_choice_has_gaps_that_give_it_again(places: set[int]):
    gaps = to_gaps([0, *sorted(places), 48])
    assert from_gaps(gaps, 49) == [0, *sorted(places), 48]
    assert max(gaps) == pytest.approx(-min(gaps))


def test_gaps_are_shares_of_the_fine_grid():
    assert from_gaps([0.0] * 4, 13) == [0, 3, 6, 9, 12]
    assert from_gaps([math.log(2), 0.0], 13) == [0, 8, 12]
    assert from_gaps([100.0, 0.0, 0.0], 13) == [0, 10, 11, 12]
    with pytest.raises(ValueError, match="3 steps need as many intervals of a fine grid; it has 2"):
        from_gaps([0.0] * 3, 3)


def test_nearest_keeps_the_ends_and_sets_crowded_times_apart():
    assert nearest([0.76, 0.24], FINE) == [0, 3, 9, 12]
    assert nearest([1.0, 0.999, 0.99], FINE) == [0, 1, 2, 3, 12]
    assert nearest([0.01, 0.001], FINE) == [0, 10, 11, 12]


def test_named_grids_are_their_formulas():
    """EDM with 18 steps has sigma 57.586 as its second (Karras et al. 2022, Eq. 5, with index i / (steps - 1))."""
    second = polynomial(17, 7.0)[0]
    assert second / (1 - second) == pytest.approx(57.586, rel=1e-4)
    grid = GridConfig(kind="polynomial", t_max=80 / 81, t_min=0.002 / 1.002).times(5)
    assert polynomial(5, 7.0) == pytest.approx(grid[1:-1].tolist(), rel=1e-12)
    grid = GridConfig(kind="log_snr", t_max=80 / 81, t_min=0.002 / 1.002).times(5)
    assert log_snr(5) == pytest.approx(grid[1:-1].tolist(), rel=1e-12)


def error_of(places: list[int], flow: GaussianFlow, fine: torch.Tensor, x: torch.Tensor) -> float:
    """How far Euler's sampler on some places ends from the flow."""
    ended = last(euler(wrapped(flow), x, fine[places], no_condition(len(x))))
    return float((ended - flow.flow_map(x, 1.0, 0.0)).flatten(1).norm(dim=1).mean())


def wrapped(flow: GaussianFlow):
    def velocity(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        del condition
        return flow.velocity(x, t)

    return velocity


def test_equal_angles_are_eulers_best_for_gaussian_data():
    """Any other choice of one or two inner times does worse; at data's own scale alone."""
    flow, x, fine = GaussianFlow(mean=0.0, std=0.5), points(1, 1, 1, 1), GridConfig().times(30)
    for steps in (2, 3):
        every = [[0, *inner, 30] for inner in combinations(range(1, 30), steps - 1)]
        assert min(every, key=lambda places: error_of(places, flow, fine, x)) == nearest(arctan(steps, 0.5), fine)
    assert error_of(nearest(arctan(3, 0.5), fine), flow, fine, x) < error_of(
        nearest(arctan(3, 2.0), fine), flow, fine, x
    )


@pytest.mark.parametrize("gamma", [0.9, 1.0, 1.15])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_gits_finds_the_least_discounted_sum(steps: int, gamma: float):
    """Against all choices; the costs are any numbers."""
    costs = torch.rand(8, 8, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)

    def total(places: tuple[int, ...]) -> float:
        return sum(gamma**k * costs[i, j].item() for k, (i, j) in enumerate(pairwise(places)))

    every = [(0, *inner, 7) for inner in combinations(range(1, 7), steps - 1)]
    assert tuple(gits(costs, steps, gamma)) == min(every, key=total)


def test_costs_are_what_an_euler_step_misses():
    flow, x = GaussianFlow(mean=0.3, std=0.5), points(16, 1, 2, 2)
    states = list(heun(wrapped(flow), x, FINE, no_condition(16)))
    costs = euler_costs(wrapped(flow), states, FINE, no_condition(16))
    stepped = states[2] + (FINE[7] - FINE[2]).item() * flow.velocity(states[2], FINE[2].expand(16))
    assert costs[2, 7].item() == pytest.approx((stepped - states[7]).flatten(1).norm(dim=1).mean().item())
    assert torch.equal(costs, costs.triu(1)) and costs[0, 12] > costs[0, 1] > 0


def test_oss_is_the_best_single_inner_time_for_every_row():
    """With two steps it tries every inner time: its choice is each row's best, and its median over rows."""
    flow, x = GaussianFlow(mean=0.3, std=0.5), points(5, 1, 2, 2)
    condition = no_condition(5)
    states = list(heun(wrapped(flow), x, FINE, condition))
    ends = torch.stack([last(euler(wrapped(flow), x, FINE[[0, i, 12]], condition)) for i in range(1, 12)])
    best = 1 + (ends - states[12]).flatten(2).norm(dim=2).argmin(0)
    assert oss(wrapped(flow), states, FINE, condition, 2) == [0, int(best.sort().values[2]), 12]


@pytest.mark.parametrize("steps", [3, 4])
def test_searched_choices_beat_equal_steps(steps: int):
    flow, x = GaussianFlow(mean=0.3, std=0.2), points(64, 1, 2, 2)
    fine, condition = GridConfig().times(24), no_condition(64)
    states = list(heun(wrapped(flow), x, fine, condition))
    plain = error_of(from_gaps([0.0] * steps, 25), flow, fine, x)
    costs = euler_costs(wrapped(flow), states, fine, condition)
    for places in (oss(wrapped(flow), states, fine, condition, steps), gits(costs, steps)):
        assert len(places) == steps + 1 and all(after > before for before, after in pairwise(places))
        assert error_of(places, flow, fine, x) < 0.9 * plain


def test_as_many_steps_as_intervals_leave_no_choice():
    flow, x = GaussianFlow(mean=0.0, std=0.5), points(4, 1, 2, 2)
    fine, condition = GridConfig().times(4), no_condition(4)
    states = list(heun(wrapped(flow), x, fine, condition))
    costs = euler_costs(wrapped(flow), states, fine, condition)
    assert oss(wrapped(flow), states, fine, condition, 4) == gits(costs, 4) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5 steps need as many intervals"):
        gits(costs, 5)
    with pytest.raises(ValueError, match="5 steps need as many intervals"):
        oss(wrapped(flow), states, fine, condition, 5)
