"""Distribution matching distillation of a generator of one or a few steps, with an adversarial term (HD stage 2; DMD2).

The generator's samples are noised to a time ``tau``; the frozen teacher (real score) and a network that follows the
generator (fake score) each say where the data end lies. Their difference is the gradient of the KL divergence between
the two noised distributions, and is applied to the sample as if it were a loss's gradient (Yin et al. 2024).
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hd_core.objectives.adversarial import Adversarial, Pull
from hd_core.objectives.turns import Batch, Cast, Need, PlayerName, Terms, Turn, Turns
from hd_core.paths import denoised, expand, flatten_mean, interpolate, velocity
from hd_core.random import Draws
from hd_core.times import GridConfig
from hd_core.types import Condition, FlowMap, Grid, Images, PerSample
from hd_core.walk import walk

Weighting = Literal["normalised", "plain"]


@dataclass(frozen=True, kw_only=True)
class DMD:
    """Distribution matching with a fake score and, where ``adversarial.weight`` is above 0, a discriminator."""

    name: Literal["dmd"] = "dmd"
    update_ratio: int = 5
    """Moves of fake score and discriminator for each move of the generator."""
    intervals: int = 1
    """Steps of the generator from noise to data. Each is a network call, but for the first where ``afs`` is on."""
    grid: GridConfig = field(default_factory=GridConfig)
    """How the generator's times are spread."""
    afs: bool = False
    """Analytical first step: the first direction is computed without the network and saves a call."""
    gradient_steps: int = 0
    """How many of the generator's last network calls the gradient goes through; 0: all."""
    tau_min: float = 0.02
    """Least time at which the two scores are compared."""
    tau_max: float = 0.98
    """Greatest time at which the two scores are compared."""
    tau_power: float = 1.0
    """These times have a density in proportion to ``tau^(tau_power - 1)``: 1 is uniform, more favours noise (DMDR)."""
    tau_anneal_steps: int = 0
    """Iterations over which that density goes over, by a cosine, to the uniform one; 0 leaves it as it is."""
    weighting: Weighting = "normalised"
    """normalised: the difference of the scores over each row's mean distance to the teacher's answer (DMD2). plain."""
    floor: float = 1e-6
    """Least value of that distance as a divisor."""
    max_gradient: float = 0.0
    """Clip each row's matching gradient, before it is averaged over pixels, to this root mean square; 0 leaves it."""
    fake_time_min: float = 0.0
    """Least time at which the fake score learns."""
    fake_time_max: float = 1.0
    """Greatest time at which the fake score learns."""
    regression_weight: float = 0.0
    """Weight of a regression to the teacher's own end points, which keeps the sketch in force; needs trajectories."""
    adversarial: Adversarial = field(default_factory=Adversarial)
    """The discriminator's part."""

    def __post_init__(self) -> None:
        self._check_generator()
        if not 0 < self.tau_min < self.tau_max < 1:
            raise ValueError(f"needed: 0 < tau_min < tau_max < 1; given {self.tau_min} and {self.tau_max}")
        if not 0 <= self.fake_time_min < self.fake_time_max <= 1:
            given = f"{self.fake_time_min} and {self.fake_time_max}"
            raise ValueError(f"needed: 0 <= fake_time_min < fake_time_max <= 1; given {given}")
        if self.tau_power <= 0 or self.floor <= 0:
            raise ValueError(f"tau_power and floor must be positive; given {self.tau_power} and {self.floor}")
        for name in ("tau_anneal_steps", "max_gradient", "regression_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; given {getattr(self, name)}")

    def _check_generator(self) -> None:
        if self.update_ratio < 1:
            raise ValueError(f"update_ratio must be at least 1; given {self.update_ratio}")
        least = 2 if self.afs else 1
        if self.intervals < least:
            raise ValueError(f"dmd needs intervals >= {least} (afs: {self.afs}); given {self.intervals}")
        calls = self.intervals - self.afs
        if not 0 <= self.gradient_steps <= calls:
            raise ValueError(f"gradient_steps must lie between 0 and the {calls} calls; given {self.gradient_steps}")

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ("student", "fake_score", "discriminator") if self.adversarial.weight else ("student", "fake_score")

    @property
    def needs(self) -> frozenset[Need]:
        judged: set[Need] = {"images", "features"} if self.adversarial.weight else set()
        regressed: set[Need] = {"trajectories"} if self.regression_weight else set()
        return frozenset(judged | regressed)

    def sampling_grid(self) -> Grid:
        return self.grid.times(self.intervals)

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        moves = step % self.update_ratio == 0
        # Nobody moves the student before its own turn, so one walk serves all turns. Where the generator moves, its
        # graph is kept until then: that saves a forward pass, and its activations lie beside those of the other turns.
        with torch.set_grad_enabled(moves and not cast.frugal):
            x = self.generate(cast.student, batch)
        fake = x.detach()
        yield Turn(player="fake_score", terms=partial(self._fake_score, cast, fake, batch.condition, draws))
        if self.adversarial.weight:
            judged = partial(self.adversarial.discriminator_terms, cast, fake, batch, draws)
            yield Turn(player="discriminator", terms=judged)
        if moves:
            yield Turn(player="student", terms=partial(self._student, cast, x, batch, draws, step))

    def generate(self, student: FlowMap, batch: Batch) -> Images:
        """The generator's samples: a walk from noise, or from the trajectories' where these are regressed to."""
        grid, first = self.sampling_grid(), batch.noise
        if self.regression_weight:
            assert batch.states is not None and batch.grid is not None
            assert torch.allclose(batch.grid[[0, -1]], grid[[0, -1]]), "the stored trajectories have other ends"
            first = batch.states[:, 0]
        return walk(student, grid, first, batch.condition, afs=self.afs, gradient_steps=self.gradient_steps)

    def _fake_score(self, cast: Cast, fake: Images, condition: Condition, draws: Draws) -> Terms:
        t = draws.uniform("fake/time", self.fake_time_min, self.fake_time_max)
        eps = draws.normal("fake/noise", fake.shape[1:])
        v = cast.fake(interpolate(fake, eps, t), t, condition)
        return Terms(losses={"fake_score": flatten_mean((v - velocity(fake, eps)).square())})

    def _student(self, cast: Cast, x: Images, batch: Batch, draws: Draws, step: int) -> Terms:
        x = self.generate(cast.student, batch) if cast.frugal else x
        gradient, zeroed = finite_rows(self.matching(cast, x.detach(), batch.condition, draws, step))
        gradient = clip_rows(gradient, self.max_gradient)
        losses = {"matching": matching_loss(x, gradient)}
        metrics = {"matching_gradient": flatten_mean(gradient.abs()).mean(), "non_finite_rows": zeroed}
        # `matching_loss` averages over pixels, and so does its gradient at the sample.
        square = square_norm(gradient) / gradient[0].numel() ** 2
        if self.adversarial.weight and step >= self.adversarial.warmup_steps:
            losses["adversarial"], more = self._adversarial(cast, x, batch, draws, square)
        else:
            more = {"gradient/matching": cast.mean(square).sqrt()}
        if self.regression_weight:
            assert batch.states is not None
            losses["regression"] = self.regression_weight * flatten_mean((x - batch.states[:, -1]).square())
        return Terms(losses=losses, metrics={**metrics, **more})

    def matching(self, cast: Cast, x: Images, condition: Condition, draws: Draws, step: int) -> Images:
        """The matching gradient at detached samples."""
        tau = self.times(draws, step)
        x_tau = interpolate(x, draws.normal("match/noise", x.shape[1:]), tau)
        with torch.no_grad():
            real = denoised(x_tau, cast.teacher(x_tau, tau, condition), tau)
            fake = denoised(x_tau, cast.fake(x_tau, tau, condition), tau)
        return matching_gradient(x, real, fake, weighting=self.weighting, floor=self.floor)

    def times(self, draws: Draws, step: int) -> PerSample:
        """The times at which an iteration compares the scores, by the inverse of their distribution function."""
        power = self.tau_power
        if self.tau_anneal_steps:
            power = 1 + (power - 1) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.tau_anneal_steps)))
        return draws.uniform("match/time", self.tau_min**power, self.tau_max**power) ** (1 / power)

    def _adversarial(
        self, cast: Cast, x: Images, batch: Batch, draws: Draws, matching_square: Float[Tensor, ""]
    ) -> tuple[PerSample, dict[str, Tensor]]:
        losses, gradient = self.adversarial.pull(cast, x, batch, draws)
        gradient, zeroed = finite_rows(gradient)
        # Over the global batch, so that a matched weight is the same on every worker.
        matching, adversarial = cast.mean(torch.stack([matching_square, square_norm(gradient)])).sqrt()
        scale = self.adversarial.scale(matching, adversarial)
        metrics = {
            "gradient/matching": matching,
            "gradient/adversarial": scale * adversarial,
            "adversarial_weight": scale * self.adversarial.weight,
            "non_finite_adversarial_rows": zeroed,
        }
        return linearised(x, Pull(scale * losses, scale * gradient)), metrics


