"""The derivative along the flow against differences, torch's own rules and the identity of mean velocities."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hd_core.jvp import derivative, difference
from hd_core.networks.dit import DiT, DiTConfig
from hd_core.networks.student import FlowMapStudent
from hd_core.types import Condition
from tests.oracles import GAUSSIAN, PLANE, GaussianFlow, MixtureFlow, no_condition, points, wide

CONDITION = Condition(labels=torch.tensor([0, 3, 10, 1, 2]))
T = torch.tensor([1.0, 0.9, 0.5, 0.31, 0.2], dtype=torch.float64)
R = torch.tensor([0.0, 0.85, 0.1, 0.0, 0.199], dtype=torch.float64)


@pytest.fixture
def student() -> FlowMapStudent:
    """A DiT student whose every parameter has been moved, gates and outputs included."""
    torch.manual_seed(3)
    net = FlowMapStudent(DiT(DiTConfig(width=16, depth=2, heads=2, image_size=4))).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return net


def sixth_order(function: Callable[[float], Tensor], h: float) -> Tensor:
    """``f'(0)`` by central differences with an error of order ``h^6``."""
    weights = {1: 45, 2: -9, 3: 1}
    return sum((w * (function(n * h) - function(-n * h)) for n, w in weights.items()), torch.zeros(())) / (60 * h)


@torch.no_grad()
def along(student: Any, x: Tensor, v: Tensor) -> Tensor:
    return sixth_order(lambda s: student(x + s * v, T + s, R, CONDITION), 1e-4)


