"""Grids against the numbers of EDM and SFD, and their laws; pairs of times against their distributions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hd_core.paths import log_snr_half, sigma_of_t
from hd_core.random import Draws
from hd_core.times import GridConfig, GridKind, TimePairs, custom, nested_positions

EDM = GridConfig(kind="polynomial", t_max=80 / 81, t_min=0.006 / 1.006)

# (80^(1/7) + i/(n-1) (0.006^(1/7) - 80^(1/7)))^7, worked out with 30 digits; SFD prints the same to four places.
SIGMAS = {
    3: [80, 3.10712, 0.006],
    4: [80, 10.9293, 0.669886, 0.006],
    5: [80, 19.0034, 3.10712, 0.268292, 0.006],
    6: [80, 25.9633, 6.78769, 1.28913, 0.145405, 0.006],
    7: [80, 31.7298, 10.9293, 3.10712, 0.669886, 0.0936150, 0.006],
}


@pytest.mark.parametrize("count", SIGMAS)
def test_polynomial_grids_of_edm(count: int):
    sigmas = sigma_of_t(EDM.times(count - 1))
    torch.testing.assert_close(sigmas, torch.tensor(SIGMAS[count], dtype=torch.float64), rtol=5e-6, atol=0)


def test_the_teacher_grid_of_sfd():
    printed = [80, 51.157, 31.730, 19.003, 10.929, 5.994, 3.107, 1.505, 0.6699, 0.2683, 0.0936, 0.0271, 0.006]
    sigmas = sigma_of_t(EDM.times(12))
    torch.testing.assert_close(sigmas, torch.tensor(printed, dtype=torch.float64), rtol=2e-3, atol=5e-5)


def test_uniform_grid():
    assert GridConfig().times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_log_snr_grid_has_equal_steps_of_lambda():
    config = GridConfig(kind="log_snr", t_max=0.99, t_min=0.01)
    steps = log_snr_half(config.times(7)).diff()
    expected = torch.full((7,), 2 * torch.tensor(99.0, dtype=torch.float64).log().item() / 7, dtype=torch.float64)
    torch.testing.assert_close(steps, expected, rtol=1e-12, atol=0)


@st.composite
def configs(draw: st.DrawFn) -> GridConfig:
    kind: GridKind = draw(st.sampled_from(["uniform", "polynomial", "log_snr"]))
    t_max = draw(st.floats(0.05, 1.0 if kind == "uniform" else 0.9999))
    t_min = draw(st.floats(0.0 if kind != "log_snr" else 1e-6, 0.9)) * t_max
    assume(t_max - t_min > 1e-3 and (kind != "log_snr" or t_min > 0))
    return GridConfig(kind=kind, t_max=t_max, t_min=t_min, rho=draw(st.floats(1.0, 12.0)))


@given(config=configs(), intervals=st.integers(1, 40))
def test_grids_descend_strictly_between_their_exact_ends(config: GridConfig, intervals: int):
    times = config.times(intervals)
    assert times.dtype == torch.float64
    assert times.shape == (intervals + 1,)
    assert times[0].item() == config.t_max
    assert times[-1].item() == config.t_min
    assert bool((times.diff() < 0).all())


@given(config=configs(), coarse=st.integers(1, 8), factor=st.integers(1, 6))
def test_grids_nest(config: GridConfig, coarse: int, factor: int):
    fine = config.times(coarse * factor)[nested_positions(coarse * factor, coarse)]
    # The warps round differently by an ulp of sigma^(1/rho), times rho.
    torch.testing.assert_close(fine, config.times(coarse), rtol=1e-12, atol=1e-14)


def test_nested_positions():
    assert nested_positions(12, 3) == [0, 4, 8, 12]
    with pytest.raises(ValueError, match="a grid of 5 intervals does not nest in one of 12"):
        nested_positions(12, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t_max": 1.5}, r"0 <= t_min < t_max <= 1; given t_min=0.0, t_max=1.5"),
        ({"t_max": 0.2, "t_min": 0.2}, r"given t_min=0.2, t_max=0.2"),
        ({"t_min": -0.1}, r"given t_min=-0.1"),
        ({"t_min": float("nan")}, r"given t_min=nan"),
        ({"kind": "polynomial"}, r"a polynomial grid needs t_max below 1"),
        ({"kind": "log_snr", "t_min": 0.1}, r"a log_snr grid needs t_max below 1"),
        ({"kind": "log_snr", "t_max": 0.9}, r"a log_snr grid needs t_min above 0"),
        ({"rho": 0.0}, r"rho must be positive; given 0"),
    ],
)
def test_grid_mistakes_are_named(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        GridConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_a_grid_without_intervals_is_refused():
    with pytest.raises(ValueError, match="at least one interval; given 0"):
        GridConfig().times(0)


def test_custom_grid():
    assert custom([1.0, 0.3, 0.0]).tolist() == [1.0, 0.3, 0.0]
    assert custom([1.0, 0.3]).dtype == torch.float64


@pytest.mark.parametrize(
    "times", [[1.0], [], [1.0, 1.0], [0.2, 0.5], [1.1, 0.0], [1.0, -0.1], [1.0, float("nan"), 0.0]]
)
def test_custom_mistakes_are_named(times: list[float]):
    with pytest.raises(ValueError, match=r"descend strictly within \[0, 1\]"):
        custom(times)


ROWS = 20_000
DRAWS = Draws(seed=5, rows=slice(0, ROWS), total=ROWS)


def test_uniform_pairs():
    """The greater of two uniforms has the mean 2/3 and the smaller 1/3; both have the variance 1/18."""
    t, r = TimePairs(kind="uniform").draw(DRAWS)
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()
    error = 4 * (1 / 18 / ROWS) ** 0.5
    assert t.mean().item() == pytest.approx(2 / 3, abs=error)
    assert r.mean().item() == pytest.approx(1 / 3, abs=error)
    assert (t < 0.5).double().mean().item() == pytest.approx(0.25, abs=4 * (0.1875 / ROWS) ** 0.5)


def test_pairs_of_two_equal_logit_normals():
    """Of two normals the greater has the mean ``m + s / sqrt(pi)``; together they keep mean and variance."""
    t, r = (
        torch.logit(time.double()) for time in TimePairs(t_mean=-0.4, t_std=1.5, r_mean=-0.4, r_std=1.5).draw(DRAWS)
    )
    error = 4 * 1.5 / ROWS**0.5
    assert (r <= t).all()
    assert t.mean().item() == pytest.approx(-0.4 + 1.5 / math.sqrt(math.pi), abs=error)
    assert r.mean().item() == pytest.approx(-0.4 - 1.5 / math.sqrt(math.pi), abs=error)
    both = torch.cat([t, r])
    assert both.mean().item() == pytest.approx(-0.4, abs=error)
    assert both.std().item() == pytest.approx(1.5, abs=error)


def test_pairs_of_two_logit_normals_far_apart():
    """They then stand in order of themselves."""
    t, r = (
        torch.logit(time.double()) for time in TimePairs(t_mean=2.0, t_std=0.5, r_mean=-3.0, r_std=0.25).draw(DRAWS)
    )
    for drawn, mean, std in ((t, 2, 0.5), (r, -3, 0.25)):
        assert drawn.mean().item() == pytest.approx(mean, abs=4 * std / ROWS**0.5)
        assert drawn.std().item() == pytest.approx(std, abs=4 * std / (2 * ROWS) ** 0.5)


def test_pairs_are_each_rows_own():
    part = Draws(seed=5, rows=slice(100, 200), total=ROWS)
    for whole, half in zip(TimePairs().draw(DRAWS), TimePairs().draw(part), strict=True):
        assert torch.equal(whole[100:200], half)
        assert len(whole.unique()) > 0.99 * ROWS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t_mean": math.nan}, "must be finite; given nan and -0.4"),
        ({"r_mean": math.inf}, "must be finite; given -0.4 and inf"),
        ({"t_std": -1.0}, "must be finite and >= 0; given -1.0 and 1.0"),
        ({"r_std": math.nan}, "must be finite and >= 0; given 1.0 and nan"),
    ],
)
def test_mistaken_pairs_are_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TimePairs(**fields)