def matching_gradient(
    x: Images, real: Images, fake: Images, *, weighting: Weighting = "normalised", floor: float = 1e-6
) -> Images:
    """DMD's gradient at the sample: ``(D_fake - D_real) / mean |x - D_real|`` (DMD2, Eq. 3 as released).

    The plain one is the difference alone.
    """
    if weighting == "plain":
        return fake - real
    scale = flatten_mean((x - real).abs()).clamp_min(floor)
    return (fake - real) / expand(scale, x)


def matching_loss(x: Images, gradient: Images) -> PerSample:
    """A loss per row whose gradient in ``x`` is ``gradient / pixels``: ``1/2 mean (x - sg[x - gradient])^2``."""
    return 0.5 * flatten_mean((x - (x - gradient).detach()).square())


def linearised(x: Images, pull: Pull) -> PerSample:
    """A loss per row with the given value and the given gradient in ``x``, so that one backward pass does for all."""
    return pull.losses + ((x - x.detach()) * pull.gradient).flatten(1).sum(1)


class Finite(NamedTuple):
    """A gradient without what is not a number, and the share of its rows that had to go."""

    gradient: Images
    zeroed: Float[Tensor, ""]


def finite_rows(gradient: Images) -> Finite:
    """Zero each row in which anything is infinite or not a number."""
    finite = gradient.isfinite().flatten(1).all(1)
    kept = torch.where(finite.reshape(-1, *[1] * (gradient.ndim - 1)), gradient, 0.0)
    return Finite(kept, 1 - finite.to(gradient.dtype).mean())


def clip_rows(gradient: Images, limit: float) -> Images:
    """Scale down each row whose root mean square is above a limit; 0 is no limit."""
    if not limit:
        return gradient
    size = flatten_mean(gradient.square()).sqrt()
    return gradient * expand(limit / size.clamp_min(limit), gradient)


def square_norm(gradient: Images) -> Float[Tensor, ""]:
    """Mean over rows of a gradient's squared norm."""
    return gradient.flatten(1).square().sum(1).mean()
