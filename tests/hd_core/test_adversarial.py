"""The adversarial losses in numbers and at the optimal discriminator."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hd_core.objectives.adversarial import Adversarial, accuracy, token_entropy
from hd_core.types import Condition, Judgement
from tests.oracles import GAUSSIAN, no_condition, points
from tests.toys import (
    SHAPE,
    cast_with,
    draws_of,
    exact_student,
)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


class TestAdversarial:
    REAL = torch.tensor([[2.0, 0.5], [-1.0, 1.0]], dtype=torch.float64)
    FAKE = torch.tensor([[-3.0, 0.25], [0.0, -1.0]], dtype=torch.float64)

    def test_hinge_in_numbers(self):
        hinge = Adversarial(loss="hinge")
        # Row 0: relu(1 - 2) = 0 and relu(0.5) = 0.5; relu(1 - 3) = 0 and relu(1.25) = 1.25. Row 1: 2, 0; 1, 0.
        assert hinge.discriminator_loss(self.REAL, self.FAKE).tolist() == [0.25 * (0.5 + 1.25), 0.25 * (2 + 1)]
        assert hinge.generator_loss(self.FAKE).tolist() == [1.375, 0.5]

    def test_softplus_in_numbers(self):
        saturating = Adversarial(loss="softplus")
        expected = (softplus(-2) + softplus(-3) + softplus(-0.5) + softplus(0.25)) / 2
        assert saturating.discriminator_loss(self.REAL, self.FAKE)[0].item() == pytest.approx(expected, rel=1e-12)
        assert saturating.generator_loss(self.FAKE)[0].item() == pytest.approx(
            (softplus(3) + softplus(-0.25)) / 2, rel=1e-12
        )

    def test_relativistic_in_numbers(self):
        """A row's logit counts only against that of the real row beside it."""
        pairs = Adversarial(loss="relativistic")
        # real - fake: row 0: 5 and 0.25; row 1: -1 and 2.
        for row, (first, second) in enumerate(((5, 0.25), (-1, 2))):
            discriminator = pairs.discriminator_loss(self.REAL, self.FAKE)[row].item()
            assert discriminator == pytest.approx((softplus(-first) + softplus(-second)) / 2, rel=1e-12)
            generator = pairs.generator_loss(self.FAKE, self.REAL)[row].item()
            assert generator == pytest.approx((softplus(first) + softplus(second)) / 2, rel=1e-12)
        shifted = pairs.discriminator_loss(self.REAL + 7, self.FAKE + 7)
        torch.testing.assert_close(shifted, pairs.discriminator_loss(self.REAL, self.FAKE), rtol=1e-12, atol=1e-15)

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
        assert token_entropy(torch.ones(2, 3, 1, 1)).item() == 1.0  # one token of one: uniform
        assert token_entropy(uniform).item() == pytest.approx(1.0, rel=1e-6)  # float32
        assert token_entropy(single).item() == 0.0
        assert token_entropy(half).item() == pytest.approx(0.5, rel=1e-6)

    @pytest.mark.parametrize("fields", [{"weight": -0.1}, {"time_std": -1.0}, {"r1_weight": -1.0}, {"r1_sigma": 0.0}])
    def test_mistakes_are_named(self, fields: dict[str, float]):
        with pytest.raises(ValueError, match=r"must not be negative.*; given"):
            Adversarial(**fields)  # pyright: ignore[reportArgumentType]
