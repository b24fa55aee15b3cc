"""What the adversarial term adds to the turns of distribution matching: its weight, its penalty, its game."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hd_core.objectives.adversarial import Adversarial
from hd_core.objectives.dmd import DMD
from hd_core.objectives.turns import Batch, Turn
from hd_core.step import only
from hd_core.types import Condition, Judgement
from tests.oracles import GAUSSIAN, GaussianFlow, points
from tests.toys import (
    SHAPE,
    Generator,
    Samples,
    batch_of,
    cast_of,
    cast_with,
    draws_of,
    means_among,
    networks,
    noise_batch,
    play,
    rows_of,
)


def pixels(x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
    """Features: each pixel is a token."""
    return [x_t.flatten(1)[:, :, None]]


def smooth_judge(features: list[Tensor]) -> Judgement:
    """A logit that is not linear in the pixels, so that its gradient differs from row to row."""
    tokens = features[0][:, :, 0]
    logits = torch.stack([tokens.square().mean(1), tokens.sin().sum(1)], dim=1)
    return Judgement(logits=logits, weights=torch.full((len(tokens), 2, 1, 4), 0.25))


def with_images(rows: int) -> Batch:
    batch = noise_batch(rows, *SHAPE)
    return replace(batch, images=points(rows, *SHAPE, seed=3), images_condition=batch.condition)


def turns_of(
    adversarial: Adversarial, samples: Samples, batch: Batch, *, step: int = 0, **others: object
) -> dict[str, Turn]:
    rows = len(batch.noise)
    usual = {"fake_score": GaussianFlow(mean=0.2, std=0.9), "features": pixels, "discriminator": smooth_judge}
    cast = cast_with(samples, **{**usual, **others})
    objective = DMD(update_ratio=1, adversarial=adversarial)
    return {turn.player: turn for turn in objective.turns(cast, batch, draws_of(slice(0, rows), rows), step)}


def test_the_generator_heeds_the_discriminator_after_its_warm_up_alone():
    adversarial = Adversarial(weight=0.3, warmup_steps=3)
    for step, heeded in ((0, False), (2, False), (3, True), (9, True)):
        turns = turns_of(adversarial, Samples(points(4, *SHAPE, seed=5)), with_images(4), step=step)
        assert set(turns) == {"fake_score", "discriminator", "student"}
        student = turns["student"].terms()
        assert ("adversarial" in student.losses) == ("gradient/adversarial" in student.metrics) == heeded
        assert student.losses.keys() >= {"matching"} and "gradient/matching" in student.metrics


class TestMatchedWeight:
    @staticmethod
    def norm(loss: Tensor, x: Tensor) -> float:
        """Root mean square over rows of the norm of each row's own gradient at its sample."""
        (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        return gradient.flatten(1).square().sum(1).mean().sqrt().item()

    @pytest.mark.parametrize("loss", ["hinge", "softplus", "relativistic"])
    @pytest.mark.parametrize("weight", [0.25, 3.0])
    def test_the_ratio_of_the_norms_is_the_weight(self, loss: str, weight: float):
        samples = Samples(points(5, *SHAPE, seed=4))
        adversarial = Adversarial(weight=weight, weighting="matched", loss=loss)  # pyright: ignore[reportArgumentType]
        terms = turns_of(adversarial, samples, with_images(5))["student"].terms()
        matching, adverse = (self.norm(terms.losses[name], samples.x) for name in ("matching", "adversarial"))
        assert adverse == pytest.approx(weight * matching, rel=1e-9)
        assert terms.metrics["gradient/matching"].item() == pytest.approx(matching, rel=1e-9)
        assert terms.metrics["gradient/adversarial"].item() == pytest.approx(adverse, rel=1e-9)
        fixed = turns_of(replace(adversarial, weighting="fixed"), samples, with_images(5))["student"].terms()
        effective = terms.metrics["adversarial_weight"] / weight
        torch.testing.assert_close(
            terms.losses["adversarial"], effective * fixed.losses["adversarial"], rtol=1e-10, atol=0
        )

    @pytest.mark.parametrize("loss", ["hinge", "softplus", "relativistic"])
    def test_a_fixed_weight_is_that_of_the_loss(self, loss: str):
        """Value and gradient of the row's loss, by one graph from the sample through teacher and judge."""
        samples, batch = Samples(points(5, *SHAPE, seed=4)), with_images(5)
        adversarial, draws = Adversarial(weight=0.3, loss=loss), draws_of(slice(0, 5), 5)  # pyright: ignore
        terms = turns_of(adversarial, samples, batch)["student"].terms()
        x = samples.x.detach().requires_grad_()

        def logits(images: Tensor, tag: str) -> Tensor:
            t = torch.sigmoid(-0.6 + draws.normal(f"{tag}/time", ())).double().reshape(-1, 1, 1, 1)
            noised = (1 - t) * images + t * draws.normal(f"{tag}/noise", SHAPE)
            return smooth_judge(pixels(noised, t, batch.condition)).logits

        fake = logits(x, "judge/student")
        assert batch.images is not None
        real = logits(batch.images, "judge/student/real")
        cost = {"hinge": -fake, "softplus": F.softplus(-fake), "relativistic": F.softplus(real - fake)}[loss]
        expected = 0.3 * cost.mean(1)
        torch.testing.assert_close(terms.losses["adversarial"], expected, rtol=1e-6, atol=1e-9)
        ours, longhand = (
            torch.autograd.grad(row.sum(), leaf)[0]
            for row, leaf in ((terms.losses["adversarial"], samples.x), (expected, x))
        )
        torch.testing.assert_close(ours, longhand, rtol=1e-5, atol=1e-8)
        assert terms.metrics["adversarial_weight"].item() == pytest.approx(0.3)

    def test_a_judge_without_an_opinion_weighs_nothing(self):
        def indifferent(features: list[Tensor]) -> Judgement:
            judgement = smooth_judge(features)
            return Judgement(logits=0 * judgement.logits, weights=judgement.weights)

        samples = Samples(points(5, *SHAPE, seed=4))
        turns = turns_of(Adversarial(weighting="matched"), samples, with_images(5), discriminator=indifferent)
        terms = turns["student"].terms()
        terms.total.backward()
        assert terms.metrics["adversarial_weight"].item() == 0
        assert samples.x.grad is not None
        assert samples.x.grad.isfinite().all()

    def test_workers_that_share_a_mean_weigh_alike(self):
        objective = DMD(update_ratio=1, adversarial=Adversarial(weight=0.7, weighting="matched"))
        batch, parts = batch_of(6), (slice(0, 2), slice(2, 4), slice(4, 6))
        whole = play(objective, networks(objective.players), batch, draws_of(slice(0, 6), 6))[-1][1]
        made = [networks(objective.players) for _ in parts]

        def effective(rank: int, mean: Callable[[Tensor], Tensor]) -> float:
            rows = parts[rank]
            played = play(objective, made[rank], rows_of(batch, rows), draws_of(rows, 6), mean=mean)
            return played[-1][1].metrics["adversarial_weight"].item()

        with ThreadPoolExecutor(3) as threads:
            shared = list(threads.map(effective, range(3), means_among(3)))
        assert shared == pytest.approx([whole.metrics["adversarial_weight"].item()] * 3, rel=1e-9)
        alone = [effective(rank, lambda value: value) for rank in range(3)]
        assert max(alone) / min(alone) > 1.001  # the comparison can tell


class TestPenalty:
    def penalty(self, judge: Callable[..., Judgement], sigma: float = 0.2) -> Tensor:
        adversarial = Adversarial(r1_weight=5.0, r1_sigma=sigma)
        turns = turns_of(adversarial, Samples(points(6, *SHAPE)), with_images(6), discriminator=judge)
        return turns["discriminator"].terms().losses["r1"]

    def test_a_constant_judge_pays_nothing(self):
        def constant(features: list[Tensor]) -> Judgement:
            judgement = smooth_judge(features)
            return Judgement(logits=torch.ones_like(judgement.logits), weights=judgement.weights)

        assert self.penalty(constant).tolist() == [0.0] * 6

    def test_longhand(self):
        """``D`` reads the mean pixel: it moves by the spread times the mean of the added noise."""

        def mean_pixel(features: list[Tensor]) -> Judgement:
            logits = features[0].mean((1, 2))[:, None]
            return Judgement(logits=logits, weights=torch.full((len(logits), 1, 1, 4), 0.25))

        n = draws_of(slice(0, 6), 6).normal("judge/r1", SHAPE).double()
        expected = 5.0 * (0.2 * n.mean((1, 2, 3))).square()
        torch.testing.assert_close(self.penalty(mean_pixel), expected, rtol=1e-5, atol=1e-9)  # the noise is float32

    def test_the_verdict_on_real_rows_is_the_one_without_a_penalty(self):
        samples, batch = Samples(points(6, *SHAPE)), with_images(6)
        with_, without = (
            turns_of(Adversarial(r1_weight=weight), samples, batch)["discriminator"].terms() for weight in (5.0, 0.0)
        )
        torch.testing.assert_close(with_.losses["discriminator"], without.losses["discriminator"], rtol=1e-12, atol=0)
        assert set(with_.losses) - set(without.losses) == {"r1"}


class TestGame:
    @pytest.mark.parametrize("loss", ["hinge", "relativistic"])
    @pytest.mark.parametrize("share", [False, True])
    def test_real_and_generated_rows_share_their_noise_where_asked(self, share: bool, loss: str):
        seen: list[Tensor] = []

        def taps(x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
            seen.append(x_t.detach())
            return pixels(x_t, t, condition)

        batch = with_images(6)
        assert batch.images is not None
        adversarial = Adversarial(share_times=share, loss=loss)  # pyright: ignore[reportArgumentType]
        turns = turns_of(adversarial, Samples(batch.images), batch, features=taps)
        turns["discriminator"].terms()
        assert torch.allclose(seen[0], seen[1], rtol=1e-12) == share
        turns["student"].terms()
        if loss == "relativistic":
            assert torch.allclose(seen[2], seen[3], rtol=1e-12) == share
        assert not torch.allclose(seen[0], seen[2])

    def test_relativistic_accuracy_compares_pairs(self):
        """A judge that gives every real row a little more than the row beside it is right, whatever the signs."""

        def judge(features: list[Tensor]) -> Judgement:
            logits = 5 + features[0].mean((1, 2))[:, None]
            return Judgement(logits=logits, weights=torch.full((len(logits), 1, 1, 4), 0.25))

        batch = with_images(6)
        assert batch.images is not None
        adversarial = Adversarial(loss="relativistic", share_times=True)
        turns = turns_of(adversarial, Samples(batch.images - 1), batch, discriminator=judge)
        metrics = turns["discriminator"].terms().metrics
        assert metrics["accuracy_real"] == metrics["accuracy_fake"] == 1
        assert metrics["fake_logit"] > 2

    @pytest.mark.parametrize("loss", ["hinge", "softplus", "relativistic"])
    def test_only_its_own_turn_moves_the_discriminators_power_iteration(self, loss: str):
        objective = DMD(update_ratio=1, adversarial=Adversarial(loss=loss, r1_weight=1.0))  # pyright: ignore
        made = networks(objective.players)
        judge, moved = made["discriminator"], []
        for turn in objective.turns(cast_of(made), batch_of(4), draws_of(slice(0, 4), 4), 0):
            before = {name: buffer.clone() for name, buffer in judge.named_buffers()}
            with only(made[turn.player], made.values()):
                turn.terms().total.backward()
            if any(not torch.equal(buffer, before[name]) for name, buffer in judge.named_buffers()):
                moved.append(turn.player)
        assert moved == ["discriminator"]

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

    def test_the_adversarial_term_is_weighted(self):
        losses = []
        for weight in (0.1, 0.3):
            objective = DMD(update_ratio=1, adversarial=Adversarial(weight=weight))
            played = play(objective, networks(objective.players), batch_of(4), draws_of(slice(0, 4), 4))
            losses.append(played[-1][1].losses)
        torch.testing.assert_close(losses[1]["adversarial"], 3 * losses[0]["adversarial"], rtol=1e-12, atol=0)
        assert torch.equal(losses[1]["matching"], losses[0]["matching"])
