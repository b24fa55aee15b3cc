"""The two propositions of HD on flows whose mean velocity is known.

Proposition 1: a consistency model learns the mean velocity over ``[0, t]``. Proposition 2: so does progressive
distillation, in the limit of many halvings. Both are about exact optima, so nothing is trained here: the optimum is
computed, and has to be the mean velocity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from hd_core.paths import denoised, jump
from hd_core.solvers import euler, last
from hd_core.times import GridConfig
from tests.oracles import GAUSSIAN, LINE, PLANE, GaussianFlow, MixtureFlow, no_condition, points

Flow = GaussianFlow | MixtureFlow


@dataclass(frozen=True, kw_only=True)
class PreciseFlow(MixtureFlow):
    """The oracle's flow map taken to higher order: with twice the steps, and the leading error cancelled."""

    substeps: int = 48
    """Of the coarser of the two; their combination is within 2e-10 for the mixtures below."""

    def flow_map(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        fine = replace(self, substeps=2 * self.substeps)
        return (16 * MixtureFlow.flow_map(fine, x, t, r) - MixtureFlow.flow_map(self, x, t, r)) / 15


def precise(flow: MixtureFlow) -> PreciseFlow:
    return PreciseFlow(means=flow.means, stds=flow.stds, weights=flow.weights)


FLOWS: dict[str, tuple[Flow, int]] = {
    "gaussian": (GAUSSIAN, 1),
    "line": (precise(LINE), 1),
    "plane": (precise(PLANE), 2),
}
EXACT = 1e-9
STEP = 0.004  # of the nine points, whose error is of order STEP^8
WRONG = 1e-2  # what the other sign must miss by, in root mean square


@pytest.fixture(params=FLOWS)
def case(request: pytest.FixtureRequest) -> tuple[Flow, Tensor]:
    """A flow and points of it at some time."""
    flow, width = FLOWS[request.param]
    return flow, 1.5 * points(3, width, 1, 1, seed=3)


def at(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)


def consistency(flow: Flow, x: Tensor, t: Tensor) -> Tensor:
    """The exact consistency function: where a point's trajectory ends at data."""
    return flow.flow_map(x, t, 0.0)


def predicted(flow: Flow, x: Tensor, t: Tensor) -> Tensor:
    """What a consistency model's network outputs, ``F = (x_t - f) / t``, from ``f(x_t, t) = x_t - t F(x_t, t)``."""
    return (x - consistency(flow, x, t)) / t.reshape(-1, 1, 1, 1)


def moved(flow: Flow, x: Tensor, t: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Each point's trajectory at ``t`` plus each of some steps, ``(steps * b, ...)``, and those times."""
    starts, times = t.repeat(len(steps)), (t + steps[:, None]).flatten()
    return flow.flow_map(x.repeat(len(steps), 1, 1, 1), starts, times), times


def along_the_flow(
    flow: Flow, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """A function's value, and its derivative in time of a point that moves with the velocity.

    The closed form is differentiated by forward mode. Runge-Kutta's map is differenced over nine points of the
    trajectory, of eighth order, where forward mode through hundreds of its steps would take minutes.
    """
    if isinstance(flow, GaussianFlow):
        value, change, *_ = torch.func.jvp(function, (x, t), (flow.velocity(x, t), torch.ones_like(t)))
        return value, change
    steps = STEP * torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0], dtype=torch.float64)
    weights = torch.tensor([4 / 5, -4 / 5, -1 / 5, 1 / 5, 4 / 105, -4 / 105, -1 / 280, 1 / 280], dtype=torch.float64)
    values = function(*moved(replace(flow, substeps=4), x, t, steps)).unflatten(0, (len(steps), len(x)))
    return function(x, t), torch.einsum("s,s...->...", weights, values) / STEP


def close(value: Tensor, expected: Tensor, atol: float = EXACT) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=atol)


