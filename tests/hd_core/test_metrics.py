"""Metrics against closed forms, then longhand loops, then clean-fid."""

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float64

from hd_core.metrics.clip_score import clip_score
from hd_core.metrics.estimate import Estimate
from hd_core.metrics.frechet import frechet_distance, frechet_estimate, influences
from hd_core.metrics.inception_score import inception_score
from hd_core.metrics.kernel import kernel_distance
from hd_core.metrics.prdc import PrecisionRecall, precision_recall
from hd_core.metrics.statistics import Moments, merge_in_order
from pipelines.torchvision_ops import declare_missing_operators

Rows = Float64[np.ndarray, "n d"]


def normal(seed: int, rows: int, width: int) -> Rows:
    return np.random.default_rng(seed).standard_normal((rows, width))


def moments_with(mean: Float64[np.ndarray, " d"], covariance: Float64[np.ndarray, "d d"], count: int = 11) -> Moments:
    return Moments(count, mean, covariance * (count - 1))


def rotation(seed: int, width: int) -> Float64[np.ndarray, "d d"]:
    return np.linalg.qr(normal(seed, width, width))[0]


class TestMoments:
    def test_three_points_by_hand(self):
        moments = Moments.of(np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 6.0]]))
        assert moments.count == 3
        np.testing.assert_allclose(moments.mean, [2.0, 2.0], rtol=1e-15)
        np.testing.assert_allclose(moments.covariance, [[4.0, 6.0], [6.0, 12.0]], rtol=1e-14)

    @given(
        cuts=st.lists(st.integers(0, 60), max_size=8), seed=st.integers(0, 2**16), offset=st.sampled_from([0.0, 1e4])
    )
    def test_any_partition_gives_the_covariance_of_the_whole(self, cuts: list[int], seed: int, offset: float):
        rows = normal(seed, 60, 3) * [1.0, 3.0, 0.1] + offset
        parts = np.split(rows, sorted(cuts))
        merged = merge_in_order([Moments.empty(3), *(Moments.of(part) for part in parts)])
        assert merged.count == 60
        np.testing.assert_allclose(merged.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-11)

    def test_the_order_of_the_two_sides_only_rounds(self):
        a, b = Moments.of(normal(0, 7, 4)), Moments.of(normal(1, 31, 4) + 5.0)
        np.testing.assert_allclose(a.merged(b).scatter, b.merged(a).scatter, rtol=1e-12)
        np.testing.assert_allclose(a.merged(b).mean, b.merged(a).mean, rtol=1e-12)

    def test_merging_nothing_changes_no_bit(self):
        moments = Moments.of(normal(0, 9, 4))
        for same in (moments.merged(Moments.empty(4)), Moments.empty(4).merged(moments)):
            assert same.count == moments.count
            assert np.array_equal(same.mean, moments.mean)
            assert np.array_equal(same.scatter, moments.scatter)

    def test_float32_features_are_summed_in_float64(self):
        rows = np.float32(1e4) + normal(0, 5000, 2).astype(np.float32)
        expected = np.cov(rows.astype(np.float64), rowvar=False)
        for features in (rows, torch.tensor(rows)):
            moments = Moments.of(features)
            assert moments.mean.dtype == moments.scatter.dtype == np.float64
            np.testing.assert_allclose(moments.covariance, expected, rtol=1e-9, atol=1e-12)

    def test_read_only_arrays_are_taken_without_a_warning(self):
        rows = normal(0, 5, 2)
        rows.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Moments.of(rows).count == 5

    def test_mistakes_are_explained(self):
        for count in (0, 1):
            with pytest.raises(ValueError, match=f"at least 2 feature rows, got {count}"):
                _ = Moments.of(np.zeros((count, 3))).covariance
        with pytest.raises(ValueError, match="width 3 and of width 4"):
            Moments.empty(3).merged(Moments.empty(4))
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match="1 of 2 feature rows hold a NaN or an infinity"):
                Moments.of(np.array([[0.0, value], [1.0, 2.0]]))
        with pytest.raises(ValueError, match=r"shape \(3,\)"):
            Moments.of(torch.zeros(3))
        with pytest.raises(ValueError, match="no moments"):
            merge_in_order([])
        with pytest.raises(ValueError, match=r"must be \(d,\) and \(d, d\)"):
            Moments(2, np.zeros(3), np.zeros((3, 2)))


