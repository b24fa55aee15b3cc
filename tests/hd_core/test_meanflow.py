"""MeanFlow against flows whose mean velocity is known, and its terms longhand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hd_core.networks.dit import DiT, DiTConfig
from hd_core.networks.student import FlowMapStudent
from hd_core.objectives import meanflow
from hd_core.objectives.meanflow import MeanFlow
from hd_core.objectives.turns import Batch, Cast, Terms
from hd_core.random import Draws
from hd_core.times import TimePairs
from hd_core.types import Condition
from tests.oracles import GAUSSIAN, PLANE, GaussianFlow, MixtureFlow, no_condition, points, wide
from tests.toys import Perceptron, batch_of, draws_of, only_turn

ROWS = 24
PLAIN = MeanFlow(power=0.0, equal_share=0.25, derivative="exact", epsilon=5e-3)


class Scaled(nn.Module):
    """``scale u + offset`` for the exact mean velocity ``u``, which is the velocity where ``r = t``."""

    def __init__(self, flow: GaussianFlow | MixtureFlow, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.flow = flow
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        equal = wide(t == r, x).bool()
        interval = torch.where(equal, 1.0, wide(t - r, x))
        u = torch.where(equal, self.flow.velocity(x, t), (x - self.flow.flow_map(x, t, r)) / interval)
        return self.scale * u + self.offset


def batch(rows: int = ROWS, shape: tuple[int, ...] = (1, 2, 2)) -> Batch:
    noise, images, condition = points(rows, *shape), 0.7 + 0.5 * points(rows, *shape, seed=1), no_condition(rows)
    return Batch(noise=noise, condition=condition, images=images, images_condition=condition)


def draws(rows: int = ROWS, seed: int = 5) -> Draws:
    return draws_of(slice(0, rows), rows, seed)


def play(objective: MeanFlow, student: Any, teacher: Any = GAUSSIAN, step: int = 0, **others: Any) -> Terms:
    cast = Cast(teacher=teacher, student=student, **others)
    (turn,) = objective.turns(cast, batch(), draws(), step)
    return turn.terms()


def points_of(objective: MeanFlow) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x_t``, ``v``, ``t`` and ``r`` of `play`, longhand."""
    t, r = (time.double() for time in objective.pairs(draws()))
    given = batch()
    assert given.images is not None
    x_t = wide(1 - t, given.noise) * given.images + wide(t, given.noise) * given.noise
    return x_t, GAUSSIAN.velocity(x_t, t), t, r


class TestAtTheOptimum:
    @pytest.mark.parametrize("power", [0.0, 1.0])
    def test_the_exact_mean_velocity_costs_nothing(self, power: float):
        student = Scaled(GAUSSIAN)
        terms = play(replace(PLAIN, power=power), student)
        terms.total.backward()
        assert terms.total < 1e-15
        for parameter in student.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs() < 1e-9 / (1.0 if power == 0 else 1e-3)
        assert terms.metrics["squared_change"] > 0.03

    def test_so_does_that_of_a_mixture(self):
        student, rows, objective = Scaled(replace(PLANE, substeps=24)), 6, replace(PLAIN, full_share=0.0)
        terms = only_turn(
            objective,
            Cast(teacher=PLANE, student=student),  # pyright: ignore[reportArgumentType]
            batch(rows, (2, 1, 1)),
            draws(rows),
        )
        terms.total.backward()
        assert terms.total < 1e-9  # Runge-Kutta of 24 steps
        assert all(p.grad is not None and p.grad.abs() < 1e-4 for p in student.parameters())
        assert terms.metrics["squared_change"] > 0.01

    def test_the_other_sign_costs(self, monkeypatch: pytest.MonkeyPatch):
        exact = meanflow.derivative
        monkeypatch.setattr(meanflow, "derivative", lambda *given: -exact(*given))
        student = Scaled(GAUSSIAN)
        terms = play(PLAIN, student)
        terms.total.backward()
        assert terms.total > 0.1
        assert student.scale.grad is not None
        assert student.scale.grad.abs() > 0.05

    def test_the_instantaneous_velocity_costs(self):
        assert play(PLAIN, lambda x, t, r, c: GAUSSIAN.velocity(x, t)).total > 0.03


