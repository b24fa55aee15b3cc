"""Mean and covariance of features as float64 sums that merge: one worker and sixty-four agree to rounding."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

Features = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
Vector = Float64[np.ndarray, " d"]
Matrix = Float64[np.ndarray, "d d"]


def as_rows(features: Features) -> Float64[Tensor, "n d"]:
    """Features of shape ``(n, d)`` in float64, on the device where they are.

    Raises:
        ValueError: The features are not two-dimensional, have no columns, or hold a NaN or an infinity.
    """
    # torch.tensor copies: sharing the read-only arrays of Ray's object store would make torch warn.
    rows = features.detach() if isinstance(features, Tensor) else torch.tensor(features)
    rows = rows.to(torch.float64)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"features have shape {tuple(rows.shape)}; they must be (rows, width), width at least 1")
    broken = int((~rows.isfinite().all(dim=1)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(rows)} feature rows hold a NaN or an infinity")
    return rows


def check_widths(first: int, second: int) -> None:
    """Raise a ``ValueError`` unless two sets of features have one width."""
    if first != second:
        raise ValueError(f"features of width {first} and of width {second} cannot be compared or merged")


@dataclass(frozen=True, eq=False)
class Moments:
    """How many features were seen, their mean, and their scatter about it: all that a Frechet distance needs."""

    count: int
    """Rows seen."""
    mean: Vector
    """Mean feature, shape ``(d,)``; zero when no row was seen."""
    scatter: Matrix
    """Sum over rows of ``(x - mean)(x - mean)^T``, shape ``(d, d)``."""

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.scatter.shape != 2 * self.mean.shape:
            raise ValueError(f"mean {self.mean.shape} and scatter {self.scatter.shape} must be (d,) and (d, d)")

    @classmethod
    def empty(cls, width: int) -> Self:
        """The moments of no rows at all; merging them changes nothing."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, features: Features) -> Self:
        """The moments of one batch of features; ``ValueError`` as in `as_rows`."""
        rows = as_rows(features)
        mean = rows.sum(dim=0) / max(len(rows), 1)
        centred = rows - mean
        return cls(len(rows), mean.cpu().numpy(), (centred.T @ centred).cpu().numpy())

    @property
    def width(self) -> int:
        """Numbers in one feature row."""
        return len(self.mean)

    @property
    def covariance(self) -> Matrix:
        """The unbiased covariance, ``scatter / (count - 1)``; ``ValueError`` for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature rows, got {self.count}")
        return self.scatter / (self.count - 1)

    @cached_property
    def factor(self) -> Float64[np.ndarray, "d k"]:
        """``F`` of shape ``(d, rank)`` with ``F F^T`` the covariance, by a symmetric eigendecomposition, done once.

        Directions whose variance is rounding (numpy's rank tolerance) are left out: the square root would lift an
        error of 1e-16 to 1e-8, once for each missing row when there are fewer rows than features.
        """
        variances, directions = np.linalg.eigh(self.covariance)
        kept = variances > len(variances) * np.finfo(np.float64).eps * variances[-1]
        return directions[:, kept] * np.sqrt(variances[kept])

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together (the pairwise update of Chan, Golub & LeVeque 1983).

        Raises:
            ValueError: The two have different widths.
        """
        check_widths(self.width, other.width)
        count = self.count + other.count
        share = other.count / max(count, 1)
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * share)
        return Moments(count, self.mean + shift * share, scatter)


def merge_in_order(parts: Iterable[Moments]) -> Moments:
    """Merge from first to last: the same parts in the same order give the same bits.

    Raises:
        ValueError: There are no parts, or their widths differ.
    """
    iterator = iter(parts)
    total = next(iterator, None)
    if total is None:
        raise ValueError("there are no moments to merge")
    for part in iterator:
        total = total.merged(part)
    return total
