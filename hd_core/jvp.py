"""The total derivative ``du/dt = v . grad_x u + d_t u`` of a flow map along a velocity, exact or by differences.

Forward-mode differentiation of a transformer is slow in torch: every weight is given a tangent of zeros, and no fused
attention has a rule. The operations that carry a transformer's cost are therefore differentiated here by hand; all
others keep torch's own rules, so any network that torch can differentiate forwards may be given, wrapped or not.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hd_core.paths import expand
from hd_core.types import Condition, FlowMap, Images, Times

_ONE_AT_A_TIME = threading.Lock()
"""torch keeps the level of forward-mode differentiation for the whole process."""


@torch.no_grad()
def derivative(student: FlowMap, x_t: Images, v: Images, t: Times, r: Times, condition: Condition) -> Images:
    """``du/dt`` at each row by one forward-mode pass with the tangents ``(v, 1, 0)`` of ``(x_t, t, r)``; detached.

    Raises:
        NotImplementedError: an operation of the network has no forward-mode rule.
        ValueError: the network cuts its output off from its inputs, by ``detach`` or outside torch.
    """
    with _ONE_AT_A_TIME, forward_ad.dual_level(), _HandWritten():
        x_dual = _Dual(x_t, v.to(x_t)).join()
        t_dual = _Dual(t, torch.ones_like(t)).join()
        tangent = _Dual.of(student(x_dual, t_dual, r, condition)).tangent
    if tangent is None:
        raise ValueError(
            "the student's output carries no derivative by its state or time: something in it detaches them"
        )
    return tangent


@torch.no_grad()
def difference(
    student: FlowMap, x_t: Images, v: Images, t: Times, r: Times, condition: Condition, u: Images, *, epsilon: float
) -> Images:
    """``du/dt`` at each row from two calls along ``(x_t + s v, t + s, r)``, with an error of order ``epsilon^2``.

    Central in the middle, ``(u_+ - u_-) / (2 epsilon)``. Where that would leave [0, 1] both calls lie inwards, and
    ``u`` at the point itself is the third: ``(-3 u + 4 u_1 - u_2) / (2 epsilon)``, inwards being forwards at ``t = 0``.
    """
    inwards = (t < epsilon).to(t) - (t > 1 - epsilon).to(t)
    first = torch.where(inwards == 0, epsilon, epsilon * inwards)
    second = torch.where(inwards == 0, -epsilon, 2 * epsilon * inwards)
    shifts, ends = torch.cat([first, second]), torch.cat([t, t])
    x = torch.cat([x_t, x_t]) + expand(shifts, x_t) * torch.cat([v, v])
    u_1, u_2 = student(x, ends + shifts, torch.cat([r, r]), condition.joined(condition)).chunk(2)
    side = expand(inwards, x_t)
    return torch.where(side == 0, u_1 - u_2, side * (4 * u_1 - u_2 - 3 * u)) / (2 * epsilon)


class _Dual(NamedTuple):
    """A value and its derivative; a constant has none."""

    primal: Tensor
    tangent: Tensor | None

    @staticmethod
    def of(value: Tensor) -> "_Dual":
        primal, tangent = forward_ad.unpack_dual(value)  # pyright: ignore[reportUnknownMemberType]
        return _Dual(primal, tangent)

    def join(self) -> Tensor:
        """torch's dual tensor."""
        if self.tangent is None:
            return self.primal
        tangent = self.tangent.to(self.primal.dtype)
        return forward_ad.make_dual(self.primal, tangent)  # pyright: ignore[reportUnknownMemberType]

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Dual":
        """A linear function of the value."""
        return _Dual(function(self.primal), None if self.tangent is None else function(self.tangent))

    def matmul(self, other: "_Dual") -> "_Dual":
        left = None if self.tangent is None else self.tangent @ other.primal
        right = None if other.tangent is None else self.primal @ other.tangent
        tangent = left if right is None else right if left is None else left + right
        return _Dual(self.primal @ other.primal, tangent)


Rule = Callable[..., Tensor]


def _linear(function: Rule, value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = _Dual.of(value)
    if x.tangent is None:
        return function(value, weight, bias)
    return _Dual(function(x.primal, weight, bias), function(x.tangent, weight)).join()


def _layer_norm(
    function: Rule,
    value: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """With ``y = (x - mean) / s``: ``dy = (dx - mean(dx) - y mean(y dx)) / s``."""
    x = _Dual.of(value)
    if x.tangent is None or len(normalized_shape) > 1:
        return function(value, normalized_shape, weight, bias, eps)
    y, _, inverse = torch.native_layer_norm(x.primal, list(normalized_shape), None, None, eps)
    centred = x.tangent - x.tangent.mean(-1, keepdim=True)
    tangent = torch.addcmul(centred, y, (x.tangent * y).mean(-1, keepdim=True), value=-1) * inverse
    scaled = _Dual(y, tangent) if weight is None else _Dual(y, tangent).map(lambda part: part * weight)
    return _Dual(scaled.primal if bias is None else scaled.primal + bias, scaled.tangent).join()


def _attention(
    function: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``a = softmax(q k^T)``, ``da = a (ds - sum(a ds))``; with masks torch's unfused form, which has rules."""
    q, k, v = (_Dual.of(part) for part in (query, key, value))
    if attn_mask is not None or dropout_p or is_causal or options or q.tangent is k.tangent is v.tangent is None:
        with sdpa_kernel(SDPBackend.MATH):
            return function(query, key, value, attn_mask, dropout_p, is_causal, **options)
    scale = query.shape[-1] ** -0.5
    # One copy each: they are used twice, and a product of strided heads copies them every time.
    q, k, v = q.map(lambda part: part.contiguous() * scale), k.map(Tensor.contiguous), v.map(Tensor.contiguous)
    scores = q.matmul(k.map(lambda part: part.transpose(-1, -2)))
    weights = scores.primal.softmax(-1)
    if scores.tangent is None:
        return _Dual(weights, None).matmul(v).join()
    moved = weights * scores.tangent
    return _Dual(weights, torch.addcmul(moved, weights, moved.sum(-1, keepdim=True), value=-1)).matmul(v).join()


def _with_constant(function: Rule, left: Any, right: Any, *rest: Any, product: bool, **options: Any) -> Tensor:
    """A sum or a product whose other operand is constant."""
    pairs = [_Dual.of(part) if isinstance(part, Tensor) else _Dual(part, None) for part in (left, right)]
    moving = [pair.tangent for pair in pairs if pair.tangent is not None]
    if len(moving) != 1 or rest or options:
        return function(left, right, *rest, **options)
    primal = function(pairs[0].primal, pairs[1].primal)
    if not product:
        return _Dual(primal, moving[0].expand_as(primal)).join()
    constant = next(pair.primal for pair in pairs if pair.tangent is None)
    return _Dual(primal, moving[0] * constant).join()


def _sum(function: Rule, left: Any, right: Any, *rest: Any, **options: Any) -> Tensor:
    return _with_constant(function, left, right, *rest, product=False, **options)


def _product(function: Rule, left: Any, right: Any, *rest: Any, **options: Any) -> Tensor:
    return _with_constant(function, left, right, *rest, product=True, **options)


_RULES: dict[Any, Rule] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__], _sum),
    **dict.fromkeys([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], _product),
}


class _HandWritten(TorchFunctionMode):
    """Routes the operations that have a rule here to it."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func) if args else None  # the rules take the value itself by position
        return func(*args, **(kwargs or {})) if rule is None else rule(func, *args, **(kwargs or {}))
