"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), in one pass.

All work is in float64: ``|x|^2 + |y|^2 - 2 x.y`` is a matrix product, but it cancels, and in float32 any
distance below about a thousandth of a row's norm would be rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from hd_core.metrics.statistics import Features, as_rows, check_widths

TIE = 1e-12
"""Share of the mean squared norm within which a point counts as on a ball's surface, so that copies of a point tie."""


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """How alike two sets of features are, without one number for both faults."""

    precision: float
    """Share of generated rows inside some real ball."""
    recall: float
    """Share of real rows inside some generated ball."""
    density: float
    """Real balls around a generated row, over ``neighbours``, on average; can exceed 1."""
    coverage: float
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


def _compare(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"], neighbours: int, block_rows: int) -> PrecisionRecall:
    real_radii, generated_radii = (squared_radii(rows, neighbours, block_rows) for rows in (x, y))
    real_balls_around = torch.zeros(len(y), dtype=torch.int64, device=x.device)
    recalled = covered = 0
    for block, radii in zip(torch.split(x, block_rows), torch.split(real_radii, block_rows), strict=True):
        distances = squared_distances(block, y)
        inside_real = distances <= radii[:, None]
        real_balls_around += inside_real.sum(dim=0)
        covered += int(inside_real.any(dim=1).sum())
        recalled += int((distances <= generated_radii).any(dim=1).sum())
    return PrecisionRecall(
        precision=(real_balls_around > 0).double().mean().item(),
        recall=recalled / len(x),
        density=real_balls_around.double().mean().item() / neighbours,
        coverage=covered / len(x),
    )
