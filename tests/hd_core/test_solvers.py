"""Solvers against the exact flow, and those of EDM's coordinates against their formulas there."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from hd_core.solvers import SOLVERS, analytical_first, last, trajectory
from hd_core.times import GridConfig, custom
from hd_core.types import Condition
from tests.oracles import GAUSSIAN, LINE, PLANE, GaussianFlow, MixtureFlow, no_condition, points

EDM = GridConfig(kind="polynomial", t_max=80 / 81, t_min=0.006 / 1.006)
ENDS = GridConfig()  # from t = 1, where alpha = 0, to t = 0, where sigma = 0
LOG_SNR = GridConfig(kind="log_snr", t_max=0.999, t_min=0.001)


COUNTS = (128, 192, 256, 384)


def steps_of_sigma(high: float, low: float) -> GridConfig:
    """A grid of equal steps of sigma."""
    return GridConfig(kind="polynomial", rho=1.0, t_max=high / (1 + high), t_min=low / (1 + low))


@cache
def exact_end(flow: GaussianFlow | MixtureFlow, config: GridConfig) -> Tensor:
    exact = flow if isinstance(flow, GaussianFlow) else replace(flow, substeps=1500)  # error below 1e-9
    return exact.flow_map(points(16, 1, 1, 1, seed=3), config.t_max, config.t_min)


def measured_order(
    name: str, flow: GaussianFlow | MixtureFlow, config: GridConfig, counts: tuple[int, ...] = COUNTS
) -> float:
    """Slope of log error against log step size, by regression."""
    x, exact = points(16, 1, 1, 1, seed=3), exact_end(flow, config)
    ends = [last(SOLVERS[name].states(flow, x, config.times(n), no_condition(16))) for n in counts]
    errors = [(end - exact).square().mean().sqrt() for end in ends]
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


# Euler and Heun have their order in t, DPM-Solver-2 and iPNDM in log sigma, DPM-Solver++ in half log-SNR.
@pytest.mark.parametrize(
    ("name", "config"), [(name, ENDS if name in ("euler", "heun") else LOG_SNR) for name in SOLVERS]
)
@pytest.mark.parametrize("flow", [GAUSSIAN, LINE], ids=["gaussian", "line"])
def test_order_of_convergence(name: str, config: GridConfig, flow: GaussianFlow | MixtureFlow):
    # The flows bend D(lambda), so no solver is exact; the next term of the error tilts the slope by up to 0.16.
    assert measured_order(name, flow, config) == pytest.approx(SOLVERS[name].order, abs=0.2)


@pytest.mark.parametrize(("name", "order"), [("ipndm_3", 3), ("ipndm_4", 4)])
def test_ipndm_has_the_order_of_its_coefficients_on_equal_steps_of_sigma(name: str, order: int):
    """From a sigma where the noise prediction hardly changes, so that the first steps, of lower order, err little."""
    slope = measured_order(name, GAUSSIAN, steps_of_sigma(10, 0.006), (2048, 4096))
    assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", ["ipndm_2", "ipndm_3", "ipndm_4"])
def test_the_first_euler_step_of_ipndm_limits_its_order(name: str):
    """Equal steps of sigma again, but from a sigma at which the noise prediction changes fast."""
    slope = measured_order(name, GAUSSIAN, steps_of_sigma(0.5, 0.1), (128, 256, 512))
    assert slope == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("name", ["dpm_solver_2", "ipndm_2", "ipndm_3", "ipndm_4"])
@pytest.mark.parametrize("config", [EDM, ENDS], ids=["edm", "ends"])
def test_second_order_on_other_grids(name: str, config: GridConfig):
    # From t = 1 to t = 0 the error is the square of the step times its logarithm, which tilts the slope by 0.2.
    assert measured_order(name, GAUSSIAN, config, (256, 512, 1024)) == pytest.approx(2, abs=0.2)


def test_each_solver_beats_the_one_before_it():
    """On the plane at 48 calls; a wrong coefficient in a higher order shows as no gain."""
    x = points(32, 1, 1, 2, seed=4)
    exact = replace(PLANE, substeps=1000).flow_map(x, LOG_SNR.t_max, LOG_SNR.t_min)
    error = {
        name: (last(solver.states(PLANE, x, LOG_SNR.times(48), no_condition(32))) - exact).square().mean().sqrt()
        for name, solver in ((name, SOLVERS[name]) for name in ("euler", "dpmpp_2m", "dpmpp_3m"))
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


@pytest.mark.parametrize(
    ("name", "atol"),
    [
        ("euler", 0.08), ("heun", 0.004), ("dpm_solver_2", 0.006), ("ipndm_2", 0.006), ("ipndm_3", 0.0012),
        ("ipndm_4", 0.0015), ("dpmpp_2m", 0.02), ("dpmpp_3m", 0.02),
    ],
)  # fmt: skip
def test_whole_range_ends_on_the_exact_flow(name: str, atol: float):
    """32 steps from pure noise to data; the bounds are over 1.5 times the measured errors, where states differ by 3."""
    x = points(16, 1, 1, 2, seed=5)
    end = last(SOLVERS[name].states(PLANE, x, ENDS.times(32), no_condition(16)))
    torch.testing.assert_close(end, PLANE.flow_map(x, 1.0, 0.0), rtol=0, atol=atol)


def test_one_step_to_the_data_is_the_denoised_point():
    x = points(4, 1, 1, 2)
    for name in ("euler", "ipndm_2", "ipndm_3", "ipndm_4", "dpmpp_2m", "dpmpp_3m"):
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


def longhand_ipndm(flow: MixtureFlow, x: Tensor, sigmas: list[float], max_order: int) -> list[Tensor]:
    """Adams-Bashforth of ``dx/dsigma = d`` in EDM's coordinates, where ``d = (x - D) / sigma``."""
    states, slopes = [x], []
    for s, t in zip(sigmas, sigmas[1:], strict=False):
        slopes.append((x - flow.denoised(x / (1 + s), s / (1 + s))) / s)
        order = min(max_order, len(slopes))
        if order == 1:
            d = slopes[-1]
        elif order == 2:
            d = (3 * slopes[-1] - slopes[-2]) / 2
        elif order == 3:
            d = (23 * slopes[-1] - 16 * slopes[-2] + 5 * slopes[-3]) / 12
        else:
            d = (55 * slopes[-1] - 59 * slopes[-2] + 37 * slopes[-3] - 9 * slopes[-4]) / 24
        x = x + (t - s) * d
        states.append(x)
    return states


