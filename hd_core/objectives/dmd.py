"""Distribution matching distillation of a one-step generator, with an adversarial term (HD stage 2; DMD2).

The generator's samples are noised to a time ``tau``; the frozen teacher (real score) and a network that follows the
generator (fake score) each say where the data end lies. Their difference is the gradient of the KL divergence between
the two noised distributions, and is applied to the sample as if it were a loss's gradient (Yin et al. 2024).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from hd_core.objectives.adversarial import Adversarial, accuracy, token_entropy
from hd_core.objectives.turns import Batch, Cast, Need, PlayerName, Terms, Turn, Turns
from hd_core.paths import denoised, expand, flatten_mean, interpolate, jump, velocity
from hd_core.random import Draws
from hd_core.times import custom
from hd_core.types import Condition, FlowMap, Grid, Images, PerSample


@dataclass(frozen=True, kw_only=True)
class DMD:
    """Distribution matching with a fake score and, where ``adversarial.weight`` is above 0, a discriminator."""

    name: Literal["dmd"] = "dmd"
    update_ratio: int = 5
    """Moves of fake score and discriminator for each move of the generator."""
    tau_min: float = 0.02
    """Least time at which the two scores are compared."""
    tau_max: float = 0.98
    """Greatest time at which the two scores are compared."""
    adversarial: Adversarial = field(default_factory=Adversarial)
    """The discriminator's part."""

    def __post_init__(self) -> None:
        if self.update_ratio < 1:
            raise ValueError(f"update_ratio must be at least 1; given {self.update_ratio}")
        if not 0 < self.tau_min < self.tau_max < 1:
            raise ValueError(f"needed: 0 < tau_min < tau_max < 1; given {self.tau_min} and {self.tau_max}")

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ("student", "fake_score", "discriminator") if self.adversarial.weight else ("student", "fake_score")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"images", "features"}) if self.adversarial.weight else frozenset()

    def sampling_grid(self) -> Grid:
        return custom([1.0, 0.0])

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        with torch.no_grad():
            fake = generate(cast.student, batch.noise, batch.condition)
        yield Turn(player="fake_score", terms=partial(self._fake_score, cast, fake, batch.condition, draws))
        if self.adversarial.weight:
            yield Turn(player="discriminator", terms=partial(self._discriminator, cast, fake, batch, draws))
        if step % self.update_ratio == 0:
            yield Turn(player="student", terms=partial(self._student, cast, batch, draws))

    def _fake_score(self, cast: Cast, fake: Images, condition: Condition, draws: Draws) -> Terms:
        t, eps = draws.uniform("fake/time"), draws.normal("fake/noise", fake.shape[1:])
        v = cast.fake(interpolate(fake, eps, t), t, condition)
        return Terms(losses={"fake_score": flatten_mean((v - velocity(fake, eps)).square())})

    def _discriminator(self, cast: Cast, fake: Images, batch: Batch, draws: Draws) -> Terms:
        assert batch.images is not None and batch.images_condition is not None
        on_real = self.adversarial.judge(cast, batch.images, batch.images_condition, draws, "judge/real")
        on_fake = self.adversarial.judge(cast, fake, batch.condition, draws, "judge/fake")
        right = accuracy(on_real.logits, on_fake.logits)
        metrics = {
            "real_logit": on_real.logits.detach().mean(),
            "fake_logit": on_fake.logits.detach().mean(),
            "accuracy_real": right.real,
            "accuracy_fake": right.fake,
            "token_entropy": token_entropy(on_fake.weights.detach()),
        }
        loss = self.adversarial.discriminator_loss(on_real.logits, on_fake.logits)
        return Terms(losses={"discriminator": loss}, metrics=metrics)

    def _student(self, cast: Cast, batch: Batch, draws: Draws) -> Terms:
        x = generate(cast.student, batch.noise, batch.condition)
        tau = draws.uniform("match/time", self.tau_min, self.tau_max)
        x_tau = interpolate(x.detach(), draws.normal("match/noise", x.shape[1:]), tau)
        with torch.no_grad():
            real = denoised(x_tau, cast.teacher(x_tau, tau, batch.condition), tau)
            fake = denoised(x_tau, cast.fake(x_tau, tau, batch.condition), tau)
        gradient = matching_gradient(x.detach(), real, fake)
        losses = {"matching": matching_loss(x, gradient)}
        if self.adversarial.weight:
            judged = self.adversarial.judge(cast, x, batch.condition, draws, "judge/student")
            losses["adversarial"] = self.adversarial.weight * self.adversarial.generator_loss(judged.logits)
        return Terms(losses=losses, metrics={"matching_gradient": flatten_mean(gradient.abs()).mean()})


def generate(student: FlowMap, noise: Images, condition: Condition) -> Images:
    """One step from noise to data."""
    t, r = noise.new_ones(len(noise)), noise.new_zeros(len(noise))
    return jump(noise, student(noise, t, r, condition), t, r)


def matching_gradient(x: Images, real: Images, fake: Images) -> Images:
    """DMD's normalised gradient at the sample: ``(D_fake - D_real) / mean |x - D_real|`` (DMD2, Eq. 3 as released)."""
    scale = flatten_mean((x - real).abs()).clamp_min(1e-6)
    return torch.nan_to_num((fake - real) / expand(scale, x))


def matching_loss(x: Images, gradient: Images) -> PerSample:
    """A loss per row whose gradient in ``x`` is ``gradient / pixels``: ``1/2 mean (x - sg[x - gradient])^2``."""
    return 0.5 * flatten_mean((x - (x - gradient).detach()).square())
