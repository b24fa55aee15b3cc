"""Solvers against the exact flow, and DPM-Solver++ against its formulas in EDM's coordinates."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hd_core.solvers import SOLVERS, last, trajectory
from hd_core.times import GridConfig, custom
from hd_core.types import Condition
from tests.oracles import GAUSSIAN, LINE, PLANE, GaussianFlow, MixtureFlow, no_condition, points

EDM = GridConfig(kind="polynomial", t_max=80 / 81, t_min=0.006 / 1.006)
ENDS = GridConfig()  # from t = 1, where alpha = 0, to t = 0, where sigma = 0
LOG_SNR = GridConfig(kind="log_snr", t_max=0.999, t_min=0.001)


def measured_order(name: str, flow: GaussianFlow | MixtureFlow, config: GridConfig) -> float:
    """Slope of log error against log step size, by regression."""
    x, counts = points(16, 1, 1, 1, seed=3), [128, 192, 256, 384]
    exact_flow = flow if isinstance(flow, GaussianFlow) else replace(flow, substeps=1500)  # error below 1e-9
    exact = exact_flow.flow_map(x, config.t_max, config.t_min)
    errors = [
        (last(SOLVERS[name].states(flow, x, config.times(n), no_condition(16))) - exact).square().mean().sqrt()
        for n in counts
    ]
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


# DPM-Solver++ has its order in half log-SNR, the other two in t.
@pytest.mark.parametrize(
    ("name", "config"), [("euler", ENDS), ("heun", ENDS), ("dpmpp_2m", LOG_SNR), ("dpmpp_3m", LOG_SNR)]
)
@pytest.mark.parametrize("flow", [GAUSSIAN, LINE], ids=["gaussian", "line"])
def test_order_of_convergence(name: str, config: GridConfig, flow: GaussianFlow | MixtureFlow):
    # The flows bend D(lambda), so no solver is exact; the next term of the error tilts the slope by up to 0.16.
    assert measured_order(name, flow, config) == pytest.approx(SOLVERS[name].order, abs=0.2)


def test_each_solver_beats_the_one_before_it():
    """On the plane at 48 calls; a wrong coefficient in a higher order shows as no gain."""
    x = points(32, 1, 1, 2, seed=4)
    exact = replace(PLANE, substeps=1000).flow_map(x, LOG_SNR.t_max, LOG_SNR.t_min)
    error = {
        name: (last(solver.states(PLANE, x, LOG_SNR.times(48), no_condition(32))) - exact).square().mean().sqrt()
        for name, solver in SOLVERS.items()
    }
    assert error["dpmpp_2m"] < 0.3 * error["euler"]
    assert error["dpmpp_3m"] < 0.5 * error["dpmpp_2m"]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_whole_range_is_finite(name: str, steps: int):
    x = points(5, 1, 1, 2, seed=5)
    states = trajectory(SOLVERS[name].states(PLANE, x, ENDS.times(steps), no_condition(5)))
    assert states.shape == (5, steps + 1, 1, 1, 2)
    assert states.isfinite().all()


@pytest.mark.parametrize(("name", "atol"), [("euler", 0.08), ("heun", 0.004), ("dpmpp_2m", 0.02), ("dpmpp_3m", 0.02)])
def test_whole_range_ends_on_the_exact_flow(name: str, atol: float):
    """32 steps from pure noise to data; the bounds are about twice the measured errors, where states differ by 3."""
    x = points(16, 1, 1, 2, seed=5)
    end = last(SOLVERS[name].states(PLANE, x, ENDS.times(32), no_condition(16)))
    torch.testing.assert_close(end, PLANE.flow_map(x, 1.0, 0.0), rtol=0, atol=atol)


def test_one_step_to_the_data_is_the_denoised_point():
    x = points(4, 1, 1, 2)
    for name in ("euler", "dpmpp_2m", "dpmpp_3m"):
        end = last(SOLVERS[name].states(PLANE, x, custom([0.6, 0.0]), no_condition(4)))
        torch.testing.assert_close(end, PLANE.denoised(x, 0.6), rtol=1e-12, atol=1e-12)


def test_euler_is_ddim():
    """``x_r = (r / t) x_t + (1 - r - (r / t)(1 - t)) D``: the noise keeps its estimate."""
    x, grid = points(4, 1, 1, 2), custom([0.9, 0.5, 0.3])
    y = x
    for t, r in zip(grid.tolist(), grid[1:].tolist(), strict=False):
        data = PLANE.denoised(y, t)
        y = (1 - r) * data + r * (y - (1 - t) * data) / t
    states = trajectory(SOLVERS["euler"].states(PLANE, x, grid, no_condition(4)))
    torch.testing.assert_close(states[:, -1], y, rtol=1e-12, atol=1e-12)


def test_heun_longhand():
    x, t, h = points(4, 1, 1, 2), 0.9, 0.4
    v = PLANE.velocity(x, t)
    expected = x - h * 0.5 * (v + PLANE.velocity(x - h * v, t - h))
    end = last(SOLVERS["heun"].states(PLANE, x, custom([t, t - h]), no_condition(4)))
    torch.testing.assert_close(end, expected, rtol=1e-12, atol=1e-12)


def longhand_dpmpp(flow: MixtureFlow, x: Tensor, sigmas: list[float], max_order: int) -> list[Tensor]:
    """The released multistep solver in EDM's coordinates, ``x = x_0 + sigma eps``, one formula a line."""
    states, data, lambdas = [x], [], [-math.log(sigma) for sigma in sigmas]
    for i in range(len(sigmas) - 1):
        s, t, h = sigmas[i], sigmas[i + 1], lambdas[i + 1] - lambdas[i]
        data.append(flow.denoised(x / (1 + s), s / (1 + s)))
        order = i + 1 if i + 1 < max_order else min(max_order, len(sigmas) - (i + 1))
        d_0, phi_1 = data[-1], math.expm1(-h)
        x = (t / s) * x - phi_1 * d_0
        if order >= 2:
            r_0 = (lambdas[i] - lambdas[i - 1]) / h
            d1_0 = (d_0 - data[-2]) / r_0
        if order == 2:
            x = x - 0.5 * phi_1 * d1_0
        if order == 3:
            r_1 = (lambdas[i - 1] - lambdas[i - 2]) / h
            d1_1 = (data[-2] - data[-3]) / r_1
            d_1 = d1_0 + r_0 / (r_0 + r_1) * (d1_0 - d1_1)
            d_2 = (d1_0 - d1_1) / (r_0 + r_1)
            phi_2 = phi_1 / h + 1
            x = x + phi_2 * d_1 - (phi_2 / h - 0.5) * d_2
        states.append(x)
    return states


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("config", [EDM, LOG_SNR, GridConfig(t_max=0.95, t_min=0.05)], ids=lambda c: c.kind)
def test_dpmpp_is_the_released_one_number_by_number(order: int, config: GridConfig):
    times = config.times(9)
    sigmas = [t / (1 - t) for t in times.tolist()]
    x = points(4, 1, 1, 2)
    ours = trajectory(SOLVERS[f"dpmpp_{order}m"].states(PLANE, x, times, no_condition(4)))
    for i, state in enumerate(longhand_dpmpp(PLANE, x * (1 + sigmas[0]), sigmas, order)):
        torch.testing.assert_close(ours[:, i], state / (1 + sigmas[i]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_network_calls_are_counted_right(name: str):
    calls: list[Tensor] = []

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        calls.append(t)
        return GAUSSIAN(x_t, t, condition)

    last(SOLVERS[name].states(counted, points(3, 1, 1, 1), ENDS.times(6), no_condition(3)))
    assert len(calls) == 6 * SOLVERS[name].calls_per_step
    assert all(t.shape == (3,) for t in calls)


@pytest.mark.parametrize("name", SOLVERS)
def test_last_and_trajectory_agree_and_keep_the_start_and_the_dtype(name: str):
    x = points(3, 1, 1, 2).float()

    def single(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert x_t.dtype == t.dtype == torch.float32
        return PLANE(x_t.double(), t.double(), condition).float()

    states = trajectory(SOLVERS[name].states(single, x, ENDS.times(4), no_condition(3)))
    assert states.dtype == torch.float32
    assert torch.equal(states[:, 0], x)
    assert torch.equal(states[:, -1], last(SOLVERS[name].states(single, x, ENDS.times(4), no_condition(3))))
