"""When a stage is collapsing: the signs, their limits, and the rule that stops it with the sign's name."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Logged = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """Limits past which a training is taken to be collapsing; a limit of 0 is not looked at."""

    enabled: bool = True
    """Whether the rule may stop the stage."""
    patience: int = 5
    """Logged points in a row that must be past a limit (one suffices for what a probe measures)."""
    min_diversity: float = 0.5
    """Least spread within a class, as a share of the highest that the stage has had; needs probes."""
    max_logit_gap: float = 50.0
    """Greatest distance between the mean logits of real and fake: the discriminator has run away."""
    min_token_entropy: float = 0.02
    """Least entropy of the token weights: below it the discriminator looks at a single token."""
    max_gradient_growth: float = 100.0
    """Greatest gradient norm of the student, as a multiple of the median so far."""
    max_fake_score_lag: float = 1.0
    """Greatest lag of the fake score: its loss over that of a converged one, minus 1; needs probes that measure it."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1; given {self.patience}")
        limits = ("min_diversity", "max_logit_gap", "min_token_entropy", "max_gradient_growth", "max_fake_score_lag")
        for name in limits:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; 0 switches it off; given {getattr(self, name)}")


class Collapsed(FloatingPointError):
    """A stage was stopped because it was collapsing; the message names the sign."""


class StopRule:
    """Watches the logged points of one stage, in order."""

    def __init__(self, config: StopConfig) -> None:
        self.config = config
        self._past: dict[str, int] = {}
        self._best_diversity = 0.0
        self._norms: deque[float] = deque(maxlen=200)

    def see(self, values: Logged) -> str | None:
        """What is wrong, in words, once it has been wrong for long enough."""
        found = None
        for sign, text in self._signs(values):
            wrong = text is not None
            self._past[sign] = self._past.get(sign, 0) + 1 if wrong else 0
            needed = 1 if sign in ("diversity", "lag") else self.config.patience
            if wrong and self._past[sign] >= needed and found is None:
                found = text
        return found if self.config.enabled else None

    def _signs(self, values: Logged) -> Iterator[tuple[str, str | None]]:
        """Each sign that the point tells of, and what is wrong with it."""
        looks: dict[str, tuple[str, Callable[[float], str | None]]] = {
            "diversity": ("probe/diversity", self._diversity),
            "lag": ("probe/fake_score_lag", self._lag),
            "entropy": ("token_entropy", self._entropy),
            "norm": ("gradient_norm/student", self._norm),
        }
        for sign, (key, look) in looks.items():
            if key in values:
                yield sign, look(values[key])
        if "real_logit" in values and "fake_logit" in values:
            yield "gap", self._gap(values["real_logit"], values["fake_logit"])

    def _diversity(self, value: float) -> str | None:
        self._best_diversity = max(self._best_diversity, value)
        if value >= self.config.min_diversity * self._best_diversity:
            return None
        return (
            f"samples of one class have become alike: their spread is {value:.2f} of the data's, after"
            f" {self._best_diversity:.2f}. A smaller adversarial.weight, or a smaller guidance_scale, usually helps"
        )

    def _lag(self, value: float) -> str | None:
        if not self.config.max_fake_score_lag or value <= self.config.max_fake_score_lag:
            return None
        return (
            f"the fake score lags behind the generator: its loss is {1 + value:.2f} times a converged one's. A larger"
            " update_ratio, or a larger learning rate of fake_score, usually helps"
        )

    def _entropy(self, value: float) -> str | None:
        if value >= self.config.min_token_entropy:
            return None
        return (
            f"the discriminator looks at a single token: the entropy of its weights is {value:.3f} of the highest. A"
            " larger discriminator.temperature helps"
        )

    def _norm(self, value: float) -> str | None:
        middle = sorted(self._norms)[len(self._norms) // 2] if len(self._norms) >= 10 else float("inf")
        limit = self.config.max_gradient_growth
        if limit and value > limit * middle:
            return f"the student's gradient norm is {value:.3g}, after a median of {middle:.3g}: set max_grad_norm"
        self._norms.append(value)
        return None

    def _gap(self, real: float, fake: float) -> str | None:
        limit = self.config.max_logit_gap
        if not limit or real - fake <= limit:
            return None
        return (
            f"the discriminator has run away: its mean logit is {real:.1f} on real and {fake:.1f} on fake images. Use"
            " spectral_norm, r1_weight, or look at noisier images (adversarial.time_mean)"
        )