class TestFrechet:
    def test_commuting_covariances(self):
        """Shared eigenvectors: the distance is ``|m_a - m_b|^2 + sum (sqrt(l_a) - sqrt(l_b))^2``."""
        axes, shift = rotation(0, 4), np.array([1.0, -2.0, 0.5, 0.0])
        variances_a, variances_b = np.array([4.0, 1.0, 0.25, 9.0]), np.array([1.0, 1.0, 4.0, 0.0])
        a = moments_with(shift, axes * variances_a @ axes.T)
        b = moments_with(np.zeros(4), axes * variances_b @ axes.T, count=23)
        expected = 5.25 + (1.0 + 0.0 + 2.25 + 9.0)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)

    def test_two_by_two_covariances_that_do_not_commute(self):
        """For 2 by 2 matrices ``tr sqrt(ab) = sqrt(tr(ab) + 2 sqrt(det(ab)))``."""
        a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
        root = np.sqrt(np.trace(a @ b) + 2.0 * np.sqrt(np.linalg.det(a @ b)))
        assert not np.allclose(a @ b, b @ a)
        distance = frechet_distance(moments_with(np.zeros(2), a), moments_with(np.ones(2), b))
        assert distance == pytest.approx(2.0 + 5.0 + 6.0 - 2.0 * root, rel=1e-12)

    def test_the_distance_of_a_gaussian_to_its_linear_image(self):
        """``y = M x`` with symmetric positive ``M`` is the optimal map: the distance is ``tr((I - M) S (I - M))``."""
        axes = rotation(1, 6)
        stretch = axes * np.linspace(0.2, 3.0, 6) @ axes.T
        samples = normal(2, 40, 6) @ normal(3, 6, 6)
        moments = Moments.of(samples)
        residual = np.eye(6) - stretch
        expected = np.trace(residual @ moments.covariance @ residual) + np.sum((residual @ moments.mean) ** 2)
        assert frechet_distance(moments, Moments.of(samples @ stretch)) == pytest.approx(expected, rel=1e-11)

    def test_many_samples_of_two_known_gaussians_approach_the_closed_form(self):
        a, b = normal(0, 200_000, 2) * [1.0, 3.0], normal(1, 200_000, 2) * [2.0, 1.0] + [0.0, 1.0]
        assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(1.0 + 1.0 + 4.0, rel=0.02)

    @pytest.mark.parametrize(("rows", "width"), [(300, 8), (10, 64), (2, 16)])
    def test_identical_inputs_are_at_zero(self, rows: int, width: int):
        """Also with fewer rows than features, and variances over twelve decades."""
        moments = Moments.of(100.0 * normal(0, rows, width) * np.logspace(0, -6, width) @ rotation(1, width))
        trace = float(np.trace(moments.covariance))
        assert abs(frechet_distance(moments, moments)) < 1e-13 * trace

    def test_singular_covariances_are_exact(self):
        """Fewer rows than features: against the nuclear norm of ``X_a X_b^T``, which is the trace needed."""
        x, y = normal(0, 9, 40), normal(1, 12, 40) * 1.5 + 0.3
        a, b = Moments.of(x), Moments.of(y)
        centred = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(8.0 * 11.0)
        root = np.linalg.svd(centred, compute_uv=False).sum()
        shift = float(np.sum((x.mean(0) - y.mean(0)) ** 2))
        expected = shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * root
        assert a.factor.shape == (40, 8)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)

    def test_constant_features_leave_the_distance_of_the_means(self):
        a, b = Moments.of(np.zeros((4, 3))), Moments.of(np.full((5, 3), 2.0))
        assert frechet_distance(a, b) == pytest.approx(12.0, rel=1e-15)
        assert frechet_distance(a, a) == 0.0

    def test_mistakes_are_explained(self):
        with pytest.raises(ValueError, match="width 3 and of width 4"):
            frechet_distance(Moments.of(normal(0, 5, 3)), Moments.of(normal(0, 5, 4)))
        with pytest.raises(ValueError, match="got 1"):
            frechet_distance(Moments.of(normal(0, 5, 3)), Moments.of(normal(0, 1, 3)))


