"""The adversarial game on noised images, seen through a frozen teacher's features (HD stage 2; DMD2, LADD).

Pure functions and the noise level at which the discriminator looks. Logits are large for real.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hd_core.objectives.turns import Batch, Cast, Terms
from hd_core.paths import interpolate
from hd_core.random import Draws
from hd_core.types import Condition, Images, Judgement, PerSample, Times

Logits = Float[Tensor, "b outputs"]


class Pull(NamedTuple):
    """What the discriminator asks of samples: the generator's loss of each row and its gradient in the row's sample."""

    losses: PerSample
    gradient: Images


class View(NamedTuple):
    """Noised images as the discriminator sees them."""

    x_t: Images
    t: Times


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The discriminator's part of a refinement."""

    weight: float = 0.1
    """Weight of the generator's adversarial term against the distribution matching term; 0 leaves it out."""
    weighting: Literal["fixed", "matched"] = "fixed"
    """fixed: of the loss. matched: of the gradient's norm at the samples, over the whole batch, against the other's."""
    loss: Literal["hinge", "softplus", "relativistic"] = "hinge"
    """hinge (StyleGAN-T, LADD), the non-saturating softplus (DMD2), or softplus of the difference to a real row."""
    time_mean: float = -0.6
    """Mean of the logit of the time at which the discriminator looks; low times show detail."""
    time_std: float = 1.0
    """Spread of that logit."""
    share_times: bool = False
    """Noise a real row and the generated row beside it with the same noise at the same time."""
    r1_weight: float = 0.0
    """Weight of the approximate R1 penalty (APT): how far a little noise moves a real row's logit; 0 leaves it out."""
    r1_sigma: float = 0.1
    """Spread of that noise, which is added to the noised image."""
    warmup_steps: int = 0
    """Iterations in which the discriminator learns and the generator does not heed it yet."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.time_std < 0:
            raise ValueError(f"weight and time_std must not be negative; given {self.weight} and {self.time_std}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative; given {self.warmup_steps}")
        if self.r1_weight < 0 or self.r1_sigma <= 0:
            raise ValueError(
                f"r1_weight must not be negative and r1_sigma positive; given {self.r1_weight} and {self.r1_sigma}"
            )

    # What a turn pays

    def discriminator_terms(self, cast: Cast, fake: Images, batch: Batch, draws: Draws) -> Terms:
        """The discriminator's loss on real rows and on the generator's, and how well it tells them apart."""
        assert batch.images is not None and batch.images_condition is not None
        on_real, penalty = self._on_real(cast, batch.images, batch.images_condition, draws)
        on_fake = self.judge(cast, fake, batch.condition, draws, self._tag("judge/fake", "judge/real"))
        losses = {"discriminator": self.discriminator_loss(on_real.logits, on_fake.logits), **penalty}
        return Terms(losses=losses, metrics=self._metrics(on_real, on_fake))

    def _on_real(
        self, cast: Cast, images: Images, condition: Condition, draws: Draws
    ) -> tuple[Judgement, dict[str, PerSample]]:
        if not self.r1_weight:
            return self.judge(cast, images, condition, draws, "judge/real"), {}
        view, n = self.noised(images, draws, "judge/real"), draws.normal("judge/r1", images.shape[1:])
        # One call, so that spectral norm's estimate is the same for the image and for its neighbour.
        x_t, t = torch.cat([view.x_t, view.x_t + self.r1_sigma * n]), torch.cat([view.t, view.t])
        both = cast.judge(cast.taps(x_t, t, condition.joined(condition)))
        real, neighbour = both.logits.chunk(2)
        on_real = Judgement(logits=real, weights=both.weights[: len(images)])
        return on_real, {"r1": self.r1_weight * (real - neighbour).square().mean(1)}

    def _metrics(self, on_real: Judgement, on_fake: Judgement) -> dict[str, Tensor]:
        real, fake = on_real.logits.detach(), on_fake.logits.detach()
        right = accuracy(real - fake, fake - real) if self.loss == "relativistic" else accuracy(real, fake)
        return {
            "real_logit": real.mean(),
            "fake_logit": fake.mean(),
            "accuracy_real": right.real,
            "accuracy_fake": right.fake,
            "token_entropy": token_entropy(on_fake.weights.detach()),
        }

    def pull(self, cast: Cast, x: Images, batch: Batch, draws: Draws) -> Pull:
        """The weighted loss of generated samples and its gradient in them; nothing flows back into what made them."""
        leaf, tag = x.detach().requires_grad_(), "judge/student"
        fake = self.judge(cast, leaf, batch.condition, draws, tag).logits
        real = None
        if self.loss == "relativistic":
            assert batch.images is not None and batch.images_condition is not None
            with torch.no_grad():
                beside = self._tag("judge/student/real", tag)
                real = self.judge(cast, batch.images, batch.images_condition, draws, beside).logits
        losses = self.weight * self.generator_loss(fake, real)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return Pull(losses.detach(), gradient)

    def scale(self, matching: Float[Tensor, ""], adversarial: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What multiplies `pull`, by the norms of the distribution matching gradient and of `pull`'s."""
        if self.weighting == "fixed":
            return torch.ones_like(matching)
        return torch.where(adversarial > 0, self.weight * matching / adversarial, 0.0)

    # What the discriminator sees

    def judge(self, cast: Cast, images: Images, condition: Condition, draws: Draws, tag: str) -> Judgement:
        """The verdict on images, noised at freshly drawn times under one tag."""
        view = self.noised(images, draws, tag)
        return cast.judge(cast.taps(view.x_t, view.t, condition))

    def noised(self, images: Images, draws: Draws, tag: str) -> View:
        """Images at freshly drawn times, logit-normal, under one tag."""
        t = torch.sigmoid(self.time_mean + self.time_std * draws.normal(f"{tag}/time", ()))
        return View(interpolate(images, draws.normal(f"{tag}/noise", images.shape[1:]), t), t)

    def _tag(self, own: str, beside: str) -> str:
        return beside if self.share_times else own

    # What logits cost

    def discriminator_loss(self, real: Logits, fake: Logits) -> PerSample:
        """What the discriminator minimises, averaged over layers."""
        if self.loss == "hinge":
            return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(1)
        if self.loss == "softplus":
            return (F.softplus(-real) + F.softplus(fake)).mean(1)
        return F.softplus(fake - real).mean(1)

    def generator_loss(self, fake: Logits, real: Logits | None = None) -> PerSample:
        """What the generator minimises, to be taken for real, averaged over layers; relativistic: against ``real``."""
        if self.loss == "hinge":
            return -fake.mean(1)
        if self.loss == "softplus":
            return F.softplus(-fake).mean(1)
        assert real is not None
        return F.softplus(real - fake).mean(1)


class Accuracy(NamedTuple):
    """Share of real and of fake rows that the discriminator gets right."""

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]


def accuracy(real: Logits, fake: Logits) -> Accuracy:
    """How often the sign of the logit is right."""
    return Accuracy((real > 0).float().mean(), (fake < 0).float().mean())


def token_entropy(weights: Float[Tensor, "b layers heads n"]) -> Float[Tensor, ""]:
    """Entropy of the token weights over its maximum: 1 is uniform, 0 is a single token of several."""
    if weights.shape[-1] == 1:
        return weights.new_ones(())
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1)
    return entropy.mean() / torch.log(torch.tensor(float(weights.shape[-1])))