class TestOffTheOptimum:
    def test_a_constant_error_costs_its_square(self):
        """An offset does not depend on the state or time, so it leaves ``du/dt`` and the target alone."""
        student = Scaled(GAUSSIAN, offset=0.1)
        terms = play(PLAIN, student)
        expected = torch.full((ROWS,), 0.01, dtype=torch.float64)
        torch.testing.assert_close(terms.losses["meanflow"], expected, rtol=1e-7, atol=0)
        (gradient,) = torch.autograd.grad(terms.total, student.offset)
        assert gradient.item() == pytest.approx(0.2, rel=1e-7)

    def test_a_scale_in_closed_form(self):
        """``s u - (v - (t - r) s du/dt) = s u - v + s (v - u) = (s - 1) v``, so the error is that of the velocity."""
        _, v, _, _ = points_of(PLAIN)
        terms = play(PLAIN, Scaled(GAUSSIAN, scale=1.3))
        expected = 0.09 * v.square().mean((1, 2, 3))
        torch.testing.assert_close(terms.losses["meanflow"], expected, rtol=1e-8, atol=0)

    def test_adaptive_weight(self):
        student = Scaled(GAUSSIAN, offset=0.1)
        terms = play(replace(PLAIN, power=0.75, constant=0.02), student)
        weight = (0.01 + 0.02) ** -0.75
        assert terms.total.item() == pytest.approx(0.01 * weight, rel=1e-7)
        (gradient,) = torch.autograd.grad(terms.total, student.offset)
        assert gradient.item() == pytest.approx(0.2 * weight, rel=1e-7)  # the weight is not differentiated
        assert terms.metrics["squared_error"].item() == pytest.approx(0.01, rel=1e-7)

    def test_gradient_longhand(self):
        """The target is held: the gradient is ``2 (u - target) du/dtheta`` and nothing of the derivative's."""
        student, condition = Perceptron(2, seed=1), no_condition(ROWS)
        x_t, v, t, r = points_of(PLAIN)
        du_dt = torch.func.jvp(lambda x, t_: student(x, t_, r, condition), (x_t, t), (v, torch.ones_like(t)))[1]
        target = (v - wide(t - r, x_t) * du_dt).detach()
        loss = (student(x_t, t, r, condition) - target).square().mean()
        expected = torch.autograd.grad(loss, list(student.parameters()))
        terms = play(PLAIN, student)
        torch.testing.assert_close(terms.total, loss, rtol=1e-10, atol=0)
        gradients = torch.autograd.grad(terms.total, list(student.parameters()))
        for ours, longhand in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, longhand, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (5, 0.25), (20, 1.0), (99, 1.0)])
    def test_warm_up_of_the_derivative(self, step: int, weight: float):
        """The target is ``v - w (v - u)`` at the exact mean velocity, so the error is ``(1 - w) (u - v)``."""
        objective = replace(PLAIN, tangent_warmup_steps=20)
        assert objective.tangent_weight(step) == weight
        assert PLAIN.tangent_weight(step) == 1
        x_t, v, t, r = points_of(objective)
        u = Scaled(GAUSSIAN)(x_t, t, r, no_condition(ROWS))
        expected = (1 - weight) ** 2 * (u - v).square().mean()
        terms = play(objective, Scaled(GAUSSIAN), step=step)
        assert terms.total.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-15)

    def test_finite_differences_come_to_the_exact_loss(self):
        torch.manual_seed(3)
        student = FlowMapStudent(DiT(DiTConfig(width=16, depth=2, heads=2, image_size=2))).double()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        exact = play(PLAIN, student).losses["meanflow"]
        errors = [
            (play(replace(PLAIN, derivative="finite_difference", epsilon=e), student).losses["meanflow"] - exact).norm()
            for e in (1e-3, 5e-4)
        ]
        assert errors[0] > 0
        assert (errors[0] / errors[1]).item() == pytest.approx(4, abs=0.3)