def kernel_distance_longhand(x: Rows, y: Rows) -> float:
    def kernel(a: Float64[np.ndarray, " d"], b: Float64[np.ndarray, " d"]) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return xx + yy - 2.0 * xy


class TestKernel:
    @pytest.mark.parametrize("block_rows", [1, 4, 7, 512])
    def test_longhand(self, block_rows: int):
        x, y = normal(0, 13, 5), 1.3 * normal(1, 21, 5) + 0.4
        expected = kernel_distance_longhand(x, y)
        assert kernel_distance(x, y, block_rows=block_rows).value == pytest.approx(expected, rel=1e-12)
        assert kernel_distance(y, x, block_rows=block_rows).value == pytest.approx(expected, rel=1e-12)

    def test_point_masses(self):
        """One dimension, all of ``x`` at 1 and of ``y`` at 2: ``2^3 + 5^3 - 2 * 3^3``."""
        assert kernel_distance(np.ones((3, 1)), np.full((5, 1), 2.0)).value == pytest.approx(
            8.0 + 125.0 - 54.0, rel=1e-14
        )

    def test_a_shift_in_one_dimension_has_the_closed_form(self):
        """Moments of a Gaussian: the kernel expands to ``sum_p C(3, p) (E x^p - E y^p)^2`` in one dimension."""
        x, y = normal(0, 3000, 1), normal(1, 3000, 1) + 1.0
        expected = 3 * (1.0) ** 2 + 3 * (2.0 - 1.0) ** 2 + (4.0 - 0.0) ** 2
        assert kernel_distance(x, y).value == pytest.approx(expected, rel=0.15)

    def test_unbiased_under_the_null(self):
        """The mean over 400 small draws is within four standard errors of zero, and draws fall on both sides.

        The biased estimate would be off by about ``2 (E k(x, x) - E k(x, y)) / n``: many standard errors.
        """
        draws = [kernel_distance(normal(2 * seed, 12, 4), normal(2 * seed + 1, 12, 4)).value for seed in range(400)]
        error = float(np.std(draws, ddof=1)) / np.sqrt(len(draws))
        assert abs(float(np.mean(draws))) < 4.0 * error
        assert error < 0.05
        assert 0.2 < float(np.mean(np.array(draws) < 0.0)) < 0.8

    def test_float32_tensors_are_computed_in_float64(self):
        x, y = (torch.tensor(normal(seed, 50, 6)).float() for seed in (0, 1))
        assert kernel_distance(x, y) == kernel_distance(x.double(), y.double())

    def test_mistakes_are_explained(self):
        with pytest.raises(ValueError, match="got 1 real and 5 generated"):
            kernel_distance(normal(0, 1, 3), normal(0, 5, 3))
        with pytest.raises(ValueError, match="width 3 and of width 4"):
            kernel_distance(normal(0, 5, 3), normal(0, 5, 4))
        with pytest.raises(ValueError, match="NaN"):
            kernel_distance(normal(0, 5, 3), np.full((5, 3), np.nan))


