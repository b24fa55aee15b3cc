"""Conversions: round trips in float64, and other papers' formulas written out longhand."""

import math

import pytest
import torch
from torch import Tensor

from hd_core import paths
from tests.oracles import GAUSSIAN, points

TIMES = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.999], dtype=torch.float64)
ROWS = len(TIMES)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    """Float64 rounding through a few operations."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return points(ROWS, 2, 3, 3, seed=1), points(ROWS, 2, 3, 3, seed=2)


def test_the_convention_in_numbers():
    x_0, eps, t = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0), torch.tensor([0.25])
    assert paths.interpolate(x_0, eps, t).item() == 1.25
    assert paths.velocity(x_0, eps).item() == -3.0
    assert paths.interpolate(x_0, eps, torch.zeros(1)).item() == 2.0
    assert paths.interpolate(x_0, eps, torch.ones(1)).item() == -1.0


def test_both_ends_come_back_from_point_and_velocity(pair: tuple[Tensor, Tensor]):
    x_0, eps = pair
    x_t, v = paths.interpolate(x_0, eps, TIMES), paths.velocity(x_0, eps)
    close(paths.denoised(x_t, v, TIMES), x_0)
    close(paths.noise_end(x_t, v, TIMES), eps)
    close(paths.velocity_to(x_t, x_0, TIMES), v, rtol=1e-10)  # divides by t = 0.05


def test_jump_crosses_the_interval_of_each_row(pair: tuple[Tensor, Tensor]):
    x_0, eps = pair
    r = TIMES / 2
    jumped = paths.jump(paths.interpolate(x_0, eps, TIMES), paths.velocity(x_0, eps), TIMES, r)
    close(jumped, paths.interpolate(x_0, eps, r))


def test_jump_by_the_mean_velocity_is_the_flow_map(pair: tuple[Tensor, Tensor]):
    x_t, r = pair[0], TIMES / 3
    close(paths.jump(x_t, GAUSSIAN.mean_velocity(x_t, TIMES, r), TIMES, r), GAUSSIAN.flow_map(x_t, TIMES, r))


def test_jump_takes_a_short_interval_in_float64():
    x = torch.zeros(1, 1, 1, 1)
    t, r = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.9 - 1e-7], dtype=torch.float64)
    jumped = paths.jump(x, torch.ones_like(x), t, r)
    assert jumped.dtype == torch.float32
    # In float32 the difference of the two times would be 5.96e-8 or 1.19e-7.
    assert jumped.item() == pytest.approx(-1e-7, rel=1e-6)


def test_expand_keeps_dtype_and_device_of_what_it_multiplies():
    like = torch.zeros(3, 2, 4, 4)
    expanded = paths.expand(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), like)
    assert expanded.shape == (3, 1, 1, 1)
    assert expanded.dtype == torch.float32
    assert paths.expand(0.5, like).shape == (1, 1, 1, 1)


def test_flatten_mean_is_a_mean_over_each_row():
    value = torch.arange(12.0).reshape(2, 1, 2, 3)
    assert paths.flatten_mean(value).tolist() == [2.5, 8.5]


def test_sigma_and_time():
    close(paths.sigma_of_t(torch.tensor([0.0, 0.5, 0.75], dtype=torch.float64)), torch.tensor([0.0, 1.0, 3.0]).double())
    assert paths.sigma_of_t(torch.ones(1)).isinf().all()
    close(paths.t_of_sigma(paths.sigma_of_t(TIMES)), TIMES)
    assert paths.t_of_sigma(torch.tensor([0.0, math.inf])).tolist() == [0.0, 1.0]
    close(paths.t_of_sigma(torch.tensor([80.0], dtype=torch.float64)), torch.tensor([80.0 / 81.0]).double(), rtol=1e-7)


def test_half_log_snr():
    close(paths.log_snr_half(TIMES), ((1 - TIMES) / TIMES).log(), rtol=1e-10)
    close(paths.log_snr_half(TIMES), -paths.sigma_of_t(TIMES).log(), rtol=1e-10)
    assert paths.log_snr_half(torch.tensor([0.0, 1.0])).tolist() == [math.inf, -math.inf]
    small = torch.tensor([1e-12], dtype=torch.float64)
    assert paths.log_snr_half(small).item() == pytest.approx(12 * math.log(10), rel=1e-13)


def vp(angle: Tensor) -> tuple[Tensor, Tensor]:
    """A variance-preserving path: ``alpha^2 + sigma^2 = 1``."""
    return angle.cos(), angle.sin()


PATHS = {"vp": vp(1.5 * TIMES), "ve": (torch.ones_like(TIMES), 80 * TIMES), "straight": (1 - TIMES, TIMES)}


@pytest.mark.parametrize("name", PATHS)
def test_gaussian_paths_there_and_back(pair: tuple[Tensor, Tensor], name: str):
    (x_0, eps), (alpha, sigma) = pair, PATHS[name]
    x = paths.expand(alpha, x_0) * x_0 + paths.expand(sigma, x_0) * eps
    point = paths.from_gaussian(x, alpha, sigma)
    close(point.x_t, paths.interpolate(x_0, eps, point.t))
    close(point.t / (1 - point.t), sigma / alpha, rtol=1e-10)  # the signal-to-noise ratio is kept
    close(paths.to_gaussian(point.x_t, alpha, sigma), x)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_from_a_noise_prediction(pair: tuple[Tensor, Tensor], name: str):
    (x_0, eps), (alpha, sigma) = pair, PATHS[name]
    x = paths.expand(alpha, x_0) * x_0 + paths.expand(sigma, x_0) * eps
    # x_0 is a difference of numbers near 80, divided by alpha down to 0.001 on the straight path.
    close(paths.velocity_from_eps(x, eps, alpha, sigma), eps - x_0, rtol=1e-9)


def test_velocity_from_ddpm_v_prediction(pair: tuple[Tensor, Tensor]):
    (x_0, eps), (alpha, sigma) = pair, PATHS["vp"]
    a, s = paths.expand(alpha, x_0), paths.expand(sigma, x_0)
    v = a * eps - s * x_0  # Salimans & Ho 2022, appendix D
    close(paths.velocity_from_v_prediction(a * x_0 + s * eps, v, alpha, sigma), eps - x_0)


def test_velocity_from_edm_denoiser_longhand(pair: tuple[Tensor, Tensor]):
    """EDM's ODE is ``dx/dsigma = (x - D) / sigma``; an Euler step of it is an Euler step of ours."""
    x_0, eps = pair
    sigma, next_sigma = paths.sigma_of_t(TIMES), paths.sigma_of_t(TIMES / 2)
    x = x_0 + paths.expand(sigma, x_0) * eps
    guess = 0.9 * x_0  # any denoiser
    x_next = x + paths.expand(next_sigma - sigma, x) * (x - guess) / paths.expand(sigma, x)
    ones = torch.ones_like(sigma)
    here, there = paths.from_gaussian(x, ones, sigma), paths.from_gaussian(x_next, ones, next_sigma)
    v = paths.velocity_to(here.x_t, guess, here.t)
    close(paths.jump(here.x_t, v, here.t, there.t), there.x_t, rtol=1e-10)
