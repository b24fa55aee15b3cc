"""One conformance suite for every objective, then each against its oracle and its formulas longhand."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.objectives.adversarial import Adversarial, accuracy, token_entropy
from hd_core.objectives.dmd import DMD, generate, matching_gradient, matching_loss
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.sfd import SFD, Distance, afs_velocity, distance
from hd_core.objectives.turns import Batch, Cast, Objective, PlayerName, Terms
from hd_core.paths import jump
from hd_core.random import Draws
from hd_core.step import OptimizerConfig, only, train_step
from hd_core.times import GridConfig
from hd_core.types import Condition, Judgement
from tests.oracles import GAUSSIAN, GaussianFlow, no_condition, points
from tests.toys import GRID, SHAPE, batch_of, cast_of, networks, rows_of, sample, state_of

OBJECTIVES: dict[str, Objective] = {
    "mean_velocity": MeanVelocity(),
    "mean_velocity, adaptive": MeanVelocity(power=1.0),
    "sfd": SFD(intervals=3),
    "sfd, afs": SFD(intervals=3, afs=True),
    "sfd, huber": SFD(intervals=2, distance="pseudo_huber"),
    "dmd": DMD(update_ratio=1, adversarial=Adversarial(weight=0.0)),
    "dmd, hinge": DMD(update_ratio=1),
    "dmd, softplus": DMD(update_ratio=1, adversarial=Adversarial(weight=0.3, loss="softplus")),
}
Gradients = dict[str, Tensor]
Made = dict[PlayerName, nn.Module]


def play(
    objective: Objective, made: Made, batch: Batch, draws: Draws, step: int = 0
) -> list[tuple[PlayerName, Terms, Gradients]]:
    """Every turn of one iteration with nobody moving: who, what it costs, and all gradients by player and name."""
    turns, played, carry = objective.turns(cast_of(made), batch, draws, step), [], None
    while True:
        try:
            turn = turns.send(carry)
        except StopIteration:
            return played
        with only(made[turn.player], made.values()):
            terms = turn.terms()
            terms.total.backward()
        gradients: Gradients = {}
        for name, network in made.items():
            for path, parameter in network.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{name}:{path}"] = parameter.grad.clone()
                parameter.grad = None
        played.append((turn.player, terms, gradients))
        carry = terms.carry


def draws_of(rows: slice, total: int, seed: int = 5) -> Draws:
    return Draws(seed=seed, rows=rows, total=total)


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return OBJECTIVES[request.param]


class TestConformance:
    def test_players_and_needs(self, objective: Objective):
        assert isinstance(objective, Objective)
        assert objective.players[0] == "student"
        assert len(set(objective.players)) == len(objective.players)
        assert ("discriminator" in objective.players) == ("features" in objective.needs)
        assert {player for player, *_ in self.whole(objective)} == set(objective.players)

    @staticmethod
    def whole(objective: Objective, seed: int = 5) -> list[tuple[PlayerName, Terms, Gradients]]:
        return play(objective, networks(objective.players), batch_of(6), draws_of(slice(0, 6), 6, seed))

    def test_needs_are_enough(self, objective: Objective):
        """Only what is declared is there, and playing still works."""
        full, made = batch_of(4), networks(objective.players)
        trajectories, images = "trajectories" in objective.needs, "images" in objective.needs
        batch = Batch(
            noise=full.noise,
            condition=full.condition,
            states=full.states if trajectories else None,
            grid=full.grid if trajectories else None,
            images=full.images if images else None,
            images_condition=full.images_condition if images else None,
        )
        assert play(objective, made, batch, draws_of(slice(0, 4), 4))

    def test_one_finite_number_a_row_and_scalar_metrics(self, objective: Objective):
        for _, terms, _ in self.whole(objective):
            assert terms.losses
            for loss in terms.losses.values():
                assert loss.shape == (6,)
                assert loss.isfinite().all()
            for metric in terms.metrics.values():
                assert metric.shape == ()
                assert metric.isfinite()
                assert not metric.requires_grad
            assert terms.carry is None or not terms.carry.requires_grad
            expected = sum(loss.mean() for loss in terms.losses.values())
            torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=0)

    def test_gradients_reach_the_player_of_the_turn_and_nobody_else(self, objective: Objective):
        for player, _, gradients in self.whole(objective):
            assert {name.split(":")[0] for name in gradients} == {player}
            assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-6
            assert all(gradient.isfinite().all() for gradient in gradients.values())

    def test_sampling_grid_runs_from_noise_to_data(self, objective: Objective):
        grid = objective.sampling_grid()
        assert grid.dtype == torch.float64
        assert grid[0] == 1
        assert grid[-1] == 0
        assert bool((grid.diff() < 0).all())

    def test_deterministic_in_draws(self, objective: Objective):
        for (_, a, ga), (_, b, gb) in zip(self.whole(objective), self.whole(objective), strict=True):
            assert all(torch.equal(a.losses[name], b.losses[name]) for name in a.losses)
            assert all(torch.equal(ga[name], gb[name]) for name in ga)

    def test_other_draws_give_other_losses_where_anything_is_drawn(self, objective: Objective):
        for (_, a, _), (_, b, _) in zip(self.whole(objective), self.whole(objective, seed=6), strict=True):
            same = all(torch.equal(a.losses[name], b.losses[name]) for name in a.losses)
            assert same == isinstance(objective, SFD)

    def test_two_workers_together_do_what_one_does(self, objective: Objective):
        """Losses are the whole's rows, gradients average to the whole's."""
        whole, batch = self.whole(objective), batch_of(6)
        halves = [
            play(objective, networks(objective.players), rows_of(batch, rows), draws_of(rows, 6))
            for rows in (slice(0, 3), slice(3, 6))
        ]
        for (_, terms, gradients), (_, left, left_g), (_, right, right_g) in zip(whole, *halves, strict=True):
            for name, loss in terms.losses.items():
                together = torch.cat([left.losses[name], right.losses[name]])
                torch.testing.assert_close(together, loss, rtol=1e-10, atol=1e-12)
            for name, gradient in gradients.items():
                mean = (left_g[name] + right_g[name]) / 2
                torch.testing.assert_close(mean, gradient, rtol=1e-9, atol=1e-12)

    def test_training_brings_the_samples_to_the_teacher(self, objective: Objective):
        """A toy: the samples' mean comes most of the way from 0.1 to the data's 0.7. Fake score and judge go faster."""
        made = networks(objective.players)
        state = state_of(made, OptimizerConfig(learning_rate=5e-3), OptimizerConfig(learning_rate=2e-2))
        held_out = batch_of(256, first=10**6)

        def bias() -> float:
            x = sample(made["student"], objective, held_out.noise, held_out.condition)
            return (x.mean() - GAUSSIAN.mean).abs().item()

        before = bias()
        for step in range(300):
            batch, draws = batch_of(32, first=32 * step), draws_of(slice(0, 32), 32, seed=step)
            train_step(state, objective, cast_of(made), batch, draws, progress=step / 300)
        assert bias() < 0.3 * before


def exact_student(flow: GaussianFlow, error: float = 0.0) -> Callable[..., Tensor]:
    def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return flow.mean_velocity(x_t, t, r) + error

    return student


def cast_with(student: Callable[..., Tensor], teacher: GaussianFlow = GAUSSIAN, **others: object) -> Cast:
    return Cast(teacher=teacher, student=student, **others)  # pyright: ignore[reportArgumentType]


def only_turn(objective: Objective, cast: Cast, batch: Batch, draws: Draws) -> Terms:
    (turn,) = objective.turns(cast, batch, draws, 0)
    return turn.terms()


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
        start, end = MeanVelocity(full_share=0.0).pairs(draws_of(slice(0, rows), rows), 6)
        assert bool((start < end).all())  # positions ascend where times descend
        counts = torch.zeros(6, 6).index_put((start, end), torch.ones(rows), accumulate=True)
        seen = counts[torch.triu(torch.ones(6, 6), 1).bool()]
        # 15 intervals with 1,000 expected draws each; five standard deviations.
        assert (seen - 1000).abs().max() < 5 * (rows / 15 * 14 / 15) ** 0.5

    def test_share_of_full_intervals(self):
        rows = 4000
        start, end = MeanVelocity(full_share=0.25).pairs(draws_of(slice(0, rows), rows), 30)
        full = ((start == 0) & (end == 29)).double().mean().item()
        by_chance = 0.75 / (30 * 29 / 2)
        assert full == pytest.approx(0.25 + by_chance, abs=4 * (0.25 * 0.75 / rows) ** 0.5)
        start, end = MeanVelocity(full_share=1.0).pairs(draws_of(slice(0, 9), 9), 30)
        assert start.tolist() == [0] * 9
        assert end.tolist() == [29] * 9

    def test_two_points_leave_one_interval(self):
        start, end = MeanVelocity(full_share=0.0).pairs(draws_of(slice(0, 9), 9), 2)
        assert start.tolist() == [0] * 9
        assert end.tolist() == [1] * 9

    def test_adaptive_weight_is_not_differentiated(self):
        error = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
        weighted = MeanVelocity(power=0.75, constant=0.1).weighted(error)
        weights = torch.tensor([0.6**-0.75, 2.1**-0.75], dtype=torch.float64)
        torch.testing.assert_close(weighted, weights * error, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(weighted.sum(), error)
        torch.testing.assert_close(gradient, weights, rtol=1e-12, atol=0)
        assert MeanVelocity().weighted(error) is error

    @pytest.mark.parametrize("fields", [{"full_share": 1.1}, {"power": -1.0}, {"constant": 0.0}])
    def test_mistakes_are_named(self, fields: dict[str, float]):
        with pytest.raises(ValueError, match="given"):
            MeanVelocity(**fields)  # pyright: ignore[reportArgumentType]


class Linear(nn.Module):
    """``u = W (x, t, r) + b``: a student that can be moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * points(4, 6, seed=8))
        self.bias = nn.Parameter(0.1 * points(4, seed=9))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        inputs = torch.cat([x.flatten(1), t[:, None].to(x), r[:, None].to(x)], dim=1)
        return (inputs @ self.weight.T + self.bias).reshape(x.shape)