def precision_recall_longhand(x: Rows, y: Rows, neighbours: int) -> list[float]:
    def squared(a: Float64[np.ndarray, " d"], b: Float64[np.ndarray, " d"]) -> float:
        return float(np.sum((a - b) ** 2))

    def radii(rows: Rows) -> list[float]:
        others = [[squared(a, b) for j, b in enumerate(rows) if j != i] for i, a in enumerate(rows)]
        return [sorted(distances)[neighbours - 1] for distances in others]

    around_x = [[squared(a, b) <= radius for b in y] for a, radius in zip(x, radii(x), strict=True)]
    around_y = [[squared(a, b) <= radius for b in x] for a, radius in zip(y, radii(y), strict=True)]
    return [
        sum(any(ball[j] for ball in around_x) for j in range(len(y))) / len(y),
        sum(any(ball[i] for ball in around_y) for i in range(len(x))) / len(x),
        sum(map(sum, around_x)) / (neighbours * len(y)),
        sum(map(any, around_x)) / len(x),
    ]


def values(result: PrecisionRecall) -> list[float]:
    found = [result.precision, result.recall, result.density, result.coverage]
    assert all(one.low <= one.value <= one.high for one in found)
    return [one.value for one in found]


class TestPrecisionRecall:
    @pytest.mark.parametrize("block_rows", [1, 8, 512])
    @pytest.mark.parametrize("neighbours", [1, 3, 5])
    def test_longhand(self, neighbours: int, block_rows: int):
        x, y = normal(0, 30, 3), 0.8 * normal(1, 41, 3) + [0.7, 0.0, 0.0]
        expected = precision_recall_longhand(x, y, neighbours)
        result = precision_recall(x, y, neighbours=neighbours, block_rows=block_rows)
        assert values(result) == pytest.approx(expected, rel=1e-14)
        assert len({*expected}) == 4

    def test_points_on_a_line_by_hand(self):
        """Real 0, 1, 3 have radii 1, 1, 2; generated 4, 6, 20 have radii 2, 2, 14; surfaces count as inside."""
        result = precision_recall(np.array([[0.0], [1.0], [3.0]]), np.array([[4.0], [6.0], [20.0]]), neighbours=1)
        assert values(result) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3])

    @pytest.mark.parametrize("block_rows", [1, 5, 512])
    def test_copies_tie_as_they_do_in_exact_arithmetic(self, block_rows: int):
        """The products of different blocks round differently; copies of a point must not see it."""
        points = normal(0, 50, 16)
        x, y = np.repeat(points, 3, axis=0), np.concatenate([points[:25], points[:25], points[:12] + 0.1])
        for neighbours in (1, 3):
            expected = precision_recall_longhand(x, y, neighbours)
            assert values(precision_recall(x, y, neighbours=neighbours, block_rows=block_rows)) == expected

    def test_far_from_the_origin_nothing_changes(self):
        """There ``|x|^2 + |y|^2 - 2 x.y`` would lose the distances to rounding."""
        x, y = normal(0, 30, 3), 0.8 * normal(1, 41, 3) + 0.4
        near, far = precision_recall(x, y), precision_recall(x + 1e7, y + 1e7)
        assert values(far) == values(near)

    def test_one_set_against_itself(self):
        x = normal(0, 50, 4)
        result = precision_recall(x, x, neighbours=3)
        assert values(result)[:2] == [1.0, 1.0] and result.coverage.value == 1.0
        assert result.density.value == pytest.approx((3 + 1) / 3)

    def test_a_dropped_mode_lowers_recall_and_coverage_only(self):
        x = np.concatenate([normal(0, 200, 2), normal(1, 200, 2) + 50.0])
        y = normal(2, 400, 2)
        result = precision_recall(x, y)
        assert result.precision.value > 0.9
        assert 0.4 < result.recall.value <= 0.5
        assert 0.4 < result.coverage.value <= 0.5
        assert result.density.value == pytest.approx(1.0, abs=0.3)

    def test_noise_lowers_precision_and_density_only(self):
        x = normal(0, 400, 2)
        y = np.concatenate([normal(1, 300, 2), normal(2, 100, 2) + 1e3 * np.arange(1, 101)[:, None]])
        result = precision_recall(x, y)
        assert 0.65 < result.precision.value <= 0.75
        assert result.recall.value > 0.9
        assert result.coverage.value > 0.9
        assert result.density.value == pytest.approx(0.75, abs=0.2)

    def test_disjoint_sets(self):
        assert values(precision_recall(normal(0, 20, 3), normal(1, 30, 3) + 100.0)) == [0.0] * 4

    def test_mistakes_are_explained(self):
        for neighbours in (0, 5):
            with pytest.raises(ValueError, match=f"neighbours is {neighbours}; with 9 real and 5 generated rows"):
                precision_recall(normal(0, 9, 3), normal(1, 5, 3), neighbours=neighbours)
        with pytest.raises(ValueError, match="width 3 and of width 4"):
            precision_recall(normal(0, 9, 3), normal(0, 9, 4))


