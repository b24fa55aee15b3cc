"""The closed forms that other tests lean on, checked against each other, and the theory of HD on them."""

import pytest
import torch
from torch import Tensor

from tests.oracles import GAUSSIAN, LINE, PLANE, GaussianFlow, MixtureFlow, points

FLOWS = {"gaussian": (GAUSSIAN, 1), "line": (LINE, 1), "plane": (PLANE, 2)}


@pytest.fixture(params=FLOWS)
def flow_and_points(request: pytest.FixtureRequest) -> tuple[GaussianFlow | MixtureFlow, Tensor]:
    flow, width = FLOWS[request.param]
    return flow, 1.5 * points(6, 1, 1, width)


@pytest.mark.parametrize(("flow", "width"), [(LINE, 1), (PLANE, 2)])
@pytest.mark.parametrize("t", [0.1, 0.6, 1.0])
def test_score_is_the_gradient_of_the_log_density(flow: MixtureFlow, width: int, t: float):
    x = points(6, 1, 1, width).requires_grad_()
    (gradient,) = torch.autograd.grad(flow.log_density(x, t).sum(), x)
    torch.testing.assert_close(flow.score(x, t), gradient, rtol=1e-10, atol=1e-12)


def test_a_mixture_of_one_is_the_gaussian():
    one = MixtureFlow(means=((GAUSSIAN.mean,),), stds=(GAUSSIAN.std,), weights=(1.0,))
    x, t = points(5, 1, 1, 1), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    for name in ("score", "denoised", "velocity"):
        torch.testing.assert_close(getattr(one, name)(x, t), getattr(GAUSSIAN, name)(x, t), rtol=1e-12, atol=1e-12)
    # Fourth order in 100 steps: (1/100)^4 = 1e-8 times a derivative of order one.
    torch.testing.assert_close(one.flow_map(x, t, 0.0), GAUSSIAN.flow_map(x, t, 0.0), rtol=0, atol=5e-8)


def test_velocity_is_the_regression_of_noise_minus_data():
    """Monte Carlo: over 400,000 pairs the residual is uncorrelated with any function of the point."""
    x_0 = GAUSSIAN.mean + GAUSSIAN.std * points(400_000, 1, seed=1)
    eps, t = points(400_000, 1, seed=2), 0.35
    x_t = (1 - t) * x_0 + t * eps
    residual = (eps - x_0) - GAUSSIAN.velocity(x_t, t)
    for feature in (torch.ones_like(x_t), x_t, x_t**2):
        # Five standard errors: 5 * std(residual feature) / sqrt(400,000) is at most 0.015.
        product = residual * feature
        assert product.mean().abs() < 5 * product.std() / 400_000**0.5
    # A wrong sign of the data term would leave a mean of 2 * 0.7.


def test_the_flow_map_moves_with_the_velocity(flow_and_points: tuple[GaussianFlow | MixtureFlow, Tensor]):
    flow, x = flow_and_points
    h = 1e-4  # central differences: h^2 = 1e-8 times a third derivative of about ten
    moved = (flow.flow_map(x, 0.6, 0.3 + h) - flow.flow_map(x, 0.6, 0.3 - h)) / (2 * h)
    torch.testing.assert_close(moved, flow.velocity(flow.flow_map(x, 0.6, 0.3), 0.3), rtol=0, atol=1e-6)


def test_flow_maps_compose(flow_and_points: tuple[GaussianFlow | MixtureFlow, Tensor]):
    flow, x = flow_and_points
    once, twice = flow.flow_map(x, 1.0, 0.2), flow.flow_map(flow.flow_map(x, 1.0, 0.5), 0.5, 0.2)
    torch.testing.assert_close(once, twice, rtol=0, atol=5e-8)


def test_mean_flow_identity(flow_and_points: tuple[GaussianFlow | MixtureFlow, Tensor]):
    """HD, Proposition 1: ``u = v - (t - r) du/dt``, the derivative being taken along the flow."""
    flow, x = flow_and_points
    t, r = torch.full((len(x),), 0.8, dtype=torch.float64), torch.full((len(x),), 0.1, dtype=torch.float64)
    v = flow.velocity(x, t)
    u, du_dt = torch.func.jvp(lambda x, t: flow.mean_velocity(x, t, r), (x, t), (v, torch.ones_like(t)))
    # Closed form: rounding. Runge-Kutta: its error of about 2e-8, differentiated.
    atol = 1e-14 if isinstance(flow, GaussianFlow) else 1e-6
    torch.testing.assert_close(u, v - 0.7 * du_dt, rtol=0, atol=atol)
    assert (u - v - 0.7 * du_dt).abs().min() > 1e-3  # the other sign does not hold


def test_progressive_distillation_averages_to_the_mean_velocity():
    """HD, Proposition 2: after N halvings the student's one step is the average of 2^N Euler velocities."""
    x, t = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), 0.8
    u = LINE.mean_velocity(x, t, 0.0).item()
    errors: list[float] = []
    for halvings in range(3, 9):
        steps, y, total = 2**halvings, x, 0.0
        for i in range(steps):
            v = LINE.velocity(y, t * (1 - i / steps))
            y, total = y - t / steps * v, total + v.item()
        errors.append(abs(total / steps - u))
    ratios = [a / b for a, b in zip(errors[2:], errors[3:], strict=False)]
    assert all(1.9 < ratio < 2.1 for ratio in ratios)  # first order: each halving halves the error
    assert errors[-1] < 0.01
