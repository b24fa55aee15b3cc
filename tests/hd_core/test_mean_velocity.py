"""Mean velocity from stored trajectories: its formula, its pairs, and how far stored grids are from the exact flow."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.grid_bias import bias
from hd_core.objectives.mean_velocity import MeanVelocity, Pairs
from hd_core.weighting import adaptive
from tests.oracles import GAUSSIAN
from tests.toys import batch_of, cast_with, draws_of, exact_student, only_turn

START = [0, 0, 0, 0, 0, 7, 0, 3, 0, 0, 5, 0]
END = [12, 12, 12, 12, 12, 10, 12, 10, 12, 12, 7, 12]


class TestMeanVelocity:
    DRAWS = draws_of(slice(0, 64), 64)

    def test_the_exact_mean_velocity_costs_nothing(self):
        loss = only_turn(MeanVelocity(), cast_with(exact_student(GAUSSIAN)), batch_of(64), self.DRAWS)
        assert loss.total < 1e-26  # squared float64 rounding over an interval of at least 1/6

    def test_an_error_costs_its_square(self):
        loss = only_turn(MeanVelocity(), cast_with(exact_student(GAUSSIAN, 0.1)), batch_of(64), self.DRAWS)
        expected = torch.full((64,), 0.01, dtype=torch.float64)
        torch.testing.assert_close(loss.losses["mean_velocity"], expected, rtol=1e-10, atol=0)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x, t, r, c: -GAUSSIAN.mean_velocity(x, t, r),
            lambda x, t, r, c: GAUSSIAN.velocity(x, t),  # the instantaneous velocity
            lambda x, t, r, c: GAUSSIAN.mean_velocity(x, t, 0 * r - 1e-9),  # always down to the data
        ],
    )
    def test_other_velocities_cost(self, wrong: Callable[..., Tensor]):
        objective = MeanVelocity(full_share=0.0)
        assert only_turn(objective, cast_with(wrong), batch_of(64), self.DRAWS).total > 1e-3

    def test_pairs_descend_and_cover_every_interval_evenly(self):
        rows = 15_000
        start, end = MeanVelocity(full_share=0.0).positions(draws_of(slice(0, rows), rows), 6)
        assert bool((start < end).all())  # positions ascend where times descend
        counts = torch.zeros(6, 6).index_put((start, end), torch.ones(rows), accumulate=True)
        seen = counts[torch.triu(torch.ones(6, 6), 1).bool()]
        # 15 intervals with 1,000 expected draws each; five standard deviations.
        assert (seen - 1000).abs().max() < 5 * (rows / 15 * 14 / 15) ** 0.5

    def test_share_of_full_intervals(self):
        rows = 4000
        start, end = MeanVelocity(full_share=0.25).positions(draws_of(slice(0, rows), rows), 30)
        full = ((start == 0) & (end == 29)).double().mean().item()
        by_chance = 0.75 / (30 * 29 / 2)
        assert full == pytest.approx(0.25 + by_chance, abs=4 * (0.25 * 0.75 / rows) ** 0.5)
        start, end = MeanVelocity(full_share=1.0).positions(draws_of(slice(0, 9), 9), 30)
        assert start.tolist() == [0] * 9
        assert end.tolist() == [29] * 9

    def test_two_points_leave_one_interval(self):
        start, end = MeanVelocity(full_share=0.0).positions(draws_of(slice(0, 9), 9), 2)
        assert start.tolist() == [0] * 9
        assert end.tolist() == [1] * 9

    def test_adaptive_weight_is_not_differentiated(self):
        error = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
        weighted = adaptive(error, power=0.75, constant=0.1)
        weights = torch.tensor([0.6**-0.75, 2.1**-0.75], dtype=torch.float64)
        torch.testing.assert_close(weighted, weights * error, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(weighted.sum(), error)
        torch.testing.assert_close(gradient, weights, rtol=1e-12, atol=0)
        assert adaptive(error, power=0.0, constant=0.1) is error

    def test_the_adaptive_weight_is_applied(self):
        cast = cast_with(exact_student(GAUSSIAN, 0.1))
        terms = only_turn(MeanVelocity(power=0.75, constant=0.02), cast, batch_of(64), self.DRAWS)
        assert terms.total.item() == pytest.approx(0.01 * 0.03**-0.75, rel=1e-10)
        assert terms.metrics["squared_error"].item() == pytest.approx(0.01, rel=1e-10)

    @pytest.mark.parametrize(
        ("pairs", "expected"),
        [
            ("ends", {(0, 1), (0, 2), (0, 3), (0, 4)}),
            ("adjacent", {(0, 1), (1, 2), (2, 3), (3, 4)}),
            ("to_data", {(0, 4), (1, 4), (2, 4), (3, 4)}),
        ],
    )
    def test_other_ways_to_draw_pairs(self, pairs: Pairs, expected: set[tuple[int, int]]):
        rows = 4000
        drawn = MeanVelocity(pairs=pairs, full_share=0.0).positions(draws_of(slice(0, rows), rows), 5)
        seen = Counter(zip(*(part.tolist() for part in drawn), strict=True))
        assert set(seen) == expected
        assert all(abs(count - rows / 4) < 5 * (rows * 3 / 16) ** 0.5 for count in seen.values())
        assert MeanVelocity(pairs=pairs, full_share=0.0).positions(draws_of(slice(0, 1), 1), 2)[1].tolist() == [1]
        start, end = MeanVelocity(pairs=pairs, full_share=0.5).positions(draws_of(slice(0, rows), rows), 50)
        assert ((start == 0) & (end == 49)).double().mean().item() == pytest.approx(0.5, abs=0.05)
        terms = only_turn(MeanVelocity(pairs=pairs), cast_with(exact_student(GAUSSIAN)), batch_of(64), self.DRAWS)
        assert terms.total < 1e-26

    def test_uniform_pairs_are_the_ones_that_they_always_were(self):
        """A recipe with its seed names a result, so these numbers may not change."""
        start, end = MeanVelocity().positions(draws_of(slice(0, 12), 12), 13)
        assert start.tolist() == START
        assert end.tolist() == END

    @pytest.mark.parametrize("fields", [{"full_share": 1.1}, {"power": -1.0}, {"constant": 0.0}])
    def test_mistakes_are_named(self, fields: dict[str, float]):
        with pytest.raises(ValueError, match="given"):
            MeanVelocity(**fields)  # pyright: ignore[reportArgumentType]


# Bounds at 16, 32 and 64 intervals over all pairs and over the whole interval, some 1.2 times what was measured.
BOUNDS = {
    "euler": ([0.12, 0.06, 0.03], [0.15, 0.075, 0.038]),
    "heun": ([0.006, 0.0015, 0.0004], [0.003, 0.0008, 0.0002]),
    "dpmpp_2m": ([0.042, 0.0125, 0.0036], [0.013, 0.0052, 0.0021]),
    "dpmpp_3m": ([0.033, 0.0062, 0.0014], [0.017, 0.0027, 0.0006]),
}


class TestBiasOfAStoredGrid:
    """Root mean square error of the targets relative to the exact mean velocity of a mixture (benchmarks.grid_bias)."""

    @pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_3m", 2)])
    def test_it_falls_with_the_order_of_the_solver(self, solver: str, order: int):
        found = [bias(solver, n, rows=32, dtype=torch.float64, substeps=64) for n in (16, 32, 64)]
        for n, (pairs, full) in enumerate(zip(*BOUNDS[solver], strict=True)):
            assert found[n].pairs < pairs
            assert found[n].full < full
        for coarse, fine in zip(found, found[1:], strict=False):
            assert 0.85 * 2**order < coarse.pairs / fine.pairs < 1.6 * 2 ** (order + (solver == "dpmpp_3m"))

    def test_rounding_to_float16_grows_with_the_number_of_neighbours(self):
        """Half an ulp of a state near 1 is ``2^-12``, divided by an interval of 1/16 or 1/64."""
        found = {n: bias("heun", n, rows=32, dtype=torch.float16, substeps=64) for n in (16, 64)}
        assert found[16].adjacent < 0.01
        assert 2 * found[16].adjacent < found[64].adjacent < 0.025
        assert found[64].full < 0.001  # the whole interval divides by 1