class TestInceptionScore:
    def test_longhand(self):
        logits = 2.0 * normal(0, 40, 5)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        divergences = [sum(q * np.log(q / m) for q, m in zip(row, p.mean(0), strict=True)) for row in p]
        assert inception_score(logits).value == pytest.approx(np.exp(np.mean(divergences)), rel=1e-12)

    def test_its_bounds_are_one_and_the_number_of_classes(self):
        same, each = np.zeros((12, 4)), 50.0 * np.eye(4).repeat(3, axis=0)
        assert inception_score(same).value == pytest.approx(1.0) and inception_score(each).value == pytest.approx(4.0)

    def test_one_row_has_no_score(self):
        with pytest.raises(ValueError, match="at least 2 rows, got 1"):
            inception_score(np.zeros((1, 4)))


class TestClipScore:
    def test_longhand(self):
        cosines = np.array([0.3, -0.2, 0.25, 0.0])
        found = clip_score(cosines)
        assert found.value == pytest.approx(100 * (0.3 + 0.25) / 4, rel=1e-12)
        scores = np.array([30.0, 0.0, 25.0, 0.0])
        half = 1.959963984540054 * (np.square(scores - scores.mean()).sum() / 3 / 4) ** 0.5
        assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-12)

    def test_what_has_no_score(self):
        for cosines in (np.array([0.3]), np.array([0.3, np.nan])):
            with pytest.raises(ValueError, match="at least 2 cosines, all finite"):
                clip_score(cosines)


REFERENCE = normal(0, 400, 4) @ rotation(1, 4) * [1.0, 2.0, 0.5, 1.0]


def drawn(seed: int, rows: int = 300) -> Rows:
    """What a generator makes that is off in mean, scale and shape."""
    rows_of = normal(100 + seed, rows, 4)
    return 1.3 * rows_of + 0.2 * rows_of**2 + [0.5, 0.0, -0.2, 0.0]


ESTIMATES: dict[str, Callable[[int], Estimate]] = {
    "frechet": lambda seed: frechet_estimate(drawn(seed), Moments.of(REFERENCE)),
    "kernel": lambda seed: kernel_distance(REFERENCE, drawn(seed)),
    "inception score": lambda seed: inception_score(drawn(seed)),
    "clip score": lambda seed: clip_score(0.2 * np.random.default_rng(seed).standard_normal(200) + 0.1),
    "precision": lambda seed: precision_recall(REFERENCE, drawn(seed)).precision,
    "density": lambda seed: precision_recall(REFERENCE, drawn(seed)).density,
    "recall": lambda seed: precision_recall(REFERENCE, drawn(seed)).recall,
    "coverage": lambda seed: precision_recall(REFERENCE, drawn(seed)).coverage,
}


