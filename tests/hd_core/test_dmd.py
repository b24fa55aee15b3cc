"""DMD against closed forms of Gaussian generators, and a generator of a few steps against longhand autograd."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hd_core.objectives.adversarial import Adversarial, Pull
from hd_core.objectives.dmd import DMD, clip_rows, finite_rows, linearised, matching_gradient, matching_loss
from hd_core.objectives.turns import Batch
from hd_core.step import OptimizerConfig, train_step
from hd_core.times import GridConfig
from hd_core.types import Condition
from tests.oracles import GAUSSIAN, GaussianFlow, no_condition, points
from tests.toys import (
    SHAPE,
    Follower,
    Generator,
    Linear,
    Made,
    Samples,
    batch_of,
    cast_of,
    cast_with,
    draws_of,
    exact_student,
    networks,
    noise_batch,
    play,
    state_of,
)


class TestOneStep:
    PLAIN = DMD(update_ratio=1, adversarial=Adversarial(weight=0.0))

    def test_generate_is_one_jump_from_noise(self):
        z = points(3, *SHAPE)
        torch.testing.assert_close(
            self.PLAIN.generate(Generator(0.4, 2.0), Batch(noise=z, condition=no_condition(3))),
            0.4 + 2.0 * z,
            rtol=1e-12,
            atol=1e-12,
        )

    @pytest.mark.parametrize("tau", [0.2, 0.5, 0.8])
    @pytest.mark.parametrize("student_mean", [-0.5, 1.6])
    def test_gradient_of_a_gaussian_student_in_closed_form(self, tau: float, student_mean: float):
        """Student ``N(a, s^2)`` against teacher ``N(m, q^2)``: what the student's mean is told.

        On this path ``E[D_fake - D_real] = (a - m) tau^2 / V`` with ``V = (1 - tau)^2 q^2 + tau^2``: the fake score has
        mean a, and the real one ``m + (1 - tau)^2 q^2 / V (a - m)``. DMD divides it by ``mean |x - D_real|``, and
        ``x - D_real`` is Gaussian too.
        """
        a, s, m, q = student_mean, 0.8, GAUSSIAN.mean, GAUSSIAN.std
        student = Generator(a, s)
        objective = DMD(update_ratio=1, tau_min=tau - 1e-6, tau_max=tau + 1e-6, adversarial=Adversarial(weight=0.0))
        cast = cast_with(student, fake_score=GaussianFlow(mean=a, std=s))
        *_, turn = objective.turns(cast, noise_batch(200, 1, 16, 16), draws_of(slice(0, 200), 200), 0)
        assert turn.player == "student"
        terms = turn.terms()
        (gradient,) = torch.autograd.grad(terms.total, student.mean)

        variance = (1 - tau) ** 2 * q**2 + tau**2
        gain = (1 - tau) * q**2 / variance  # of D_real in x_tau
        centre, spread = (a - m) * (1 - gain * (1 - tau)), math.hypot(s * (1 - gain * (1 - tau)), gain * tau)
        folded = spread * math.sqrt(2 / math.pi) * math.exp(-(centre**2) / (2 * spread**2))
        folded += centre * math.erf(centre / (spread * math.sqrt(2)))
        expected = (a - m) * tau**2 / variance / folded
        # 51,200 pixels: a standard error of 1/226 of a spread. The mean of a quotient is not the quotient of means,
        # which costs about 1/256 more.
        assert gradient.item() == pytest.approx(expected, rel=0.03)

    @pytest.mark.parametrize(
        "changes", [{}, {"weighting": "plain"}, {"tau_power": 3.0}, {"max_gradient": 0.1}, {"floor": 1.0}]
    )
    def test_equal_distributions_give_no_gradient(self, changes: dict[str, object]):
        student = Generator(GAUSSIAN.mean, GAUSSIAN.std)
        cast = cast_with(student, fake_score=GAUSSIAN)
        objective = replace(self.PLAIN, **changes)  # pyright: ignore[reportArgumentType]
        *_, turn = objective.turns(cast, noise_batch(20, *SHAPE), draws_of(slice(0, 20), 20), 0)
        (gradient,) = torch.autograd.grad(turn.terms().total, student.mean)
        assert gradient.item() == 0

    @pytest.mark.parametrize("power", [1.0, 3.0])
    @pytest.mark.parametrize("weighting", ["normalised", "plain"])
    @pytest.mark.parametrize("student", [(-0.5, 0.8), (1.6, 0.3)])
    def test_expected_gradient_over_times_and_noise(self, student: tuple[float, float], weighting: str, power: float):
        """The closed form at one time, averaged over the density of the times by a fine sum, for mean and spread.

        With gains ``k = (1 - tau) std^2 / V`` of either answer in ``x_tau``, the spread is told
        ``E[(D_fake - D_real) s z] = s^2 (1 - tau) (k_fake - k_real)``.
        """
        (a, s), m, q = student, GAUSSIAN.mean, GAUSSIAN.std
        tau = torch.linspace(0.02, 0.98, 4001, dtype=torch.float64)
        density = tau ** (power - 1) / (tau ** (power - 1)).sum()
        v_real, v_fake = (((1 - tau) * std) ** 2 + tau**2 for std in (q, s))
        k_real, k_fake = (1 - tau) * q**2 / v_real, (1 - tau) * s**2 / v_fake
        towards, wider = (a - m) * tau**2 / v_real, s**2 * (1 - tau) * (k_fake - k_real)
        if weighting == "normalised":
            centre, spread = (a - m) * (1 - k_real * (1 - tau)), torch.hypot(s * (1 - k_real * (1 - tau)), k_real * tau)
            folded = spread * math.sqrt(2 / math.pi) * (-(centre**2) / (2 * spread**2)).exp()
            folded = folded + centre * torch.erf(centre / (spread * math.sqrt(2)))
            towards, wider = towards / folded, wider / folded
        objective = replace(self.PLAIN, weighting=weighting, tau_power=power)
        generator, rows = Generator(a, s), 2000
        cast = cast_with(generator, fake_score=GaussianFlow(mean=a, std=s))
        *_, turn = objective.turns(cast, noise_batch(rows, 1, 16, 16), draws_of(slice(0, rows), rows), 0)
        loss = turn.terms().total
        ours = torch.autograd.grad(loss, [generator.mean, generator.log_std])
        # The drawn times leave a standard error of 1/45 of the spread of `towards` and `wider`; the quotient, 1/256.
        for found, expected in zip(ours, (towards, wider), strict=True):
            mean = (density * expected).sum()
            deviation = (density * (expected - mean).square()).sum().sqrt() / rows**0.5
            assert (found - mean).abs() < 4 * deviation + 0.02 * mean.abs()
            assert mean.abs() > 10 * deviation  # so the sign is told

    def test_matching_gradient_longhand(self):
        x, real, fake = (points(2, *SHAPE, seed=i) for i in range(3))
        for i in range(2):
            expected = (fake[i] - real[i]) / ((x[i] - real[i]).abs().sum() / 4)
            torch.testing.assert_close(matching_gradient(x, real, fake)[i], expected, rtol=1e-12, atol=0)
        assert torch.equal(matching_gradient(x, real, fake, weighting="plain"), fake - real)
        torch.testing.assert_close(matching_gradient(x, x, fake, floor=0.25), 4 * (fake - x), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_rows_that_are_not_finite_are_zeroed_and_counted(self, bad: float):
        gradient = points(4, *SHAPE)
        gradient[1, 0, 1, 1] = bad
        kept, share = finite_rows(gradient)
        assert torch.equal(kept[[0, 2, 3]], gradient[[0, 2, 3]])
        assert torch.equal(kept[1], torch.zeros(*SHAPE).double())
        assert share.item() == 0.25

    def test_a_teacher_that_fails_for_a_row_costs_that_row_only(self):
        def teacher(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return GAUSSIAN(x_t, t, condition).index_fill(0, torch.tensor([2]), math.nan)

        generator = Samples(points(5, *SHAPE))
        cast = cast_with(generator, teacher=teacher, fake_score=GaussianFlow(mean=0.0, std=1.0))  # pyright: ignore
        *_, turn = self.PLAIN.turns(cast, noise_batch(5, *SHAPE), draws_of(slice(0, 5), 5), 0)
        terms = turn.terms()
        terms.total.backward()
        assert generator.x.grad is not None
        assert generator.x.grad.flatten(1).abs().sum(1).sign().tolist() == [1, 1, 0, 1, 1]
        assert terms.metrics["non_finite_rows"].item() == pytest.approx(0.2)

    def test_clipping_longhand(self):
        gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64).reshape(2, 1, 1, 2)
        clipped = clip_rows(gradient, 0.5)
        factor = 0.5 / math.sqrt(12.5)
        torch.testing.assert_close(clipped[0], factor * gradient[0], rtol=1e-12, atol=0)
        assert torch.equal(clipped[1], gradient[1])
        assert clip_rows(gradient, 0.0) is gradient

    @pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
    def test_times_have_the_density_asked_for(self, power: float):
        """The distribution function ``(tau^p - low^p) / (high^p - low^p)`` of the drawn times is uniform."""
        objective = replace(self.PLAIN, tau_min=0.1, tau_max=0.9, tau_power=power)
        tau = objective.times(draws_of(slice(0, 4000), 4000), 0).double()
        assert tau.min() >= 0.1 - 1e-6 and tau.max() <= 0.9 + 1e-6
        level = ((tau**power - 0.1**power) / (0.9**power - 0.1**power)).sort().values
        # Kolmogorov and Smirnov: 1.95 over the root of the number, at a level of 1 in 1,000.
        assert (level - torch.linspace(0, 1, 4000, dtype=torch.float64)).abs().max() < 1.95 / 4000**0.5

    def test_times_go_over_to_uniform_by_a_cosine(self):
        draws = draws_of(slice(0, 50), 50)
        annealed = replace(self.PLAIN, tau_power=3.0, tau_anneal_steps=100)
        for step, power in ((0, 3.0), (25, 2 + math.sqrt(0.5)), (50, 2.0), (100, 1.0), (10**6, 1.0)):
            expected = replace(self.PLAIN, tau_power=power).times(draws, 0)
            torch.testing.assert_close(annealed.times(draws, step), expected, rtol=1e-6, atol=0)
        assert torch.equal(replace(annealed, tau_anneal_steps=0).times(draws, 70), annealed.times(draws, 0))

    def test_uniform_times_are_drawn_as_they_are(self):
        draws = draws_of(slice(0, 50), 50)
        assert torch.equal(self.PLAIN.times(draws, 0), draws.uniform("match/time", 0.02, 0.98))

    def test_matching_loss_has_the_given_gradient(self):
        x, gradient = points(3, *SHAPE).requires_grad_(), points(3, *SHAPE, seed=1)
        loss = matching_loss(x, gradient)
        torch.testing.assert_close(loss, 0.5 * gradient.square().mean((1, 2, 3)), rtol=1e-12, atol=0)
        (given,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(given, gradient / 4, rtol=1e-12, atol=1e-15)

    def test_a_fake_score_that_knows_a_constant_generator_costs_nothing(self):
        """Where every sample is 0.3 the flow matching target is ``(x_t - 0.3) / t`` without any noise."""

        def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            return x_t - 0.3

        def fake(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return (x_t - 0.3) / t.to(x_t).reshape(-1, 1, 1, 1)

        cast = cast_with(student, fake_score=fake)
        turn = next(self.PLAIN.turns(cast, noise_batch(40, *SHAPE), draws_of(slice(0, 40), 40), 0))
        assert turn.player == "fake_score"
        assert turn.terms().total < 1e-20  # squared rounding, divided by the square of t

    @pytest.mark.parametrize("weight", [0.0, 0.1])
    def test_the_generator_moves_every_kth_step(self, weight: float):
        objective = DMD(update_ratio=3, adversarial=Adversarial(weight=weight))
        made, others = networks(objective.players), list(objective.players[1:])
        for step in range(7):
            played = play(objective, made, batch_of(4), draws_of(slice(0, 4), 4), step)
            assert [player for player, *_ in played] == [*others, *(["student"] if step % 3 == 0 else [])]

    def test_a_toy_generator_becomes_the_teacher(self):
        student, fake = Generator(-0.5, 1.0), Follower(0.0, 1.0)
        objective = DMD(update_ratio=2, adversarial=Adversarial(weight=0.0))
        made: Made = {"student": student, "fake_score": fake}
        rates = OptimizerConfig(learning_rate=0.02, decay="cosine"), OptimizerConfig(learning_rate=0.05)
        state = state_of(made, *rates)
        for step in range(300):
            batch, draws = noise_batch(64, *SHAPE, seed=step), draws_of(slice(0, 64), 64, seed=step)
            train_step(state, objective, cast_of(made), batch, draws, progress=step / 300)
        # 150 moves of at most 0.02, the rate falling to 0; what is left is the fake score's lag.
        assert student.mean.item() == pytest.approx(GAUSSIAN.mean, abs=0.06)
        assert student.log_std.exp().item() == pytest.approx(GAUSSIAN.std, abs=0.06)

    @pytest.mark.parametrize(
        "fields",
        [
            {"update_ratio": 0},
            {"tau_min": 0.0},
            {"tau_max": 1.0},
            {"tau_min": 0.9, "tau_max": 0.1},
            {"tau_power": 0.0},
            {"tau_anneal_steps": -1},
            {"floor": 0.0},
            {"max_gradient": -1.0},
            {"regression_weight": -1.0},
            {"fake_time_min": 0.5, "fake_time_max": 0.5},
            {"intervals": 0},
            {"afs": True},
            {"gradient_steps": 2},
            {"intervals": 3, "afs": True, "gradient_steps": 3},
        ],
    )
    def test_mistakes_are_named(self, fields: dict[str, float]):
        with pytest.raises(ValueError, match="given"):
            DMD(**fields)  # pyright: ignore[reportArgumentType]

    def test_a_linearised_loss_has_the_given_value_and_gradient(self):
        x, pull = points(3, *SHAPE).requires_grad_(), Pull(points(3, seed=1), points(3, *SHAPE, seed=2))
        loss = linearised(x, pull)
        assert torch.equal(loss, pull.losses)
        assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], pull.gradient)

    @pytest.mark.parametrize("step", [0, 1])
    def test_one_walk_serves_all_turns(self, step: int):
        calls: list[bool] = []

        def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return 0.3 * x_t

        cast = cast_with(student, fake_score=GAUSSIAN)
        for turn in DMD(update_ratio=2, adversarial=Adversarial(weight=0.0)).turns(
            cast, noise_batch(3, *SHAPE), draws_of(slice(0, 3), 3), step
        ):
            turn.terms()
        assert calls == [step == 0]

    def test_the_fake_score_learns_at_the_times_asked_for(self):
        seen: list[Tensor] = []

        def fake(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            seen.append(t)
            return 0 * x_t

        objective = replace(self.PLAIN, fake_time_min=0.4, fake_time_max=0.6)
        cast = cast_with(Generator(0.0, 1.0), fake_score=fake)
        next(objective.turns(cast, noise_batch(500, *SHAPE), draws_of(slice(0, 500), 500), 1)).terms()
        assert 0.4 <= seen[0].min() < 0.41
        assert 0.59 < seen[0].max() <= 0.6


class TestRegression:
    OBJECTIVE = DMD(update_ratio=1, regression_weight=0.5, adversarial=Adversarial(weight=0.0))

    def loss(self, student: Callable[..., Tensor], **changes: object) -> Tensor:
        objective = replace(self.OBJECTIVE, **changes)  # pyright: ignore[reportArgumentType]
        cast = cast_with(student, fake_score=GAUSSIAN)
        batch = replace(batch_of(4), noise=points(4, *SHAPE, seed=7))  # it starts where the trajectory does
        *_, turn = objective.turns(cast, batch, draws_of(slice(0, 4), 4), 0)
        return turn.terms().losses["regression"]

    @pytest.mark.parametrize("intervals", [1, 3])
    def test_the_exact_flow_map_pays_nothing_and_an_error_its_weighted_square(self, intervals: int):
        assert self.loss(exact_student(GAUSSIAN), intervals=intervals).max() < 1e-24
        one_step = self.loss(exact_student(GAUSSIAN, 0.1))
        torch.testing.assert_close(one_step, torch.full((4,), 0.005, dtype=torch.float64), rtol=1e-9, atol=0)

    def test_at_the_optimum_nothing_moves(self):
        samples = Samples(batch_of(4).states[:, -1])  # pyright: ignore[reportOptionalSubscript]
        cast = cast_with(samples, fake_score=GAUSSIAN)
        *_, turn = self.OBJECTIVE.turns(cast, batch_of(4), draws_of(slice(0, 4), 4), 0)
        turn.terms().total.backward()
        assert samples.x.grad is not None
        assert samples.x.grad.abs().max() < 1e-15

    def test_it_needs_trajectories_with_its_own_ends(self):
        assert "trajectories" in self.OBJECTIVE.needs
        assert "trajectories" not in replace(self.OBJECTIVE, regression_weight=0.0).needs
        with pytest.raises(AssertionError, match="other ends"):
            self.loss(exact_student(GAUSSIAN), grid=GridConfig(t_min=0.01))


class TestFewSteps:
    OBJECTIVE = DMD(update_ratio=1, intervals=3, adversarial=Adversarial(weight=0.0))
    GRID = (1.0, 2 / 3, 1 / 3, 0.0)

    @pytest.mark.parametrize("gradient_steps", [0, 1, 2])
    def test_the_generators_gradient_longhand(self, gradient_steps: int):
        """The matching gradient over pixels and rows, pulled back through the last calls by hand."""
        student, batch, draws = Linear(), noise_batch(6, *SHAPE), draws_of(slice(0, 6), 6)
        fake = GaussianFlow(mean=-0.2, std=0.9)
        objective = replace(self.OBJECTIVE, gradient_steps=gradient_steps)
        *_, turn = objective.turns(cast_with(student, fake_score=fake), batch, draws, 0)
        ours = torch.autograd.grad(turn.terms().total, list(student.parameters()))

        x = batch.noise
        for n in range(3):
            t, r = (torch.full((6,), time, dtype=torch.float64) for time in self.GRID[n : n + 2])
            x = x.detach() if gradient_steps and n == 3 - gradient_steps else x
            x = x - student(x, t, r, batch.condition) / 3
        tau = draws.uniform("match/time", 0.02, 0.98)
        tau_ = tau.double().reshape(-1, 1, 1, 1)
        x_tau = (1 - tau_) * x.detach() + tau_ * draws.normal("match/noise", SHAPE).double()
        real = GAUSSIAN.denoised(x_tau, tau.double())
        gradient = (fake.denoised(x_tau, tau.double()) - real) / (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
        longhand = torch.autograd.grad(x, list(student.parameters()), gradient / 4 / 6)
        for mine, expected in zip(ours, longhand, strict=True):
            torch.testing.assert_close(mine, expected, rtol=2e-6, atol=1e-8)  # tau is float32

    def test_the_sampling_grid_is_the_one_given(self):
        grid = GridConfig(kind="polynomial", t_max=0.98)
        assert torch.equal(replace(self.OBJECTIVE, grid=grid).sampling_grid(), grid.times(3))
        assert self.OBJECTIVE.sampling_grid().tolist() == pytest.approx(self.GRID, abs=1e-15)
        assert DMD().sampling_grid().tolist() == [1.0, 0.0]