def longhand_dpm_solver_2(flow: MixtureFlow, x: Tensor, sigmas: list[float]) -> list[Tensor]:
    """The released single-step solver with r = 1/2 in EDM's coordinates."""
    states = [x]
    for s, t in zip(sigmas, sigmas[1:], strict=False):
        d = (x - flow.denoised(x / (1 + s), s / (1 + s))) / s
        middle = math.sqrt(s * t)
        x_middle = x + (middle - s) * d
        x = x + (t - s) * (x_middle - flow.denoised(x_middle / (1 + middle), middle / (1 + middle))) / middle
        states.append(x)
    return states


IRREGULAR = GridConfig(kind="log_snr", t_max=0.99, t_min=0.02, knots=(0.8, 0.7))


@pytest.mark.parametrize("name", ["ipndm_2", "ipndm_3", "ipndm_4", "dpm_solver_2"])
@pytest.mark.parametrize(
    "config", [EDM, LOG_SNR, GridConfig(t_max=0.95, t_min=0.05), IRREGULAR], ids=["edm", "log_snr", "t", "irregular"]
)
def test_ipndm_and_dpm_solver_2_in_edms_coordinates(name: str, config: GridConfig):
    times, x = config.times(9), points(4, 1, 1, 2)
    sigmas = [t / (1 - t) for t in times.tolist()]
    start = x * (1 + sigmas[0])
    if name == "dpm_solver_2":
        expected = longhand_dpm_solver_2(PLANE, start, sigmas)
    else:
        expected = longhand_ipndm(PLANE, start, sigmas, int(name[-1]))
    ours = trajectory(SOLVERS[name].states(PLANE, x, times, no_condition(4)))
    for i, state in enumerate(expected):
        torch.testing.assert_close(ours[:, i], state / (1 + sigmas[i]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("t", "r"), [(1.0, 0.0), (1.0, 0.6), (0.6, 0.0)])
def test_dpm_solver_2_is_the_midpoint_rule_in_t_where_sigma_has_no_middle(t: float, r: float):
    x, h = points(4, 1, 1, 2), (t - r) / 2
    expected = x - 2 * h * PLANE.velocity(x - h * PLANE.velocity(x, t), t - h)
    end = last(SOLVERS["dpm_solver_2"].states(PLANE, x, custom([t, r]), no_condition(4)))
    torch.testing.assert_close(end, expected, rtol=1e-12, atol=1e-12)


def test_ipndm_leaves_pure_noise_by_an_euler_step_and_remembers_its_direction():
    x, grid = points(4, 1, 1, 2), custom([1.0, 0.7, 0.4])
    x_1 = x - 0.3 * PLANE.velocity(x, 1.0)
    d = 1.5 * (x_1 + 0.3 * PLANE.velocity(x_1, 0.7)) - 0.5 * x
    expected = 0.6 / 0.3 * x_1 + (0.4 - 0.7 * 0.6 / 0.3) * d
    states = trajectory(SOLVERS["ipndm_4"].states(PLANE, x, grid, no_condition(4)))
    torch.testing.assert_close(states[:, 1], x_1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[:, 2], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", [EDM, ENDS], ids=["edm", "ends"])
def test_an_analytical_first_step_saves_the_first_call_alone(name: str, dtype: torch.dtype, config: GridConfig):
    called: list[float] = []

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        called.append(t[0].item())
        return PLANE(x_t.double(), t.double(), condition).to(x_t)

    grid, x = config.times(5), points(3, 1, 1, 2).to(dtype)
    last(SOLVERS[name].states(counted, x, grid, no_condition(3)))
    every, called = called, []
    end = last(SOLVERS[name].states(analytical_first(counted, grid[0].item()), x, grid, no_condition(3)))
    assert called == every[1:]
    assert end.isfinite().all() and end.dtype == dtype


def longhand_afs_euler(flow: MixtureFlow, x: Tensor, sigmas: list[float]) -> Tensor:
    """SFD's first step in EDM's coordinates, ``d = x / sqrt(1 + sigma^2)``, and Euler steps after it."""
    x = x + (sigmas[1] - sigmas[0]) * x / math.sqrt(1 + sigmas[0] ** 2)
    for s, t in zip(sigmas[1:], sigmas[2:], strict=False):
        x = x + (t - s) * (x - flow.denoised(x / (1 + s), s / (1 + s))) / s
    return x


def test_analytical_first_step_longhand():
    x, grid = points(4, 1, 1, 2), EDM.times(4)
    sigmas = [t / (1 - t) for t in grid.tolist()]
    velocity = analytical_first(PLANE, grid[0].item())
    for points_kept in (2, 3, 5):
        expected = longhand_afs_euler(PLANE, x * (1 + sigmas[0]), sigmas[:points_kept]) / (1 + sigmas[points_kept - 1])
        end = last(SOLVERS["euler"].states(velocity, x, grid[:points_kept], no_condition(4)))
        torch.testing.assert_close(end, expected, rtol=1e-10, atol=1e-10)


def test_analytical_first_step_from_pure_noise_scales_it():
    """Its data end is 0 there."""
    x = points(4, 1, 1, 2)
    end = last(SOLVERS["euler"].states(analytical_first(PLANE, 1.0), x, custom([1.0, 0.6]), no_condition(4)))
    torch.testing.assert_close(end, 0.6 * x, rtol=1e-12, atol=1e-12)


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
