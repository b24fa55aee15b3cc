"""SFD beyond Algorithm 2: its baseline, any number of steps, the second stage, the perceptual term, guidance."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.guidance import guided_map
from hd_core.networks.dit import DiT, DiTConfig
from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.sfd import SFD
from hd_core.paths import jump
from hd_core.perceptual import perceptual_distance
from hd_core.random import Draws, sample_noise
from hd_core.step import OptimizerConfig, train_step
from hd_core.times import GridConfig
from hd_core.types import Condition
from hd_core.walk import walk, walk_states
from tests.oracles import GAUSSIAN, no_condition, points
from tests.toys import GRID, SHAPE, Linear, batch_of, cast_of, cast_with, draws_of, exact_student, state_of

ROWS = slice(0, 4)


class Recorder:
    """A student that is exact but for a constant error, and remembers what it was called with."""

    def __init__(self, error: float = 0.0) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Condition]] = []
        self._exact = exact_student(GAUSSIAN, error)

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        self.calls.append((x_t, t, r, condition))
        return self._exact(x_t, t, r, condition)


def losses_along(objective: SFD, student: Callable[..., Tensor], draws: Draws | None = None, **others: object):
    """The loss terms of one iteration in which nobody moves."""
    batch = batch_of(4)
    turns = objective.turns(cast_with(student, GAUSSIAN, **others), batch, draws or draws_of(ROWS, 4), 0)
    carry, losses = None, []
    while True:
        try:
            terms = turns.send(carry).terms()
        except StopIteration:
            return losses
        losses.append(dict(terms.losses))
        carry = terms.carry


class TestAlgorithm1:
    def test_each_step_starts_from_the_teachers_state(self):
        student, batch = Recorder(0.1), batch_of(4)
        assert batch.states is not None
        losses_along(SFD(intervals=3, states="teacher"), student)
        for n, (x, t, r, _) in enumerate(student.calls):
            assert torch.equal(x, batch.states[:, 2 * n])
            assert [t[0].item(), r[0].item()] == pytest.approx(GRID[2 * n : 2 * n + 3 : 2].tolist(), abs=1e-15)

    def test_an_error_accumulates_under_algorithm_2_only(self):
        """Every step is off by a third of 0.1: in Algorithm 1 always that, in Algorithm 2 with what came before."""
        pixels, error = 4, 0.1 / 3
        own = losses_along(SFD(intervals=3), Recorder(0.1))
        other = losses_along(SFD(intervals=3, states="teacher"), Recorder(0.1))
        ours = [losses[f"sfd_{n}"] for n, losses in enumerate(other)]
        torch.testing.assert_close(torch.stack(ours), torch.full((3, 4), pixels * error, dtype=torch.float64))
        carried, times = 0.0, GRID[::2]
        for n, (t, r) in enumerate(pairwise(times)):
            stretch = GAUSSIAN.flow_map(torch.ones(1, *SHAPE), t, r) - GAUSSIAN.flow_map(torch.zeros(1, *SHAPE), t, r)
            carried = carried * stretch.flatten()[0].double().item() - error
            assert own[n][f"sfd_{n}"].tolist() == pytest.approx([pixels * abs(carried)] * 4, rel=1e-5)

    def test_with_an_analytical_first_step_the_second_starts_from_the_teachers_state(self):
        student, batch = Recorder(), batch_of(4)
        assert batch.states is not None
        losses_along(SFD(intervals=3, states="teacher", afs=True), student)
        assert len(student.calls) == 2
        assert torch.equal(student.calls[0][0], batch.states[:, 2])

    def test_algorithm_2_corrects_what_accumulates_at_the_same_budget(self):
        """The analytical step's error cannot be learned away: only who starts from it can make good for it."""
        ends = {states: self.end_error(SFD(intervals=3, states=states, afs=True)) for states in ("own", "teacher")}
        assert ends["own"] < 0.05 * ends["teacher"], ends

    @staticmethod
    def end_error(objective: SFD) -> float:
        """Mean distance from the data ends of exact trajectories, after training a student that can be exact."""
        student = AffineSteps(3)
        state = state_of({"student": student}, OptimizerConfig(learning_rate=0.03, decay="cosine"))
        for step in range(400):
            draws = Draws(seed=step, rows=slice(0, 32), total=32)
            batch, cast = batch_of(32, first=32 * step), cast_of({"student": student})
            train_step(state, objective, cast, batch, draws, progress=step / 400)
        held_out = batch_of(256, first=10**6)
        assert held_out.states is not None
        with torch.no_grad():
            sampled = walk(student, objective.sampling_grid(), held_out.noise, held_out.condition, afs=objective.afs)
        return (sampled - held_out.states[:, -1]).abs().mean().item()