def longhand_sfd(batch: Batch, *, afs: bool, rate: float, updated_state: bool = False) -> tuple[list[float], Linear]:
    """Algorithm 2 with Adam written out: betas (0.9, 0.99), eps 1e-8. Optionally with the mistake of updating first."""
    student, losses = Linear(), []
    first = [torch.zeros_like(p) for p in student.parameters()]
    second = [torch.zeros_like(p) for p in student.parameters()]
    assert batch.states is not None
    x, times, moves = batch.states[:, 0], [1.0, 2 / 3, 1 / 3, 0.0], 0
    for n in range(3):
        t, r = (torch.full((len(x),), time, dtype=torch.float64) for time in (times[n], times[n + 1]))
        if afs and n == 0:
            x = x - (1 - 2 / 3) * x  # at t = 1 the direction is the point itself
            continue
        x_r = x - (times[n] - times[n + 1]) * student(x, t, r, batch.condition)
        loss = (x_r - batch.states[:, 2 * (n + 1)]).abs().sum() / len(x)
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        losses.append(loss.item())
        moves += 1
        with torch.no_grad():
            for p, g, m, v in zip(student.parameters(), gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.99).add_(0.01 * g * g)
                p -= rate * (m / (1 - 0.9**moves)) / ((v / (1 - 0.99**moves)).sqrt() + 1e-8)
        if updated_state:
            x_r = x - (times[n] - times[n + 1]) * student(x, t, r, batch.condition)
        x = x_r.detach()
    return losses, student