def root_mean_square(value: Tensor) -> float:
    return value.square().mean().sqrt().item()


class TestConsistencyModels:
    """Proposition 1."""

    def test_the_network_is_the_mean_velocity_down_to_data(self, case: tuple[Flow, Tensor]):
        """The mean of the velocity over a trajectory by Gauss-Legendre quadrature on 48 nodes, and the oracle."""
        (flow, x), t = case, 1.0
        nodes, weights = (torch.from_numpy(values) for values in leggauss(48))
        states, times = moved(flow, x, at(t, x), t * (nodes - 1) / 2)
        velocities = flow.velocity(states, times).unflatten(0, (len(nodes), len(x)))
        mean = torch.einsum("s,s...->...", weights, velocities) / 2
        value = predicted(flow, x, at(t, x))
        close(value, mean)
        close(value, flow.mean_velocity(x, t, 0.0), atol=1e-13)
        assert root_mean_square(mean - flow.velocity(x, t)) > WRONG

    def test_it_solves_its_differential_equation(self, case: tuple[Flow, Tensor]):
        """``F = v - t dF/dt`` along the flow: the MeanFlow identity with ``r = 0``."""
        (flow, x), t = case, 0.8
        time = at(t, x)
        value, change = along_the_flow(flow, partial(predicted, flow), x, time)
        v = flow.velocity(x, time)
        close(value, v - t * change)
        assert root_mean_square(value - (v + t * change)) > WRONG

    def test_the_consistency_function_does_not_change_along_the_flow(self, case: tuple[Flow, Tensor]):
        """Continuous: ``df/dt = 0`` along the flow; at a point that stays where it is, f changes."""
        flow, x = case
        _, change = along_the_flow(flow, partial(consistency, flow), x, at(0.7, x))
        close(change, torch.zeros_like(x))
        still = (consistency(flow, x, at(0.71, x)) - consistency(flow, x, at(0.69, x))) / 0.02
        assert root_mean_square(still) > WRONG

    def test_neighbours_on_a_trajectory_agree(self, case: tuple[Flow, Tensor]):
        """Discrete: ``f(x_{t + step}) = f(x_t)``, though the step is large; with the other sense it does not hold."""
        flow, x = case
        here = consistency(flow, x, at(0.6, x))
        later, earlier = flow.flow_map(x, 0.6, 0.8), flow.flow_map(x, 0.6, 0.4)
        close(consistency(flow, later, at(0.8, x)), here)
        assert root_mean_square(consistency(flow, earlier, at(0.8, x)) - here) > WRONG

    def test_one_jump_reaches_the_end(self, case: tuple[Flow, Tensor]):
        """`hd_core` reads F as a flow map to 0 and as a velocity whose data end is f: the same point."""
        flow, x = case
        t, zero = at(0.9, x), at(0.0, x)
        value, expected = predicted(flow, x, t), flow.flow_map(x, 0.9, 0.0)
        close(jump(x, value, t, zero), expected, atol=1e-12)
        close(denoised(x, value, t), expected, atol=1e-12)

    def test_a_residual_by_differences_is_of_its_order(self):
        """With ``dF/dt`` over a finite step the identity's residual falls with the step, and with it only."""
        flow, x = FLOWS["line"][0], points(3, 1, 1, 1, seed=3)
        value, v = predicted(flow, x, at(0.5, x)), flow.velocity(x, 0.5)

        def residual(step: float) -> Tensor:
            later = flow.flow_map(x, 0.5, 0.5 + step)
            change = (predicted(flow, later, at(0.5 + step, x)) - value) / step
            return value - (v - 0.5 * change)

        order = math.log2(root_mean_square(residual(2e-3)) / root_mean_square(residual(1e-3)))
        assert 0.95 < order < 1.05