class TestEstimates:
    @pytest.mark.parametrize("name", ESTIMATES)
    def test_an_interval_holds_the_mean_over_draws_as_often_as_it_says(self, name: str):
        """Of 300 intervals of level 0.95 between 0.90 and 0.99 hold it, which is four deviations to either side."""
        found = [ESTIMATES[name](seed) for seed in range(300)]
        mean = np.mean([one.value for one in found])
        held = np.mean([one.low <= mean <= one.high for one in found])
        assert 0.90 < held < 0.99

    def test_influences_are_the_derivative_in_the_weight_of_a_row(self):
        rows, reference = drawn(0, 60), Moments.of(REFERENCE)
        moments = Moments.of(rows)
        mean, covariance = moments.mean, moments.covariance

        def weighted(row: Float64[np.ndarray, " d"], weight: float) -> float:
            z = row - mean
            mixed = (1 - weight) * covariance + weight * (1 - weight) * np.outer(z, z)
            return frechet_distance(moments_with(mean + weight * z, mixed), reference)

        slopes = np.array([(weighted(row, 1e-5) - weighted(row, -1e-5)) / 2e-5 for row in rows[:8]])
        _, roots, right = np.linalg.svd(moments.factor.T @ reference.factor)
        found = influences(rows, moments, reference, right.T / np.sqrt(roots))[:8]
        assert np.diff(found) == pytest.approx(np.diff(slopes), rel=1e-5)

    def test_its_value_is_the_distance_with_more_and_with_fewer_rows_than_features(self):
        for rows in (5, 50):
            x, reference = normal(0, rows, 12), Moments.of(1.2 * normal(1, 80, 12))
            found = frechet_estimate(x, reference)
            assert found.value == pytest.approx(frechet_distance(Moments.of(x), reference), rel=1e-12)
            assert found.low < found.value < found.high

    def test_directions_that_only_one_side_has_count_in_the_interval(self):
        """Rows that move where the reference does not: the transport leaves them out, the rest of the effect stays."""
        x, y = normal(0, 60, 3) @ rotation(2, 3), normal(1, 80, 3) @ rotation(2, 3)
        basis = rotation(2, 3)
        x, y = x - np.outer(x @ basis[1], basis[1]), y - np.outer(y @ basis[0], basis[0])
        found = frechet_estimate(x, Moments.of(y))
        z = x - x.mean(0)
        effects = 2 * z @ (x.mean(0) - y.mean(0)) + np.sum(z**2, axis=1)
        ours, theirs = z @ basis[2], (y - y.mean(0)) @ basis[2]
        effects -= ours**2 * theirs.std(ddof=1) / ours.std(ddof=1)
        assert (found.high - found.low) / (2 * 1.959964) == pytest.approx(effects.std(ddof=1) / 60**0.5, rel=0.02)
        one, other = np.outer(normal(0, 9, 1)[:, 0], basis[0]), np.outer(normal(1, 9, 1)[:, 0], basis[1])
        apart = frechet_estimate(one, Moments.of(other))
        assert apart.low < apart.value < apart.high < 10

    def test_a_share_of_all_or_none_has_an_interval_too(self):
        assert Estimate.share(0, 50).low == 0.0 and 0.05 < Estimate.share(0, 50).high < 0.1
        assert Estimate.share(50, 50).high == 1.0 and 0.9 < Estimate.share(50, 50).low < 0.95


@pytest.fixture
def clean_fid() -> ModuleType:
    """clean-fid, also where a CUDA build of torchvision meets a torch without CUDA."""
    declare_missing_operators()
    return importlib.import_module("cleanfid.fid")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestCleanFid:
    def test_frechet_distance(self, clean_fid: ModuleType):
        x, y = normal(0, 200, 16), normal(1, 150, 16) @ normal(2, 16, 16) + 0.5
        expected = clean_fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
        assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(float(expected), rel=1e-9)

    def test_kernel_distance_over_the_whole_sets(self, clean_fid: ModuleType):
        """One subset as large as the sets: its drawing is a permutation and its estimate ours."""
        x, y = normal(0, 80, 16), 1.2 * normal(1, 80, 16) + 0.5
        expected = clean_fid.kernel_distance(x, y, num_subsets=1, max_subset_size=80)
        assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-10)