class TestSFD:
    @pytest.mark.parametrize("afs", [False, True])
    def test_one_iteration_of_algorithm_2_number_by_number(self, afs: bool):
        batch, student = batch_of(5), Linear()
        made: Made = {"student": student}
        state = state_of(made, OptimizerConfig(learning_rate=0.02, betas=(0.9, 0.99)))
        logged = train_step(
            state, SFD(intervals=3, afs=afs), cast_of(made), batch, draws_of(slice(0, 5), 5), progress=0.0
        )
        losses, expected = longhand_sfd(batch, afs=afs, rate=0.02)
        ours = [logged[f"loss/sfd_{n}"].item() for n in range(afs, 3)]
        assert ours == pytest.approx(losses, rel=1e-11)
        assert f"loss/sfd_{0}" in logged or afs
        assert state.players["student"].moves == 3 - afs
        for mine, longhand in zip(student.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine, longhand, rtol=1e-9, atol=1e-11)
        mistaken, _ = longhand_sfd(batch, afs=afs, rate=0.02, updated_state=True)
        assert abs(mistaken[1] - losses[1]) > 1e-4  # the comparison can tell the order of update and state

    def test_the_exact_flow_costs_nothing(self):
        for terms in self.losses_along(SFD(intervals=3), exact_student(GAUSSIAN)):
            assert terms.max() < 1e-13
        for terms in self.losses_along(SFD(intervals=3), exact_student(GAUSSIAN, 0.01)):
            assert terms.min() > 0.01

    def test_after_an_analytical_step_the_optimal_student_still_costs_nothing(self):
        """The analytical step from t = 1 shrinks the noise to ``2/3``; the next step can make good for it."""

        def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            if t[0] > 0.5:
                return (x_t - GAUSSIAN.flow_map(x_t / (2 / 3), 1.0, r)) / (t - r).reshape(-1, 1, 1, 1)
            return GAUSSIAN.mean_velocity(x_t, t, r)

        losses = self.losses_along(SFD(intervals=3, afs=True), student)
        assert len(losses) == 2
        assert max(loss.max() for loss in losses) < 1e-13

    @staticmethod
    def losses_along(objective: SFD, student: Callable[..., Tensor]) -> list[Tensor]:
        turns, carry, losses = objective.turns(cast_with(student), batch_of(4), draws_of(slice(0, 4), 4), 0), None, []
        while True:
            try:
                terms = turns.send(carry).terms()
            except StopIteration:
                return losses
            losses.extend(terms.losses.values())
            carry = terms.carry

    def test_the_first_state_is_the_stored_one(self):
        seen: list[Tensor] = []

        def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            seen.append(torch.stack([t, r], dim=1)[0])
            return 0 * x_t

        self.losses_along(SFD(intervals=3), student)
        expected = torch.tensor([[1, 2 / 3], [2 / 3, 1 / 3], [1 / 3, 0]], dtype=torch.float64)
        torch.testing.assert_close(torch.stack(seen), expected, rtol=1e-15, atol=1e-15)

    def test_analytical_direction_is_edms(self):
        t = torch.tensor([0.999, 0.9, 0.5, 0.1], dtype=torch.float64)
        x_t, t_ = points(4, *SHAPE), t.reshape(-1, 1, 1, 1)
        sigma, x = t_ / (1 - t_), x_t / (1 - t_)
        data = x - sigma * x / (1 + sigma**2).sqrt()
        torch.testing.assert_close(afs_velocity(x_t, t), (x_t - data) / t_, rtol=1e-11, atol=1e-12)
        # And the step is EDM's Euler step with that direction.
        r_ = t_ / 3
        next_sigma = r_ / (1 - r_)
        stepped = (x + (next_sigma - sigma) * x / (1 + sigma**2).sqrt()) * (1 - r_)
        torch.testing.assert_close(jump(x_t, afs_velocity(x_t, t), t, t / 3), stepped, rtol=1e-10, atol=1e-12)

    def test_analytical_direction_at_pure_noise(self):
        x_t = points(2, *SHAPE)
        t = torch.tensor([1.0, 1 - 1e-9], dtype=torch.float64)
        direction = afs_velocity(x_t, t)
        assert torch.equal(direction[0], x_t[0])
        torch.testing.assert_close(direction[1], x_t[1], rtol=1e-8, atol=0)

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("l1", 7.0), ("l2", 25.0), ("pseudo_huber", math.sqrt(25 + (0.00054**2) * 4) - 0.00054 * 2)],
    )
    def test_distances_in_numbers(self, kind: Distance, expected: float):
        x = torch.tensor([3.0, 0.0, -4.0, 0.0], dtype=torch.float64).reshape(1, *SHAPE)
        ours = distance(x + 1, torch.ones_like(x), kind)
        torch.testing.assert_close(ours, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=0)

    def test_the_grid_is_the_given_one(self):
        grid = GridConfig(kind="log_snr", t_max=0.9, t_min=0.1)
        assert torch.equal(SFD(intervals=4, grid=grid).sampling_grid(), grid.times(4))

    def test_mistakes_are_named(self):
        with pytest.raises(ValueError, match=r"intervals >= 2 \(afs: True\); given 1"):
            SFD(intervals=1, afs=True)
        with pytest.raises(ValueError, match="intervals >= 1"):
            SFD(intervals=0)
        with pytest.raises(ValueError, match="a grid of 4 intervals does not nest in one of 6"):
            next(SFD(intervals=4).turns(cast_with(exact_student(GAUSSIAN)), batch_of(2), draws_of(slice(0, 2), 2), 0))


