"""The toy of `examples.theory` in its quick form: it runs, and shows what it is there to show."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.theory.experiment import QUICK
from examples.theory.measures import measure, sliced_w2
from examples.theory.run import run
from examples.theory.target import SHAPE, RingOfRings, flow_ends, no_condition
from tests.oracles import MixtureFlow

TARGET = RingOfRings(dtype=torch.float64)


def test_the_target_has_the_velocity_of_its_mixture():
    """Against the oracle, which is written out differently; also at both ends of time."""
    means = tuple((x, y) for x, y in TARGET.means.tolist())
    oracle = MixtureFlow(means=means, stds=(TARGET.std,) * len(means), weights=(1 / len(means),) * len(means))
    x = torch.randn(40, *SHAPE, dtype=torch.float64)
    t = torch.linspace(0, 1, 40, dtype=torch.float64)
    found, expected = TARGET(x, t, no_condition(40)), oracle.velocity(x, t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_measures_tell_data_from_what_is_not():
    """Fresh data keeps everything; one cluster alone loses the others; a smear keeps clusters and loses modes."""
    target = RingOfRings()
    data, fresh = target.sample(20_000, seed=1), target.sample(20_000, seed=2)
    good = measure(fresh, target, data, fresh)
    assert good.fine_recall == good.coarse_recall == 1
    assert good.precision == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # within three std in the plane
    assert good.endpoint_rmse == 0
    smear = measure(fresh + 0.2 * torch.randn_like(fresh), target, data, fresh)
    assert smear.coarse_recall == 1
    assert smear.fine_recall < 0.1
    assert smear.endpoint_rmse == pytest.approx(0.2 * 2**0.5, rel=0.03)
    one = fresh[torch.cdist(fresh.flatten(1), target.means).argmin(1) < target.modes]
    alone = measure(one, target, data[: len(one)], data[: len(one)])
    assert alone.coarse_recall == 1 / 8
    assert alone.fine_recall == 1 / 8


def test_sliced_distance_of_a_shift():
    """All points moved by ``d``: along a direction at an angle the distance is ``d cos``, whose mean square is half."""
    points = torch.randn(500, 2)
    assert sliced_w2(points + torch.tensor([3.0, 0.0]), points) == pytest.approx(3 / 2**0.5, rel=1e-5)


def test_the_flow_ends_on_the_target():
    noise = torch.randn(2048, *SHAPE)
    ends, finer = flow_ends(RingOfRings(), noise), flow_ends(RingOfRings(), noise, 512)
    assert (ends - finer).square().flatten(1).sum(1).mean().sqrt() < 1e-3
    assert measure(ends, RingOfRings(), ends, ends).precision > 0.97


@pytest.mark.slow
def test_the_quick_form_shows_the_claims(tmp_path: Path):
    """The directions, not the numbers."""
    run(QUICK, tmp_path, quick=True)
    for name in ("capacity", "starts", "starts-curves", "pgd"):
        size = (tmp_path / f"theory-{name}.png").stat().st_size
        assert 5_000 < size < 150_000
    numbers: dict[str, Any] = json.loads((tmp_path / "theory.json").read_text())
    capacity = [one["mean"] for one in numbers["capacity"]]
    assert capacity[0]["fine_recall"] < capacity[-1]["fine_recall"]
    assert capacity[-1]["coarse_recall"] > 0.8 > capacity[-1]["fine_recall"]  # the fine modes go first
    for narrow, wide in zip(capacity, capacity[1:], strict=False):
        assert wide["endpoint_rmse"] < narrow["endpoint_rmse"]
        assert wide["sliced_w2"] < narrow["sliced_w2"]
        assert wide["precision"] > narrow["precision"]
    last = {start: numbers["starts"][start][-1]["sliced_w2"] for start in ("random", "velocity network", "sketch")}
    assert last["sketch"] < min(last["velocity network"], last["random"])
    halvings = numbers["orders"]["two broad modes"]["progressive distillation"]
    assert all(0.9 < order < 1.1 for order in halvings[2:])
    assert numbers["composed_halvings_minus_euler_chord"] < 1e-13
