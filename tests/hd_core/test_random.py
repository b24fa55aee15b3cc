"""Randomness is a function of a seed and a purpose, and of nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hd_core.random import Draws, fold_in, generator, permutation, sample_labels, sample_noise


def test_fold_in_never_changes():
    """Golden values: stored shards and published samples hang on them."""
    assert fold_in(0) == 3456079177858693020
    assert fold_in(0, "noise", 7) == 5494054086202030915
    assert fold_in(1, "noise", 7) == 5162263229743136126


def test_fold_in_tells_seeds_purposes_and_types_apart():
    seeds = [fold_in(0), fold_in(1), fold_in(0, 1), fold_in(0, "1"), fold_in(0, "a", "b"), fold_in(0, "ab")]
    seeds += [fold_in(0, "b", "a"), fold_in(0, 1, 23), fold_in(0, 12, 3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_for_one_purpose_are_equal_and_fresh():
    first = torch.randn(4, generator=generator(3, "x", 1))
    torch.testing.assert_close(torch.randn(4, generator=generator(3, "x", 1)), first, rtol=0, atol=0)
    assert not torch.equal(torch.randn(4, generator=generator(3, "x", 2)), first)


@given(ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=8, unique=True), cut=st.integers(0, 8))
def test_noise_and_labels_come_from_the_id_alone(ids: list[int], cut: int):
    noise, labels = sample_noise(5, ids, (2, 3, 4)), sample_labels(5, ids, 10)
    parts = [ids[:cut], ids[cut:]]
    assert torch.equal(torch.cat([sample_noise(5, part, (2, 3, 4)) for part in parts]), noise)
    assert torch.equal(torch.cat([sample_labels(5, part, 10) for part in parts]), labels)
    assert torch.equal(sample_noise(5, ids[::-1], (2, 3, 4)), noise.flip(0))
    assert torch.equal(sample_labels(5, ids[::-1], 10), labels.flip(0))


def test_noise_is_standard_normal_and_labels_are_uniform():
    noise = sample_noise(0, range(2000), (1, 4, 4)).double()
    # Standard errors over 32,000 numbers: mean 0.0056, variance sqrt(2 / 32000) = 0.0079; four of each.
    assert noise.mean().abs() < 0.023
    assert (noise.var() - 1).abs() < 0.032
    rows = noise.flatten(1)
    correlation = (rows[:-1] * rows[1:]).mean()  # neighbouring ids are independent
    assert correlation.abs() < 0.023
    counts = torch.bincount(sample_labels(0, range(2000), 5), minlength=5)
    assert (counts - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5  # four standard deviations


def test_noise_and_labels_change_with_the_seed():
    assert not torch.equal(sample_noise(0, [1], (4,)), sample_noise(1, [1], (4,)))
    assert not torch.equal(sample_labels(0, range(50), 10), sample_labels(1, range(50), 10))


def test_permutation():
    order = permutation(0, 100, "epoch", 1)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(order, permutation(0, 100, "epoch", 1))
    assert not torch.equal(order, permutation(0, 100, "epoch", 2))


@given(cuts=st.lists(st.integers(0, 12), max_size=4))
def test_rows_of_any_split_are_those_of_the_whole(cuts: list[int]):
    bounds = [0, *sorted(cuts), 12]
    whole = Draws(seed=9, rows=slice(None), total=12)
    parts = [Draws(seed=9, rows=slice(a, b), total=12) for a, b in zip(bounds, bounds[1:], strict=False)]
    for draw in (
        lambda d: d.normal("n", (2, 3)),
        lambda d: d.normal("n", ()),
        lambda d: d.uniform("u", 0.2, 0.7),
        lambda d: d.integers("i", 5),
    ):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole))


def test_draws_repeat_within_a_tag_and_differ_between_tags_and_steps():
    draws, later = (Draws(seed=seed, rows=slice(0, 4), total=4) for seed in (1, 2))
    assert torch.equal(draws.normal("a", (3,)), draws.normal("a", (3,)))
    assert not torch.equal(draws.normal("a", (3,)), draws.normal("b", (3,)))
    assert not torch.equal(draws.normal("a", (3,)), later.normal("a", (3,)))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.02, 0.98)])
def test_draws_cover_their_range(low: float, high: float):
    draws = Draws(seed=0, rows=slice(None), total=4000)
    uniform = draws.uniform("u", low, high)
    assert low <= uniform.min() < low + 0.01 * (high - low)  # missed with probability 0.99^4000 = 3e-18
    assert high - 0.01 * (high - low) < uniform.max() <= high
    integers = torch.bincount(draws.integers("i", 4))
    assert len(integers) == 4
    assert (integers - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5  # four standard deviations