class Generator(nn.Module):
    """A one-step generator whose samples are ``mean + std * noise``."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        assert bool((t == 1).all())
        assert bool((r == 0).all())
        return x_t - (self.mean + self.log_std.exp() * x_t)


class Follower(nn.Module):
    """The velocity of a Gaussian flow with a mean and a spread to learn."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t_ = t.to(x_t).reshape(-1, 1, 1, 1)
        spread = (2 * self.log_std).exp()
        z = (x_t - (1 - t_) * self.mean) / ((1 - t_) ** 2 * spread + t_**2)
        return t_ * z - self.mean - (1 - t_) * spread * z


def noise_batch(rows: int, *shape: int, seed: int = 0) -> Batch:
    return Batch(noise=points(rows, *shape, seed=seed), condition=no_condition(rows))


class TestDMD:
    PLAIN = DMD(update_ratio=1, adversarial=Adversarial(weight=0.0))

    def test_generate_is_one_jump_from_noise(self):
        z = points(3, *SHAPE)
        torch.testing.assert_close(
            generate(Generator(0.4, 2.0), z, no_condition(3)), 0.4 + 2.0 * z, rtol=1e-12, atol=1e-12
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

    def test_equal_distributions_give_no_gradient_on_average(self):
        student = Generator(GAUSSIAN.mean, GAUSSIAN.std)
        cast = cast_with(student, fake_score=GAUSSIAN)
        *_, turn = self.PLAIN.turns(cast, noise_batch(20, *SHAPE), draws_of(slice(0, 20), 20), 0)
        (gradient,) = torch.autograd.grad(turn.terms().total, student.mean)
        assert gradient.item() == 0

    def test_matching_gradient_longhand(self):
        x, real, fake = (points(2, *SHAPE, seed=i) for i in range(3))
        for i in range(2):
            expected = (fake[i] - real[i]) / ((x[i] - real[i]).abs().sum() / 4)
            torch.testing.assert_close(matching_gradient(x, real, fake)[i], expected, rtol=1e-12, atol=0)
        assert matching_gradient(x, x, fake).isfinite().all()
        assert torch.equal(matching_gradient(x, real, math.nan * fake), 0 * x)

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

    def test_the_discriminator_pays_for_calling_real_fake_and_not_for_the_truth(self):
        """Data at +10, samples at -10, and a judge that reads off the mean: noised to t = 0.35 it says about +-6."""
        objective = DMD(update_ratio=1, adversarial=Adversarial(time_std=0.0))
        batch = noise_batch(20, *SHAPE)
        condition = batch.condition
        batch = replace(batch, images=10 + points(20, *SHAPE, seed=1), images_condition=condition)

        for sign, loss, accurate in ((1, 0.0, 1.0), (-1, 1 + 10 * (1 - torch.sigmoid(torch.tensor(-0.6)).item()), 0.0)):

            def judge(features: list[Tensor], sign: int = sign) -> Judgement:
                logits = sign * features[0].mean((1, 2))[:, None]
                return Judgement(logits=logits, weights=torch.full((len(logits), 1, 1, 4), 0.25))

            cast = cast_with(
                Generator(-10.0, 1.0),
                fake_score=GAUSSIAN,
                discriminator=judge,
                features=lambda x_t, t, condition: [x_t.flatten(1)[:, :, None]],
            )
            turns = objective.turns(cast, batch, draws_of(slice(0, 20), 20), 0)
            next(turns)
            turn = turns.send(None)
            assert turn.player == "discriminator"
            terms = turn.terms()
            # A mean of 40 verdicts, each the mean of four pixels with a spread of about 0.75.
            assert terms.total.item() == pytest.approx(loss, abs=4 * 0.75 / 2 / 40**0.5)
            assert terms.metrics["accuracy_real"] == terms.metrics["accuracy_fake"] == accurate
            assert sign * terms.metrics["real_logit"] > 5
            assert sign * terms.metrics["fake_logit"] < -5
            assert terms.metrics["token_entropy"].item() == pytest.approx(1.0, rel=1e-6)

    @pytest.mark.parametrize("weight", [0.0, 0.1])
    def test_the_generator_moves_every_kth_step(self, weight: float):
        objective = DMD(update_ratio=3, adversarial=Adversarial(weight=weight))
        made, others = networks(objective.players), list(objective.players[1:])
        for step in range(7):
            played = play(objective, made, batch_of(4), draws_of(slice(0, 4), 4), step)
            assert [player for player, *_ in played] == [*others, *(["student"] if step % 3 == 0 else [])]

    def test_the_adversarial_term_is_weighted(self):
        losses = []
        for weight in (0.1, 0.3):
            objective = DMD(update_ratio=1, adversarial=Adversarial(weight=weight))
            played = play(objective, networks(objective.players), batch_of(4), draws_of(slice(0, 4), 4))
            losses.append(played[-1][1].losses)
        torch.testing.assert_close(losses[1]["adversarial"], 3 * losses[0]["adversarial"], rtol=1e-12, atol=0)
        assert torch.equal(losses[1]["matching"], losses[0]["matching"])

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
        "fields", [{"update_ratio": 0}, {"tau_min": 0.0}, {"tau_max": 1.0}, {"tau_min": 0.9, "tau_max": 0.1}]
    )
    def test_mistakes_are_named(self, fields: dict[str, float]):
        with pytest.raises(ValueError, match="given"):
            DMD(**fields)  # pyright: ignore[reportArgumentType]


