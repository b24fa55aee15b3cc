"""A metric with the interval in which it would lie for other samples of the same generator."""

from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist
from typing import Self

LEVEL = 0.95
"""Share of the draws of samples for which an interval holds the metric's mean over draws."""
_DEVIATIONS = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""The normal distribution has this level within so many standard deviations."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its interval of level `LEVEL`."""

    value: float
    low: float
    high: float

    @classmethod
    def normal(cls, value: float, error: float) -> Self:
        """Of an estimate that is normally distributed with some standard error."""
        return cls(value=value, low=value - _DEVIATIONS * error, high=value + _DEVIATIONS * error)

    @classmethod
    def log_normal(cls, value: float, error: float) -> Self:
        """Of a positive estimate whose logarithm has some standard error."""
        return cls(value=value, low=exp(log(value) - _DEVIATIONS * error), high=exp(log(value) + _DEVIATIONS * error))

    @classmethod
    def share(cls, hits: int, count: int) -> Self:
        """Of a share, by Wilson (1927): within 0 and 1, and not empty where all or none hit."""
        share, spread = hits / count, _DEVIATIONS**2 / count
        centre = (share + spread / 2) / (1 + spread)
        half = sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
        return cls(value=share, low=min(share, centre - half), high=max(share, centre + half))
