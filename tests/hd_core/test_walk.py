"""Walks against jumps written out, and the analytical first direction against EDM's formula."""

import pytest
import torch
from torch import Tensor

from hd_core.paths import jump
from hd_core.times import custom
from hd_core.types import Condition
from hd_core.walk import afs_velocity, walk
from tests.oracles import GAUSSIAN, no_condition, points
from tests.toys import SHAPE, Linear, exact_student


def labelled(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """A flow map whose mean velocity depends on everything that it is told."""
    assert condition.labels is not None
    assert t.dtype == r.dtype == x.dtype
    return x * (t - r)[:, None, None, None] + condition.labels[:, None, None, None]


def test_a_walk_is_one_jump_for_each_interval():
    x, condition = torch.randn(3, 1, 2, 2), Condition(labels=torch.tensor([0, 1, 2]))
    label = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    middle = x - 0.25 * (0.25 * x + label)
    wanted = middle - 0.75 * (0.75 * middle + label)
    torch.testing.assert_close(walk(labelled, custom([1.0, 0.75, 0.0]), x, condition), wanted, rtol=1e-6, atol=1e-6)


def test_an_analytical_first_step_asks_the_network_once_less():
    asked: list[tuple[float, float]] = []

    def counting(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        asked.append((t[0].item(), r[0].item()))
        return labelled(x, t, r, condition)

    x, condition = torch.randn(2, 1, 2, 2), Condition(labels=torch.tensor([0, 1]))
    found = walk(counting, custom([1.0, 0.5, 0.0]), x, condition, afs=True)
    assert asked == [(0.5, 0.0)]
    after = x - 0.5 * afs_velocity(x, torch.ones(2))
    wanted = after - 0.5 * (0.5 * after + torch.tensor([0.0, 1.0])[:, None, None, None])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("intervals", [1, 2, 5])
def test_the_exact_flow_map_walks_to_the_end_of_the_flow(intervals: int):
    x, grid = points(4, *SHAPE), torch.linspace(1, 0, intervals + 1, dtype=torch.float64)
    ended = walk(exact_student(GAUSSIAN), grid, x, no_condition(4))
    torch.testing.assert_close(ended, GAUSSIAN.flow_map(x, 1.0, 0.0), rtol=1e-12, atol=1e-13)


class TestGradientSteps:
    GRID = custom([1.0, 0.7, 0.4, 0.0])

    def gradient(self, gradient_steps: int, *, afs: bool = False) -> tuple[Tensor, Tensor]:
        """Samples, and the gradient of their sum of squares in the student's weight."""
        student = Linear()
        x = walk(student, self.GRID, points(3, *SHAPE), no_condition(3), afs=afs, gradient_steps=gradient_steps)
        (gradient,) = torch.autograd.grad(x.square().sum(), student.weight)
        return x.detach(), gradient

    def longhand(self, detached: int, *, afs: bool = False) -> Tensor:
        """The same with the state cut off before the given step."""
        student, x, times = Linear(), points(3, *SHAPE), self.GRID.tolist()
        for n in range(3):
            t, r = (torch.full((3,), time, dtype=torch.float64) for time in (times[n], times[n + 1]))
            if afs and n == 0:
                x = x - (times[n] - times[n + 1]) * x  # at t = 1 the direction is the point itself
                continue
            x = x.detach() if n == detached else x
            x = x - (times[n] - times[n + 1]) * student(x, t, r, no_condition(3))
        return torch.autograd.grad(x.square().sum(), student.weight)[0]

    @pytest.mark.parametrize(("steps", "detached"), [(0, 0), (3, 0), (2, 1), (1, 2)])
    def test_the_last_calls_carry_the_gradient(self, steps: int, detached: int):
        torch.testing.assert_close(self.gradient(steps)[1], self.longhand(detached), rtol=1e-12, atol=1e-14)

    def test_after_an_analytical_step(self):
        torch.testing.assert_close(self.gradient(1, afs=True)[1], self.longhand(2, afs=True), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(self.gradient(2, afs=True)[1], self.longhand(1, afs=True), rtol=1e-12, atol=1e-14)

    def test_the_samples_are_the_same_and_the_gradients_differ(self):
        (x, one), (y, two), (z, three) = (self.gradient(steps) for steps in (1, 2, 3))
        assert torch.equal(x, y)
        assert torch.equal(y, z)
        assert min((one - two).abs().max(), (two - three).abs().max()) > 1e-3

    @torch.no_grad()
    def test_none_flows_where_gradients_are_off(self):
        assert not walk(Linear(), self.GRID, points(3, *SHAPE), no_condition(3), gradient_steps=2).requires_grad


class TestAnalyticalDirection:
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