class TestAdversarial:
    REAL = torch.tensor([[2.0, 0.5], [-1.0, 1.0]], dtype=torch.float64)
    FAKE = torch.tensor([[-3.0, 0.25], [0.0, -1.0]], dtype=torch.float64)

    def test_hinge_in_numbers(self):
        hinge = Adversarial(loss="hinge")
        # Row 0: relu(1 - 2) = 0 and relu(0.5) = 0.5; relu(1 - 3) = 0 and relu(1.25) = 1.25. Row 1: 2, 0; 1, 0.
        assert hinge.discriminator_loss(self.REAL, self.FAKE).tolist() == [0.25 * (0.5 + 1.25), 0.25 * (2 + 1)]
        assert hinge.generator_loss(self.FAKE).tolist() == [1.375, 0.5]

    def test_softplus_in_numbers(self):
        def softplus(value: float) -> float:
            return math.log1p(math.exp(value))

        saturating = Adversarial(loss="softplus")
        expected = (softplus(-2) + softplus(-3) + softplus(-0.5) + softplus(0.25)) / 2
        assert saturating.discriminator_loss(self.REAL, self.FAKE)[0].item() == pytest.approx(expected, rel=1e-12)
        assert saturating.generator_loss(self.FAKE)[0].item() == pytest.approx(
            (softplus(3) + softplus(-0.25)) / 2, rel=1e-12
        )

    @staticmethod
    def log_ratio(x: Tensor, real_mean: float, fake_mean: float, std: float) -> Tensor:
        return ((x - fake_mean) ** 2 - (x - real_mean) ** 2) / (2 * std**2)

    def test_softplus_discriminator_rests_at_the_log_density_ratio(self):
        x = torch.linspace(-3, 3, 101, dtype=torch.float64)
        logit = self.log_ratio(x, 0.7, -0.4, 0.8).requires_grad_()
        real, fake = ((-((x - mean) ** 2) / (2 * 0.8**2)).exp() for mean in (0.7, -0.4))
        loss = real * Adversarial(loss="softplus").discriminator_loss(
            logit[:, None], -1e9 * torch.ones(101, 1).double()
        )
        loss = loss + fake * F.softplus(logit)
        (gradient,) = torch.autograd.grad(loss.sum(), logit)
        assert gradient.abs().max() < 1e-12
        both = Adversarial(loss="softplus").discriminator_loss(logit[:, None], logit[:, None])
        torch.testing.assert_close(both, F.softplus(-logit) + F.softplus(logit), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("loss", ["hinge", "softplus"])
    def test_at_the_optimal_discriminator_the_generator_goes_to_the_data(self, loss: str):
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
        logit = self.log_ratio(x, 0.7, -0.4, 0.8)
        cost = Adversarial(loss=loss).generator_loss(logit[:, None])  # pyright: ignore[reportArgumentType]
        (gradient,) = torch.autograd.grad(cost.sum(), x)
        pull = (0.7 + 0.4) / 0.8**2 * (torch.ones_like(x) if loss == "hinge" else torch.sigmoid(-logit.detach()))
        torch.testing.assert_close(gradient, -pull, rtol=1e-12, atol=0)  # descent moves x up, towards 0.7

    def test_judge_looks_at_noised_images(self):
        seen: dict[str, Tensor] = {}

        def taps(x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
            seen.update(x_t=x_t, t=t)
            return [x_t.flatten(1)[:, :, None]]

        def discriminator(features: list[Tensor]) -> Judgement:
            tokens = features[0]
            return Judgement(logits=tokens.mean(1), weights=torch.ones(len(tokens), 1, 1, 4) / 4)

        rows, images = 2000, points(2000, *SHAPE)
        cast = cast_with(exact_student(GAUSSIAN), features=taps, discriminator=discriminator)
        judgement = Adversarial(time_mean=-0.6, time_std=0.5).judge(
            cast, images, no_condition(rows), draws_of(slice(0, rows), rows), "judge/real"
        )
        logit = torch.logit(seen["t"].double())
        assert logit.mean().item() == pytest.approx(-0.6, abs=4 * 0.5 / rows**0.5)
        assert logit.std().item() == pytest.approx(0.5, abs=4 * 0.5 / (2 * rows) ** 0.5)
        t_ = seen["t"].double().reshape(-1, 1, 1, 1)
        eps = (seen["x_t"] - (1 - t_) * images) / t_
        # Standard normal, the same size as the images and independent of them; four standard errors of 8,000 numbers.
        assert eps.mean().abs() < 4 / 8000**0.5
        assert (eps.square().mean() - 1).abs() < 4 * (2 / 8000) ** 0.5
        assert (eps * images).mean().abs() < 4 / 8000**0.5
        torch.testing.assert_close(judgement.logits, seen["x_t"].flatten(1).mean(1, keepdim=True))

    def test_accuracy(self):
        real, fake = torch.tensor([[1.0], [-1.0], [2.0], [0.5]]), torch.tensor([[-1.0], [3.0], [2.0], [0.5]])
        right = accuracy(real, fake)
        assert right.real.item() == 0.75
        assert right.fake.item() == 0.25

    def test_token_entropy_extremes(self):
        uniform, single, half = torch.full((2, 3, 1, 4), 0.25), torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4)
        single[..., 2], half[..., :2] = 1.0, 0.5
        assert token_entropy(uniform).item() == pytest.approx(1.0, rel=1e-6)  # float32
        assert token_entropy(single).item() == 0.0
        assert token_entropy(half).item() == pytest.approx(0.5, rel=1e-6)

    @pytest.mark.parametrize("fields", [{"weight": -0.1}, {"time_std": -1.0}])
    def test_mistakes_are_named(self, fields: dict[str, float]):
        with pytest.raises(ValueError, match="must not be negative; given"):
            Adversarial(**fields)  # pyright: ignore[reportArgumentType]


def test_the_toy_trajectories_nest():
    """The grid of the toys holds the times of every objective above."""
    assert GRID.tolist() == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], abs=1e-15)