def test_a_dit_students_derivative_is_the_limit_of_differences(student: FlowMapStudent):
    x, v = points(5, 1, 4, 4), points(5, 1, 4, 4, seed=1)
    expected = along(student, x, v)
    ours = derivative(student, x, v, T, R, CONDITION)
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_it_equals_torchs_own_forward_mode(student: FlowMapStudent):
    x, v = points(5, 1, 4, 4), points(5, 1, 4, 4, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(
            lambda x_, t_, r_: student(x_, t_, r_, CONDITION), (x, T, R), (v, torch.ones_like(T), torch.zeros_like(R))
        )[1]
    torch.testing.assert_close(derivative(student, x, v, T, R, CONDITION), expected.detach(), rtol=1e-11, atol=1e-12)


def test_it_is_detached_and_leaves_no_gradient(student: FlowMapStudent):
    ours = derivative(student, points(5, 1, 4, 4), points(5, 1, 4, 4, seed=1), T, R, CONDITION)
    assert not ours.requires_grad
    assert all(parameter.grad is None for parameter in student.parameters())
    # The network is as it was: torch's fused attention, and no tangent left behind.
    assert torch.autograd.forward_ad.unpack_dual(student(points(5, 1, 4, 4), T, R, CONDITION)).tangent is None


def test_a_student_behind_autocast_has_a_derivative_of_that_precision(student: FlowMapStudent):
    net, x, v = student.float(), points(5, 1, 4, 4).float(), points(5, 1, 4, 4, seed=1).float()

    def reduced(x_t: Tensor, *rest: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x_t, *rest).float()

    exact = derivative(net, x, v, T.float(), R.float(), CONDITION)
    ours = derivative(reduced, x, v, T.float(), R.float(), CONDITION)
    assert ours.dtype == torch.float32
    relative = (ours - exact).norm() / exact.norm()
    assert 1e-5 < relative < 0.05  # bfloat16 keeps 8 bits


def test_a_detached_student_is_refused():
    with pytest.raises(ValueError, match="something in it detaches them"):
        derivative(lambda x, t, r, c: (2 * x).detach(), points(5, 1, 2, 2), points(5, 1, 2, 2), T, R, CONDITION)


class Cubed(torch.autograd.Function):
    """An operation without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


def test_an_operation_without_a_rule_is_not_passed_over():
    with pytest.raises(NotImplementedError, match="jvp"):
        derivative(lambda x, t, r, c: Cubed.apply(x), points(5, 1, 2, 2), points(5, 1, 2, 2), T, R, CONDITION)


CONSTANT = points(5, 2, 3, 4, seed=7)
MASK = torch.ones(3, 3, dtype=torch.bool).tril()
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, t: F.linear(x, CONSTANT[:4, 0, 0], CONSTANT[0, 0, 0]),
    "linear, named": lambda x, t: F.linear(input=x, weight=CONSTANT[:4, 0, 0]),
    "layer norm": lambda x, t: F.layer_norm(x, [4]),
    "layer norm, affine": lambda x, t: F.layer_norm(x, [4], CONSTANT[0, 0, 0], CONSTANT[0, 0, 1], 1e-3),
    "layer norm, module": lambda x, t: nn.LayerNorm(4).double()(x),
    "layer norm, two axes": lambda x, t: F.layer_norm(x, [3, 4]),
    "self-attention": lambda x, t: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
    "cross-attention": lambda x, t: F.scaled_dot_product_attention(x, CONSTANT, CONSTANT.cos()),
    "attention to values": lambda x, t: F.scaled_dot_product_attention(CONSTANT, CONSTANT.cos(), x),
    "masked": lambda x, t: F.scaled_dot_product_attention(x, x.sin(), x.cos(), attn_mask=MASK),
    "causal": lambda x, t: F.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True),
    "scaled": lambda x, t: F.scaled_dot_product_attention(x, x.sin(), x.cos(), scale=0.2),
    "sums": lambda x, t: (1 + x) + CONSTANT + x[:, :1, :1] + torch.add(x, 2.0) + torch.add(x, CONSTANT, alpha=3),
    "wider sums": lambda x, t: wide(t, x) + CONSTANT + torch.zeros(4).double(),
    "products": lambda x, t: (2 * x) * CONSTANT * x.mul(CONSTANT) + torch.mul(CONSTANT, x) + wide(t, x) * CONSTANT,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_rule_is_the_limit_of_differences(name: str):
    operation = OPERATIONS[name]
    x, v = points(5, 2, 3, 4, seed=2), points(5, 2, 3, 4, seed=3)
    expected = sixth_order(lambda s: operation(x + s * v, T + s), 2e-3)
    assert expected.abs().max() > 0.05
    ours = derivative(lambda x_, t_, r_, c_: operation(x_, t_), x, v, T, R, CONDITION)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("epsilon", [1e-2, 2e-2])
def test_differences_are_of_second_order_at_every_time(student: FlowMapStudent, epsilon: float):
    x, v = points(5, 1, 4, 4), points(5, 1, 4, 4, seed=1)
    t, r = torch.tensor([1.0, 0.9995, 0.5, 0.0005, 0.0], dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    exact, u = derivative(student, x, v, t, r, CONDITION), student(x, t, r, CONDITION).detach()

    def errors(step: float) -> Tensor:
        ours = difference(student, x, v, t, r, CONDITION, u, epsilon=step)
        return (ours - exact).flatten(1).norm(dim=1)

    ratio = errors(epsilon / 4) / errors(epsilon / 8)
    assert ((ratio > 3.4) & (ratio < 4.6)).all(), ratio


def test_differences_stay_within_the_times_that_there_are():
    seen: list[Tensor] = []

    def student(x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        seen.append(t)
        return wide(t, x) ** 2 + 0 * x

    t = torch.tensor([1.0, 0.98, 0.5, 0.01, 0.0], dtype=torch.float64)
    x = points(5, 1, 1, 1)
    ours = difference(student, x, x, t, 0 * t, CONDITION, wide(t, x) ** 2, epsilon=0.1)
    assert seen[0].min() >= 0 and seen[0].max() <= 1
    # Exact for a parabola, whichever side the calls lie on.
    torch.testing.assert_close(ours, wide(2 * t, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("flow", "longest"), [(GAUSSIAN, 1.0), (replace(PLANE, substeps=42), 0.2)], ids=["gaussian", "mixture"]
)
def test_the_identity_of_mean_velocities(flow: GaussianFlow | MixtureFlow, longest: float):
    """``u = v - (t - r) du/dt`` along the exact flow; with the other sign it is far from true."""
    x, r = points(5, 2, 1, 1, seed=4), torch.maximum(R, T - longest)
    v, u = flow.velocity(x, T), flow.mean_velocity(x, T, r)
    change = wide(T - r, x) * derivative(
        lambda x_, t_, r_, c_: flow.mean_velocity(x_, t_, r_), x, v, T, r, no_condition(5)
    )
    torch.testing.assert_close(u, v - change, rtol=1e-9, atol=1e-9)
    assert (u - (v + change)).abs().max() > 0.1
