"""Classifier-free guidance: the formula, and one doubled call."""

import pytest
import torch
from torch import Tensor

from hd_core.guidance import guided
from hd_core.types import Condition
from tests.oracles import points

NULL = Condition(labels=torch.tensor([9]))


class Recorded:
    """A velocity that depends on everything, and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Condition]] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((x_t, t, condition))
        assert condition.labels is not None
        return (x_t + t.reshape(-1, 1, 1, 1)) * (1 + condition.labels).reshape(-1, 1, 1, 1)


def test_scale_one_is_the_velocity_itself():
    velocity = Recorded()
    assert guided(velocity, NULL, 1.0) is velocity
    assert guided(velocity, None, 1.0) is velocity


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_formula_row_by_row_in_one_call(scale: float):
    velocity, x, t = Recorded(), points(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    condition = Condition(labels=torch.tensor([1, 0, 4]))
    out = guided(velocity, NULL, scale)(x, t, condition)
    assert len(velocity.calls) == 1
    plain = Recorded()
    conditional, null = plain(x, t, condition), plain(x, t, Condition(labels=torch.tensor([9, 9, 9])))
    torch.testing.assert_close(out, null + scale * (conditional - null), rtol=1e-13, atol=0)


def test_text_conditions_are_joined_with_their_masks():
    text = Condition(embeddings=points(2, 3, 4, seed=1), mask=torch.tensor([[True, True, False], [True, False, False]]))
    null = Condition(embeddings=torch.zeros(1, 3, 4, dtype=torch.float64), mask=torch.ones(1, 3, dtype=torch.bool))

    def velocity(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.embeddings is not None
        assert condition.mask is not None
        said = (condition.embeddings.sum(2) * condition.mask).sum(1)
        return x_t + said.reshape(-1, 1, 1, 1)

    x, t = points(2, 1, 2, 2), torch.tensor([0.2, 0.4], dtype=torch.float64)
    expected = x + 3 * (velocity(x, t, text) - x)  # the null text says 0
    torch.testing.assert_close(guided(velocity, null, 3.0)(x, t, text), expected, rtol=1e-12, atol=1e-12)


def test_guidance_without_a_null_condition_is_refused():
    with pytest.raises(ValueError, match=r"scale 2\.0 needs a null condition"):
        guided(Recorded(), None, 2.0)