@pytest.mark.parametrize(("t", "r"), [(1.0, 0.0), (0.5, 0.4), (0.3, 0.9)])
def test_mean_flow_identity(case: tuple[Flow, Tensor], t: float, r: float):
    """``u = v - (t - r) du/dt`` for any two times, also upwards, and not with the other sign."""
    flow, x = case
    u, change = along_the_flow(flow, lambda x, time: flow.mean_velocity(x, time, r), x, at(t, x))
    v = flow.velocity(x, t)
    close(u, v - (t - r) * change)
    assert root_mean_square(u - v - (t - r) * change) > WRONG


def halved(flow: Flow, steps: int, x: Tensor, t: float, interval: float) -> Tensor:
    """The student after ``log2(steps)`` halvings: ``v_S(x_t) = 1/2 [v_T(x_t) + v_T(x_{t-D})]``, T being one before."""
    if steps == 1:
        return flow.velocity(x, t)
    first = halved(flow, steps // 2, x, t, interval / 2)
    second = halved(flow, steps // 2, x - interval / 2 * first, t - interval / 2, interval / 2)
    return (first + second) / 2


class TestProgressiveDistillation:
    """Proposition 2, over the whole interval from ``t = 1``."""

    def test_halvings_average_the_euler_velocities(self, case: tuple[Flow, Tensor]):
        """Composing five halvings, averaging 32 velocities on Euler's own states, and Euler's chord: one thing."""
        flow, x = case
        state, velocities = x, list[Tensor]()
        for i in range(32):
            velocities.append(flow.velocity(state, 1 - i / 32))
            state = state - velocities[-1] / 32
        student = halved(flow, 32, x, 1.0, 1.0)
        close(student, torch.stack(velocities).mean(0), atol=1e-13)
        end = last(euler(flow, x, GridConfig().times(32), no_condition(len(x))))
        close(jump(x, student, at(1.0, x), at(0.0, x)), end, atol=1e-13)

    @pytest.mark.parametrize("form", ["average", "composed"])
    def test_it_converges_to_the_mean_velocity_at_first_order(self, case: tuple[Flow, Tensor], form: str):
        """The error is O(2^-N) in the number of halvings N, both ways of computing the student."""
        flow, x = case
        u = flow.mean_velocity(x, 1.0, 0.0)

        def error(halvings: int) -> float:
            if form == "composed":
                return root_mean_square(halved(flow, 2**halvings, x, 1.0, 1.0) - u)
            end = last(euler(flow, x, GridConfig().times(2**halvings), no_condition(len(x))))
            return root_mean_square((x - end) - u)

        errors = [error(halvings) for halvings in range(4, 10)]
        orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
        assert all(0.9 < order < 1.1 for order in orders), orders
        assert errors[-1] < 5e-3
        assert root_mean_square(flow.velocity(x, 1.0) - u) > WRONG  # no halving: one Euler step

    def test_the_line_keeps_the_mass_below_a_point(self):
        """In one dimension the flow keeps the mass below its points, which gives the end of a jump without solving."""
        x, t = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), 0.8
        flow = FLOWS["line"][0]
        u = flow.mean_velocity(x, t, 0.0)
        assert mass_below(x - t * u, 0.0) == pytest.approx(mass_below(x, t), abs=EXACT)
        students = [halved(flow, 2**n, x, t, t) for n in (2, 4, 6, 8)]
        errors = [abs(mass_below(x - t * student, 0.0) - mass_below(x, t)) for student in students]
        assert all(3 < a / b < 5 for a, b in zip(errors, errors[1:], strict=False)), errors  # two halvings, a quarter


def mass_below(x: Tensor, t: float) -> float:
    """Share of `LINE` at a time that lies below a point, from its components' distribution functions."""
    means, stds, weights = (
        torch.tensor(values, dtype=torch.float64).flatten() for values in (LINE.means, LINE.stds, LINE.weights)
    )
    spread = ((1 - t) ** 2 * stds**2 + t**2).sqrt()
    return (weights * torch.special.ndtr((x.flatten() - (1 - t) * means) / spread)).sum().item()