class AffineSteps(nn.Module):
    """``u = a x + b`` with a pair for each of equal steps, which holds the flow of a Gaussian exactly."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(steps, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        step = round((1 - t[0].item()) * len(self.a))
        return self.a[step] * x + self.b[step]


class TestAnyNumberOfSteps:
    OBJECTIVE = SFD(intervals=2, step_counts=(1, 2, 3))

    def test_each_iteration_walks_one_of_the_counts_and_says_which(self):
        seen: dict[int, int] = {}
        for seed in range(60):
            student = Recorder()
            losses_along(self.OBJECTIVE, student, draws_of(ROWS, 4, seed=seed))
            count = len(student.calls)
            seen[count] = seen.get(count, 0) + 1
            for _, _, _, condition in student.calls:
                assert condition.steps is not None
                assert condition.steps.tolist() == [count] * 4
            assert student.calls[0][1][0] == 1
            assert student.calls[-1][2][0] == 0
        assert set(seen) == {1, 2, 3}
        assert min(seen.values()) >= 10

    def test_every_worker_walks_the_same_count(self):
        for seed in range(10):
            students = [Recorder(), Recorder()]
            for student, rows in zip(students, (slice(0, 4), slice(4, 8)), strict=True):
                losses_along(self.OBJECTIVE, student, draws_of(rows, 8, seed=seed))
            assert len(students[0].calls) == len(students[1].calls)

    def test_the_exact_flow_costs_nothing_at_any_count(self):
        for seed in range(8):
            for losses in losses_along(self.OBJECTIVE, exact_student(GAUSSIAN), draws_of(ROWS, 4, seed=seed)):
                assert all(loss.max() < 1e-13 for loss in losses.values())

    def test_the_default_grid_is_that_of_intervals(self):
        assert torch.equal(self.OBJECTIVE.sampling_grid(), GridConfig().times(2))

    def test_a_walk_tells_its_student_of_its_steps(self):
        student = Recorder()
        for steps in (1, 4):
            walk(student, GridConfig().times(steps), points(3, *SHAPE), no_condition(3))
            assert student.calls[-1][3].steps is not None
            assert student.calls[-1][3].steps.tolist() == [steps] * 3


class TestTheStudentThatIsTold:
    CONFIG = DiTConfig(width=16, depth=2, heads=2, image_size=4)

    @pytest.fixture
    def dit(self) -> DiT:
        dit = DiT(self.CONFIG)
        for parameter in dit.parameters():
            nn.init.normal_(parameter, std=0.2)
        return dit

    @staticmethod
    def call(student: FlowMapStudent, steps: int | None) -> Tensor:
        x, t = points(3, 1, 4, 4).float(), torch.full((3,), 0.7)
        condition = Condition(labels=torch.tensor([0, 1, 2]))
        return student(x, t, t / 2, condition if steps is None else condition.on_walk(x, steps))

    def test_starting_at_zero_changes_nothing(self, dit: DiT):
        student = FlowMapStudent(dit)
        before = self.call(student, 3)
        student.learn_steps("zero")
        for steps in (None, 1, 3, 10):
            assert torch.equal(self.call(student, steps), before)

    def test_starting_at_random_tells_the_counts_apart_but_needs_to_be_told(self, dit: DiT):
        student = FlowMapStudent(dit)
        before = self.call(student, 3)
        student.learn_steps("random")
        outputs = [self.call(student, steps) for steps in (1, 2, 3, 4, 5)]
        assert torch.equal(self.call(student, None), before)
        for a, b in pairwise(outputs):
            assert (a - b).abs().max() > 1e-5
        assert (outputs[0] - before).abs().max() > 1e-3

    def test_gradient_reaches_the_embedding_that_starts_at_zero(self, dit: DiT):
        student = FlowMapStudent(dit)
        student.learn_steps("zero")
        self.call(student, 3).square().sum().backward()
        assert student.steps is not None
        last = student.steps.mlp[-1]
        assert isinstance(last, nn.Linear)
        assert last.weight.grad is not None
        assert last.weight.grad.abs().max() > 0

    def test_its_sinusoids_are_those_of_an_integer_time(self, dit: DiT):
        """Frequencies from 1 down to 1/10,000 radians a step (Ho et al. 2020)."""
        student = FlowMapStudent(dit)
        student.learn_steps("zero")
        assert student.steps is not None
        per_step = student.steps.frequencies / 10_000
        assert per_step.max().item() == pytest.approx(1.0)
        assert per_step.min().item() == pytest.approx(1e-4)


class TestSecondStage:
    OBJECTIVE = SFD(intervals=2, afs=True, taught_by="start", start_intervals=6, start_afs=True)

    def test_the_targets_are_the_states_of_what_it_starts_from(self):
        origin, student, batch = Linear(), Recorder(), batch_of(4)
        (losses,) = losses_along(self.OBJECTIVE, student, start=origin)
        with torch.no_grad():
            fine = list(walk_states(origin, GRID, batch.noise, batch.condition, afs=True))
        x, t, r, _ = student.calls[0]
        first = walk(student, torch.tensor([1.0, 0.5], dtype=torch.float64), batch.noise, batch.condition, afs=True)
        torch.testing.assert_close(x, first, rtol=0, atol=0)
        expected = (jump(x, GAUSSIAN.mean_velocity(x, t, r), t, r) - fine[6]).abs().flatten(1).sum(1)
        torch.testing.assert_close(losses["sfd_1"], expected, rtol=1e-12, atol=1e-12)

    def test_the_origin_is_told_its_own_number_of_steps(self):
        origin, student = Recorder(), Recorder()
        losses_along(self.OBJECTIVE, student, start=origin)
        assert len(origin.calls) == 5
        assert all(call[3].steps is not None and call[3].steps.tolist() == [6] * 4 for call in origin.calls)
        assert student.calls[0][3].steps is not None
        assert student.calls[0][3].steps.tolist() == [2] * 4

    def test_it_needs_no_stored_trajectories_and_leaves_its_origin_alone(self):
        assert self.OBJECTIVE.needs == {"start"}
        origin, student = Linear(), Linear()
        state = state_of({"student": student}, OptimizerConfig(learning_rate=0.01))
        before = origin.weight.detach().clone()
        train_step(
            state,
            self.OBJECTIVE,
            cast_of({"student": student}, start=origin),
            batch_of(4),
            draws_of(ROWS, 4),
            progress=0.0,
        )
        assert torch.equal(origin.weight, before)
        assert origin.weight.grad is None
        assert state.players["student"].moves == 1

    def test_a_student_of_its_own_origins_steps_has_nothing_to_learn(self):
        origin = Linear()
        objective = SFD(intervals=6, taught_by="start", start_intervals=6)
        for losses in losses_along(objective, origin, start=origin):
            assert all(loss.max() == 0 for loss in losses.values())


class TestPerceptualTerm:
    def test_it_is_paid_at_the_last_time_only(self):
        def far(x: Tensor, target: Tensor) -> Tensor:
            return (x - target).square().flatten(1).mean(1)

        objective = SFD(intervals=3, perceptual_weight=2.5)
        assert objective.needs == {"trajectories", "perceptual"}
        losses = losses_along(objective, Recorder(0.3), perceptual=far)
        assert [sorted(terms) for terms in losses] == [["sfd_0"], ["sfd_1"], ["perceptual", "sfd_2"]]
        each = losses[2]["sfd_2"] / 4  # every pixel is off by the same
        torch.testing.assert_close(losses[2]["perceptual"], 2.5 * each.square(), rtol=1e-10, atol=0)

    def test_the_distance_longhand(self):
        a = [points(2, 3, 4, 4, seed=1), points(2, 5, 2, 2, seed=2)]
        b = [points(2, 3, 4, 4, seed=3), points(2, 5, 2, 2, seed=4)]
        expected = torch.zeros(2, dtype=torch.float64)
        for row in range(2):
            for one, other in zip(a, b, strict=True):
                cells = [(i, j) for i in range(one.shape[2]) for j in range(one.shape[3])]
                for i, j in cells:
                    p, q = one[row, :, i, j], other[row, :, i, j]
                    difference = p / p.square().sum().sqrt() - q / q.square().sum().sqrt()
                    expected[row] += difference.square().sum() / len(cells)
        torch.testing.assert_close(perceptual_distance(a, b), expected, rtol=1e-12, atol=0)
        assert perceptual_distance(a, a).tolist() == [0, 0]


class TestGuidedStudent:
    NULL = Condition(labels=torch.tensor([9]))

    @staticmethod
    def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        assert condition.labels is not None
        assert condition.steps is not None
        factor = (1 + condition.labels + 10 * condition.steps).reshape(-1, 1, 1, 1)
        return (x_t + (t - 2 * r).reshape(-1, 1, 1, 1)) * factor

    def test_scale_one_is_the_student_itself(self):
        assert guided_map(self.student, None, 1.0) is self.student

    def test_formula_row_by_row_with_both_branches_told_of_the_steps(self):
        x, t = points(3, 1, 2, 2), torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
        condition = Condition(labels=torch.tensor([1, 0, 4])).on_walk(x, 2)
        null = Condition(labels=torch.tensor([9, 9, 9])).on_walk(x, 2)
        plain, without = self.student(x, t, t / 2, condition), self.student(x, t, t / 2, null)
        ours = guided_map(self.student, self.NULL, 3.0)(x, t, t / 2, condition)
        torch.testing.assert_close(ours, without + 3 * (plain - without), rtol=1e-12, atol=1e-12)

    def test_without_a_null_condition_it_is_refused(self):
        with pytest.raises(ValueError, match=r"scale 2\.0 needs a null condition"):
            guided_map(self.student, None, 2.0)


class TestFreeTimes:
    def test_the_teachers_points_subdivide_a_free_schedule(self):
        """Free times that are the polynomial grid's own give the official trajectory exactly."""
        official = GridConfig(kind="polynomial", t_max=80 / 81, t_min=0.006 / 1.006)
        free = GridConfig(
            kind="polynomial", t_max=80 / 81, t_min=0.006 / 1.006, knots=tuple(official.times(3)[1:-1].tolist())
        )
        torch.testing.assert_close(free.times(12), official.times(12), rtol=0, atol=1e-12)

    def test_a_student_walks_free_times_held_to_a_fine_teacher(self):
        """Of the toy's six stored intervals it takes 1, 4/6, 1/6 and 0."""
        student, batch = Recorder(), batch_of(4)
        assert batch.states is not None
        objective = SFD(intervals=3, grid=GridConfig(knots=(GRID[2].item(), GRID[5].item())))
        for losses in losses_along(objective, student):
            assert all(loss.max() < 1e-13 for loss in losses.values())
        seen = [call[1][0].item() for call in student.calls]
        assert seen == pytest.approx([1, 4 / 6, 1 / 6], abs=1e-12)

    def test_times_that_are_not_stored_are_named(self):
        objective = SFD(intervals=2, grid=GridConfig(knots=(0.4,)))
        with pytest.raises(ValueError, match=r"time 0\.4 is not stored"):
            losses_along(objective, Recorder())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_counts": (2, 4)}, r"intervals must be among step_counts; given 3, \[2, 4\]"),
        ({"step_counts": (3, 3)}, r"step_counts: each once; given \[3, 3\]"),
        ({"step_counts": (1, 3), "afs": True}, r"intervals >= 2 \(afs: True\); given 1"),
        ({"taught_by": "start", "start_intervals": 4}, "start_intervals must be a multiple .* given 4 and 3"),
        ({"perceptual_weight": -1.0}, "perceptual_weight must not be negative"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        SFD(**fields)  # pyright: ignore[reportArgumentType]


def test_noise_is_what_the_walks_start_from():
    """The toys' states are the exact flow's, so that what the tests above compare with is not made by this code."""
    batch = batch_of(4)
    assert batch.states is not None
    assert torch.equal(batch.states[:, 0], sample_noise(0, range(4), SHAPE).double())
    assert not torch.equal(F.relu(batch.noise), batch.noise)
