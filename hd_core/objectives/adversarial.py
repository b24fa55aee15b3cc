"""The adversarial game on noised images, seen through a frozen teacher's features (HD stage 2; DMD2, LADD).

Pure functions and the noise level at which the discriminator looks. Logits are large for real.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hd_core.objectives.turns import Cast
from hd_core.paths import interpolate
from hd_core.random import Draws
from hd_core.types import Condition, Images, Judgement, PerSample

Logits = Float[Tensor, "b layers"]


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The discriminator's part of a refinement."""

    weight: float = 0.1
    """Weight of the generator's adversarial term against the distribution matching term; 0 leaves it out."""
    loss: Literal["hinge", "softplus"] = "hinge"
    """hinge (StyleGAN-T, LADD) or the non-saturating softplus (DMD2)."""
    time_mean: float = -0.6
    """Mean of the logit of the time at which the discriminator looks; low times show detail."""
    time_std: float = 1.0
    """Spread of that logit."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.time_std < 0:
            raise ValueError(f"weight and time_std must not be negative; given {self.weight} and {self.time_std}")

    def judge(self, cast: Cast, images: Images, condition: Condition, draws: Draws, tag: str) -> Judgement:
        """The verdict on images, noised at freshly drawn times under one tag."""
        t = torch.sigmoid(self.time_mean + self.time_std * draws.normal(f"{tag}/time", ()))
        noised = interpolate(images, draws.normal(f"{tag}/noise", images.shape[1:]), t)
        return cast.judge(cast.taps(noised, t, condition))

    def discriminator_loss(self, real: Logits, fake: Logits) -> PerSample:
        """What the discriminator minimises, averaged over layers."""
        if self.loss == "hinge":
            return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(1)
        return (F.softplus(-real) + F.softplus(fake)).mean(1)

    def generator_loss(self, fake: Logits) -> PerSample:
        """What the generator minimises: to be taken for real, averaged over layers."""
        return -fake.mean(1) if self.loss == "hinge" else F.softplus(-fake).mean(1)


class Accuracy(NamedTuple):
    """Share of real and of fake rows that the discriminator gets right."""

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]


def accuracy(real: Logits, fake: Logits) -> Accuracy:
    """How often the sign of the logit is right."""
    return Accuracy((real > 0).float().mean(), (fake < 0).float().mean())


def token_entropy(weights: Float[Tensor, "b layers heads n"]) -> Float[Tensor, ""]:
    """Entropy of the token weights over its maximum: 1 is uniform, 0 is a single token."""
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1)
    return entropy.mean() / torch.log(torch.tensor(float(weights.shape[-1])))
