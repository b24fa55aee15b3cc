"""Grids against the numbers of EDM and SFD, and their laws; pairs of times against their distributions."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hd_core.paths import log_snr_half, sigma_of_t
from hd_core.random import Draws
from hd_core.times import GridConfig, GridKind, TimePairs, custom, positions


def time_of(sigma: float) -> float:
    return sigma / (1 + sigma)


EDM = GridConfig(kind="polynomial", t_max=80 / 81, t_min=0.006 / 1.006)
SD_SIGMA_MAX = 14.614641229333630  # of Stable Diffusion's last training step
STABLE_DIFFUSION = GridConfig(kind="discrete", t_max=time_of(SD_SIGMA_MAX), t_min=time_of(0.1))
LSUN_LDM = GridConfig(kind="discrete", betas=(0.0015, 0.0195), t_max=time_of(83.822494473), t_min=time_of(0.006))
VP_SIGMA_MAX = math.sqrt(math.expm1(10.05))  # at s = 1

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


@pytest.mark.parametrize("intervals", [2, 3, 4, 5, 6, 12])
def test_polynomial_grids_longhand(intervals: int):
    high, low = 80 ** (1 / 7), 0.006 ** (1 / 7)
    sigmas = [(high + i / intervals * (low - high)) ** 7 for i in range(intervals + 1)]
    assert sigma_of_t(EDM.times(intervals)).tolist() == pytest.approx(sigmas, rel=1e-12)


def test_the_default_grid_is_exact_to_the_last_bit():
    for intervals in (*range(1, 60), 1000):
        fraction = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
        assert torch.equal(GridConfig().times(intervals), 1 + fraction * (0 - 1))


@pytest.mark.parametrize(
    ("config", "printed"),
    [
        (STABLE_DIFFUSION, [14.6146, 4.1316, 1.6438, 0.7155, 0.1]),
        (STABLE_DIFFUSION, [14.6146, 5.1409, 2.314, 1.1868, 0.5911, 0.1]),
        (STABLE_DIFFUSION, [14.6146, 5.9983, 2.9574, 1.6438, 0.9543, 0.5134, 0.1]),
        (LSUN_LDM, [83.822, 10.836, 2.763, 0.979, 0.006]),
    ],
)
def test_discrete_grids_of_latent_models(config: GridConfig, printed: list[float]):
    digits = 5e-4 if config is LSUN_LDM else 5e-5
    sigmas = sigma_of_t(config.times(len(printed) - 1)).tolist()
    assert sigmas == pytest.approx(printed, abs=digits, rel=0)


def longhand_log_alphas(first: float, last: float) -> list[float]:
    roots = [math.sqrt(first) + i / 999 * (math.sqrt(last) - math.sqrt(first)) for i in range(1000)]
    log_alphas, total = [], 0.0
    for root in roots:
        total += 0.5 * math.log1p(-root * root)
        log_alphas.append(total)
    return log_alphas


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, LSUN_LDM], ids=["sd", "lsun"])
def test_discrete_grid_longhand(config: GridConfig):
    """Every index is found in the table, one segment after another, and the indices stand in equal steps."""
    log_alphas, indices = longhand_log_alphas(*config.betas), []
    for sigma in sigma_of_t(config.times(8)).tolist():
        wanted, i = -0.5 * math.log1p(sigma**2), 0
        while i < 998 and log_alphas[i + 1] > wanted:
            i += 1
        indices.append((i + 1 + (wanted - log_alphas[i]) / (log_alphas[i + 1] - log_alphas[i])) / 1000)
    assert indices[0] == pytest.approx(1, abs=1e-9)
    steps = [high - low for high, low in zip(indices, indices[1:], strict=False)]
    assert steps == pytest.approx([(indices[0] - indices[-1]) / 8] * 8, rel=1e-9)


@pytest.mark.parametrize("rho", [1.0, 3.0])
@pytest.mark.parametrize(("high", "low"), [(VP_SIGMA_MAX, 0.01), (80.0, 0.006), (3.0, 0.0)])
def test_vp_time_grid_longhand(rho: float, high: float, low: float):
    config = GridConfig(kind="vp_time", rho=rho, t_max=time_of(high), t_min=time_of(low))
    ends = [(math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(sigma**2)) - 0.1) / 19.9 for sigma in (high, low)]
    start, end = (s ** (1 / rho) for s in ends)
    times = [(start + i / 6 * (end - start)) ** rho for i in range(7)]
    sigmas = [math.sqrt(math.expm1(19.9 * s * s / 2 + 0.1 * s)) for s in times]
    assert sigma_of_t(config.times(6)).tolist() == pytest.approx(sigmas, rel=1e-9, abs=1e-9)


def test_vp_time_reaches_its_noisiest_end():
    config = GridConfig(kind="vp_time", rho=1.0, t_max=time_of(VP_SIGMA_MAX), t_min=0.0)
    halfway = math.sqrt(math.expm1(19.9 / 8 + 0.1 / 2))
    assert sigma_of_t(config.times(2)).tolist() == pytest.approx([VP_SIGMA_MAX, halfway, 0], rel=1e-11)


@pytest.mark.parametrize(("kind", "reach"), [("vp_time", time_of(VP_SIGMA_MAX)), ("discrete", time_of(SD_SIGMA_MAX))])
def test_the_reach_that_an_error_names_is_accepted(kind: GridKind, reach: float):
    with pytest.raises(ValueError, match=rf"reaches up to t_max={reach:.9f}; given 0.9999"):
        GridConfig(kind=kind, t_max=0.9999)
    assert GridConfig(kind=kind, t_max=round(reach, 9)).times(1).tolist() == [round(reach, 9), 0.0]


def test_uniform_grid():
    assert GridConfig().times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_log_snr_grid_has_equal_steps_of_lambda():
    config = GridConfig(kind="log_snr", t_max=0.99, t_min=0.01)
    steps = log_snr_half(config.times(7)).diff()
    expected = torch.full((7,), 2 * torch.tensor(99.0, dtype=torch.float64).log().item() / 7, dtype=torch.float64)
    torch.testing.assert_close(steps, expected, rtol=1e-12, atol=0)


REACH: dict[GridKind, float] = {
    "uniform": 1.0, "polynomial": 0.9999, "log_snr": 0.9999, "vp_time": 0.9934, "discrete": 0.9359
}  # fmt: skip


@st.composite
def fields_of_grids(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(list(REACH)))
    t_max = draw(st.floats(0.05, REACH[kind]))
    t_min = draw(st.floats(0.0 if kind != "log_snr" else 1e-6, 0.9)) * t_max
    assume(t_max - t_min > 1e-3 and (kind != "log_snr" or t_min > 0))
    shares = draw(st.lists(st.integers(1, 19), max_size=3, unique=True))
    knots = tuple(t_min + share / 20 * (t_max - t_min) for share in sorted(shares, reverse=True))
    return {"kind": kind, "t_max": t_max, "t_min": t_min, "rho": draw(st.floats(1.0, 12.0)), "knots": knots}


@given(fields=fields_of_grids(), factor=st.integers(1, 15))
def test_grids_descend_strictly_between_their_exact_ends_and_through_their_knots(fields: dict[str, Any], factor: int):
    config = GridConfig(**fields)
    intervals = factor * (len(config.knots) + 1)
    times = config.times(intervals)
    assert times.dtype == torch.float64
    assert times.shape == (intervals + 1,)
    assert times[::factor].tolist() == [config.t_max, *config.knots, config.t_min]
    assert bool((times.diff() < 0).all())


@given(fields=fields_of_grids(), coarse=st.integers(1, 8), factor=st.integers(1, 6))
def test_grids_nest(fields: dict[str, Any], coarse: int, factor: int):
    config = GridConfig(**fields)
    coarse *= len(config.knots) + 1
    fine = config.times(coarse * factor)[::factor]
    # The warps round differently by an ulp of sigma^(1/rho), times rho.
    torch.testing.assert_close(fine, config.times(coarse), rtol=1e-12, atol=1e-14)


@given(fields=fields_of_grids(), knots=st.integers(1, 4), factor=st.integers(1, 5))
def test_knots_at_a_kinds_own_points_change_nothing(fields: dict[str, Any], knots: int, factor: int):
    plain = GridConfig(**{**fields, "knots": ()})
    own = tuple(plain.times(knots + 1)[1:-1].tolist())
    intervals = factor * (knots + 1)
    knotted = replace(plain, knots=own).times(intervals)
    torch.testing.assert_close(knotted, plain.times(intervals), rtol=0, atol=1e-12)


def test_knots_are_joined_as_the_kind_says():
    """Half-way in sigma^(1/2) between 9 and 4 and between 4 and 1; half-way in t."""
    config = GridConfig(kind="polynomial", rho=2.0, t_max=time_of(9), t_min=time_of(1), knots=(time_of(4),))
    assert sigma_of_t(config.times(4)).tolist() == pytest.approx([9, 6.25, 4, 2.25, 1], rel=1e-12)
    assert GridConfig(knots=(0.5, 0.25)).times(6).tolist() == [1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert GridConfig(knots=(0.3,)).times(2).tolist() == [1.0, 0.3, 0.0]


@pytest.mark.parametrize("intervals", [1, 2, 4, 8])
def test_intervals_that_knots_do_not_divide_are_refused(intervals: int):
    with pytest.raises(ValueError, match=rf"intervals must be a multiple of 3; given {intervals}"):
        GridConfig(knots=(0.5, 0.3)).times(intervals)


def test_positions():
    stored = EDM.times(12)
    assert positions(stored, EDM.times(3)) == [0, 4, 8, 12]
    assert positions(stored, stored[[0, 5, 12]] + 5e-10) == [0, 5, 12]
    with pytest.raises(ValueError, match=r"time 0.35 is not stored; the nearest stored time is 0.25"):
        positions(custom([1.0, 0.5, 0.25, 0.0]), custom([1.0, 0.35, 0.2, 0.0]))
    with pytest.raises(ValueError, match=r"time 0.500000002 is not stored; the nearest stored time is 0.5"):
        positions(custom([1.0, 0.5, 0.0]), custom([0.5 + 2e-9, 0.0]))
    with pytest.raises(ValueError, match="time nan is not stored"):
        positions(custom([1.0, 0.0]), torch.tensor([math.nan], dtype=torch.float64))


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
        ({"kind": "vp_time"}, r"a vp_time grid needs t_max below 1"),
        ({"kind": "discrete"}, r"a discrete grid needs t_max below 1"),
        ({"kind": "vp_time", "t_max": 0.994}, r"a vp_time grid reaches up to t_max=0.993471177; given 0.994"),
        ({"kind": "discrete", "t_max": 0.94}, r"a discrete grid reaches up to t_max=0.935957542; given 0.94"),
        ({"rho": 0.0}, r"rho must be positive and finite; given 0"),
        ({"rho": float("inf")}, r"rho must be positive and finite; given inf"),
        ({"betas": (0.0, 0.1)}, r"0 < first <= last < 1; given \[0.0, 0.1\]"),
        ({"betas": (0.2, 0.1)}, r"0 < first <= last < 1; given \[0.2, 0.1\]"),
        ({"betas": (0.2, 1.0)}, r"0 < first <= last < 1; given \[0.2, 1.0\]"),
        ({"knots": (1.0,)}, r"descend strictly between t_max=1.0 and t_min=0.0; given \[1.0\]"),
        ({"knots": (0.3, 0.5)}, r"given \[0.3, 0.5\]"),
        ({"knots": (0.5, 0.5)}, r"given \[0.5, 0.5\]"),
        ({"knots": (0.1,), "t_min": 0.1}, r"t_min=0.1; given \[0.1\]"),
        ({"knots": (float("nan"),)}, r"given \[nan\]"),
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
