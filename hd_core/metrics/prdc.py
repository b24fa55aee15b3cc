"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), in one pass.

All work is in float64: ``|x|^2 + |y|^2 - 2 x.y`` is a matrix product, but it cancels, and in float32 any
distance below about a thousandth of a row's norm would be rounding.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from hd_core.metrics.estimate import Estimate
from hd_core.metrics.statistics import Features, as_rows, check_widths

TIE = 1e-12
"""Share of the mean squared norm within which a point counts as on a ball's surface, so that copies of a point tie."""


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """How alike two sets of features are, without one number for both faults.

    The intervals are over draws of the generated rows. Those of recall and coverage are a jackknife's: how many real
    rows or balls would no longer count without one generated row, the generated balls' radii being fixed.
    """

    precision: Estimate
    """Share of generated rows inside some real ball."""
    recall: Estimate
    """Share of real rows inside some generated ball."""
    density: Estimate
    """Real balls around a generated row, over ``neighbours``, on average; can exceed 1."""
    coverage: Estimate
    """Share of real balls with a generated row inside."""


def squared_distances(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """``|x - y|^2`` for every pair of rows; a rounding error may make it slightly negative."""
    norms = y.square().sum(dim=1)
    return torch.addmm(norms, x, y.T, alpha=-2.0).add_(x.square().sum(dim=1, keepdim=True))


def squared_radii(x: Float64[Tensor, "n d"], neighbours: int, block_rows: int) -> Float64[Tensor, " n"]:
    """Squared distance of each row to its ``neighbours``-th nearest other row (Kynkaanniemi et al. 2019, eq. 1)."""
    radii = list[Tensor]()
    for start in range(0, len(x), block_rows):
        distances = squared_distances(x[start : start + block_rows], x)
        distances.diagonal(start).fill_(torch.inf)
        radii.append(distances.topk(neighbours, dim=1, largest=False).values[:, -1])
    return torch.cat(radii) + TIE * x.square().sum(dim=1).mean()


def precision_recall(
    real: Features, generated: Features, *, neighbours: int = 5, block_rows: int = 512
) -> PrecisionRecall:
    """Precision and recall (Kynkaanniemi et al. 2019, eqs. 1-2), density and coverage (Naeem et al. 2020).

    A row's ball reaches to its ``neighbours``-th nearest row of the same set, itself left out, surface included. The
    numbers depend on both counts: compare only runs with the same ones. Memory is ``block_rows`` times the larger set,
    about twice (0.4 GB at 50,000 rows); the work runs where the real features are.

    Raises:
        ValueError: The widths differ, a set has no more than ``neighbours`` rows, or `as_rows` refuses one.
    """
    x, y = as_rows(real), as_rows(generated)
    check_widths(x.shape[1], y.shape[1])
    if not 1 <= neighbours < min(len(x), len(y)):
        raise ValueError(
            f"neighbours is {neighbours}; with {len(x)} real and {len(y)} generated rows it must be at least 1 and"
            f" less than {min(len(x), len(y))}"
        )
    centre = x.mean(dim=0)
    return _compare(x - centre, y.to(x.device) - centre, neighbours, block_rows)


class _Hits:
    """Which real rows are hit by some generated row, and by which one alone."""

    def __init__(self, generated: int, device: torch.device) -> None:
        self._alone = torch.zeros(generated, dtype=torch.int64, device=device)
        self._seen = self._hit = 0

    def see(self, hits: Bool[Tensor, "n m"]) -> None:
        """Some real rows, each with the generated rows that hit it."""
        times = hits.sum(dim=1)
        self._alone += hits[times == 1].sum(dim=0)
        self._seen += len(hits)
        self._hit += int((times > 0).sum())

    def share(self) -> Estimate:
        """Real rows that are hit, over all."""
        losses = self._alone.double() / self._seen
        error = ((losses - losses.mean()).square().sum() * (1 - 1 / len(losses))).sqrt().item()
        found = Estimate.normal(self._hit / self._seen, error)
        return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def _compare(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"], neighbours: int, block_rows: int) -> PrecisionRecall:
    real_radii, generated_radii = (squared_radii(rows, neighbours, block_rows) for rows in (x, y))
    real_balls_around = torch.zeros(len(y), dtype=torch.int64, device=x.device)
    recalled, covered = _Hits(len(y), x.device), _Hits(len(y), x.device)
    for block, radii in zip(torch.split(x, block_rows), torch.split(real_radii, block_rows), strict=True):
        distances = squared_distances(block, y)
        inside_real = distances <= radii[:, None]
        real_balls_around += inside_real.sum(dim=0)
        covered.see(inside_real)
        recalled.see(distances <= generated_radii)
    densities = real_balls_around.double() / neighbours
    return PrecisionRecall(
        precision=Estimate.share(int((real_balls_around > 0).sum()), len(y)),
        recall=recalled.share(),
        density=Estimate.normal(densities.mean().item(), densities.std().item() / len(y) ** 0.5),
        coverage=covered.share(),
    )