class TestWhatIsCalled:
    def test_differences_do_not_see_a_ripple_that_no_step_would(self):
        """A ripple of 0.001 in time: the exact derivative is off by half, differences of 0.05 by a few hundredths."""

        def rippled(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            return Scaled(GAUSSIAN)(x, t, r, condition) + 1e-3 * torch.sin(700 * wide(t, x))

        errors = {
            kind: play(replace(PLAIN, derivative=kind, epsilon=0.05), rippled).metrics["squared_error"].sqrt().item()
            for kind in ("exact", "finite_difference")
        }
        assert errors["exact"] > 0.1
        assert errors["finite_difference"] < 0.03

    def test_rows_of_equal_times_have_no_derivative(self, monkeypatch: pytest.MonkeyPatch):
        seen: list[Tensor] = []
        exact = meanflow.derivative

        def watched(student: Any, x: Tensor, v: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            seen.append(t - r)
            return exact(student, x, v, t, r, condition)

        monkeypatch.setattr(meanflow, "derivative", watched)
        play(PLAIN, Scaled(GAUSSIAN))
        t, r = PLAIN.pairs(draws())
        assert len(seen) == 1
        assert (seen[0] > 0).all()
        assert len(seen[0]) == int((r < t).sum()) < ROWS
        terms = play(replace(PLAIN, equal_share=1.0, full_share=0.0), Scaled(GAUSSIAN, offset=0.1))
        assert len(seen) == 1
        assert terms.total.item() == pytest.approx(0.01, rel=1e-9)
        assert terms.metrics["squared_change"] == 0

    def test_the_student_and_the_teacher_are_asked_at_the_same_points(self):
        calls: dict[str, tuple[Tensor, ...]] = {}

        def teacher(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert not torch.is_grad_enabled()
            calls["teacher"] = (x, t)
            return GAUSSIAN.velocity(x, t)

        def student(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
            calls.setdefault("student", (x, t))
            return GAUSSIAN.velocity(x, t)

        play(replace(PLAIN, full_share=0.5), student, teacher)
        assert all(torch.equal(a, b) for a, b in zip(calls["teacher"], calls["student"], strict=True))
        x, t = calls["teacher"]
        torch.testing.assert_close(x, points_of(replace(PLAIN, full_share=0.5))[0], rtol=1e-12, atol=1e-12)
        full = t == 1
        assert 4 < int(full.sum()) < 20
        assert torch.equal(x[full], batch().noise[full])

    def test_label_dropout(self):
        rows, labels = 2000, []

        def watched(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
            labels.append(rest[-1].labels)
            return GAUSSIAN.velocity(x, t)

        objective = replace(PLAIN, label_dropout=0.2)
        null = Condition(labels=torch.tensor([3]))
        cast = Cast(teacher=watched, student=watched, null_condition=null)
        only_turn(objective, cast, batch_of(rows), draws(rows))
        teacher, student, moving = labels
        assert torch.equal(teacher, student)
        dropped = teacher == 3
        assert torch.equal(teacher[~dropped], (torch.arange(rows) % 3)[~dropped])
        assert dropped.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / rows) ** 0.5)
        t, r = objective.pairs(draws(rows))
        assert torch.equal(moving, teacher[r < t])  # the derivative is taken under the same condition
        with pytest.raises(ValueError, match="needs a teacher that knows"):
            play(objective, watched, watched)


class TestPairs:
    ROWS = 20_000

    def shares(self, objective: MeanFlow) -> tuple[float, float]:
        t, r = objective.pairs(draws(self.ROWS))
        assert ((r >= 0) & (r <= t) & (t <= 1)).all()
        return ((t == 1) & (r == 0)).double().mean().item(), (t == r).double().mean().item()

    @pytest.mark.parametrize(("full", "equal"), [(0.125, 0.75), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
    def test_shares_of_rows(self, full: float, equal: float):
        measured = self.shares(MeanFlow(full_share=full, equal_share=equal))
        for share, expected in zip(measured, (full, equal), strict=True):
            assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / self.ROWS))

    def test_the_other_rows_are_the_samplers(self):
        objective = MeanFlow(times=TimePairs(kind="uniform"))
        t, r = objective.pairs(draws(self.ROWS))
        t_drawn, r_drawn = objective.times.draw(draws(self.ROWS))
        between = (r < t) & (t < 1)
        assert between.double().mean().item() == pytest.approx(0.125, abs=0.01)
        assert torch.equal(t[between], t_drawn[between])
        assert torch.equal(r[between], r_drawn[between])

    def test_rows_do_not_stand_in_any_order(self):
        t, r = MeanFlow().pairs(draws(self.ROWS))
        first = (t == r)[: self.ROWS // 2].double().mean().item()
        assert first == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / (self.ROWS / 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"equal_share": 1.1}, "equal_share is a share of rows, between 0 and 1; given 1.1"),
        ({"full_share": -0.1}, "full_share is a share of rows"),
        ({"label_dropout": math.nan}, "label_dropout is a share of rows"),
        ({"equal_share": 0.9}, r"together at most 1; given 0.9 \+ 0.125"),
        ({"tangent_warmup_steps": -1}, "must not be negative; given -1"),
        ({"epsilon": 0.0}, r"epsilon must lie in \(0, 0.25\]; given 0.0"),
        ({"epsilon": 0.3}, "given 0.3"),
        ({"power": -1.0}, "power must be >= 0 and constant > 0; given -1.0 and 0.001"),
        ({"constant": 0.0}, "given 1.0 and 0.0"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MeanFlow(**fields)
