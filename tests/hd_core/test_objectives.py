"""One conformance suite for every objective, then SFD against its formulas longhand."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hd_core.objectives.adversarial import Adversarial
from hd_core.objectives.dmd import DMD
from hd_core.objectives.flow_matching import FlowMatching
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.meanflow import MeanFlow
from hd_core.objectives.sfd import SFD, Distance, distance
from hd_core.objectives.turns import Batch, Objective, PlayerName, Terms
from hd_core.step import OptimizerConfig, train_step
from hd_core.times import GridConfig
from hd_core.types import Condition
from tests.oracles import GAUSSIAN
from tests.toys import (
    GRID,
    SHAPE,
    Gradients,
    Linear,
    Made,
    batch_of,
    cast_of,
    cast_with,
    draws_of,
    exact_student,
    means_among,
    networks,
    play,
    rows_of,
    sample,
    state_of,
)

OBJECTIVES: dict[str, Objective] = {
    "mean_velocity": MeanVelocity(),
    "mean_velocity, adaptive": MeanVelocity(power=1.0),
    "mean_velocity, to data": MeanVelocity(pairs="to_data"),
    "flow_matching": FlowMatching(),
    "meanflow": MeanFlow(derivative="exact"),
    "meanflow, differences": MeanFlow(epsilon=1e-3, power=0.5, equal_share=0.25),
    "sfd": SFD(intervals=3),
    "sfd, afs": SFD(intervals=3, afs=True),
    "sfd, from the teacher's states": SFD(intervals=3, states="teacher"),
    "sfd, told its steps": SFD(intervals=3, step_counts=(3,)),
    "sfd, huber": SFD(intervals=2, distance="pseudo_huber"),
    "dmd": DMD(update_ratio=1, adversarial=Adversarial(weight=0.0)),
    "dmd, hinge": DMD(update_ratio=1),
    "dmd, softplus": DMD(update_ratio=1, adversarial=Adversarial(weight=0.3, loss="softplus")),
    "dmd, two steps": DMD(update_ratio=1, intervals=2, adversarial=Adversarial(weight=0.0)),
    "dmd, last call": DMD(update_ratio=1, intervals=3, afs=True, gradient_steps=1),
    "dmd, plain": DMD(
        update_ratio=1,
        weighting="plain",
        max_gradient=0.2,
        tau_power=2.5,
        fake_time_min=0.1,
        fake_time_max=0.9,
        adversarial=Adversarial(weight=0.0),
    ),
    "dmd, matched": DMD(update_ratio=1, adversarial=Adversarial(weight=0.5, weighting="matched", share_times=True)),
    "dmd, relativistic": DMD(update_ratio=1, adversarial=Adversarial(loss="relativistic", r1_weight=1.0)),
    "dmd, regression": DMD(update_ratio=1, intervals=2, regression_weight=0.5),
}
TRAINED = ("mean_velocity", "meanflow", "sfd", "sfd, afs", "dmd", "dmd, last call", "dmd, plain")


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
        whole, batch, parts = self.whole(objective), batch_of(6), (slice(0, 3), slice(3, 6))

        def half(
            made: Made, rows: slice, mean: Callable[[Tensor], Tensor]
        ) -> list[tuple[PlayerName, Terms, Gradients]]:
            return play(objective, made, rows_of(batch, rows), draws_of(rows, 6), mean=mean)

        made = [networks(objective.players) for _ in parts]  # in this thread, as they seed the global generator
        with ThreadPoolExecutor(2) as threads:
            halves = list(threads.map(half, made, parts, means_among(2)))
        for (_, terms, gradients), (_, left, left_g), (_, right, right_g) in zip(whole, *halves, strict=True):
            for name, loss in terms.losses.items():
                together = torch.cat([left.losses[name], right.losses[name]])
                torch.testing.assert_close(together, loss, rtol=1e-10, atol=1e-12)
            for name, gradient in gradients.items():
                mean = (left_g[name] + right_g[name]) / 2
                torch.testing.assert_close(mean, gradient, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("objective", TRAINED, indirect=True)
    def test_training_brings_the_samples_to_the_teacher(self, objective: Objective):
        """A toy: the samples' mean comes most of the way from 0.1 to the data's 0.7. Fake score and judge go faster."""
        made = networks(objective.players)
        state = state_of(made, OptimizerConfig(learning_rate=5e-3), OptimizerConfig(learning_rate=3e-2))
        held_out = batch_of(256, first=10**6)

        def bias() -> float:
            x = sample(made["student"], objective, held_out.noise, held_out.condition)
            return (x.mean() - GAUSSIAN.mean).abs().item()

        before = bias()
        for step in range(200):
            batch, draws = batch_of(32, first=32 * step), draws_of(slice(0, 32), 32, seed=step)
            train_step(state, objective, cast_of(made), batch, draws, progress=step / 200)
        assert bias() < 0.3 * before


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
        with pytest.raises(ValueError, match=r"time 0\.75 is not stored"):
            next(SFD(intervals=4).turns(cast_with(exact_student(GAUSSIAN)), batch_of(2), draws_of(slice(0, 2), 2), 0))


def test_the_toy_trajectories_nest():
    """The grid of the toys holds the times of every objective above."""
    assert GRID.tolist() == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], abs=1e-15)
