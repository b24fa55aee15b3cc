"""Every metric of some samples' features, each with its interval; what to mind when reading them."""

from typing import Any

import numpy as np
import torch

from hd_core.metrics.estimate import Estimate
from hd_core.metrics.frechet import frechet_distance, frechet_estimate
from hd_core.metrics.inception_score import inception_score
from hd_core.metrics.kernel import kernel_distance
from hd_core.metrics.prdc import precision_recall
from hd_core.metrics.statistics import Moments
from pipelines.extractor import Extractor

Estimates = dict[str, Estimate]


def measured(
    features: np.ndarray,
    extractor: Extractor,
    moments: Moments,
    real: np.ndarray | None,
    *,
    neighbours: int,
    pairs: int,
) -> Estimates:
    """FID, the inception score where the net knows classes, and what compares rows with real ones, by name.

    Args:
        features: ``(n, d)`` of samples, in the order of their ids.
        moments: what FID is against.
        real: ``(m, d)``; ``None``: only their statistics are known.
        neighbours: for precision and recall.
        pairs: rows of each side, the first ones, that are compared pair by pair.
    """
    found = {"fid": frechet_estimate(features, moments)}
    if extractor.logits:
        found["inception_score"] = inception_score(extractor.logits(torch.tensor(features)))
    return found if real is None else found | by_pairs(real[:pairs], features[:pairs], neighbours)


def told(found: Estimates) -> dict[str, Any]:
    """Values by name, and all intervals together, as plain values."""
    values = {name: estimate.value for name, estimate in found.items()}
    return {**values, "intervals": {name: [estimate.low, estimate.high] for name, estimate in found.items()}}


def by_pairs(real: np.ndarray, features: np.ndarray, neighbours: int) -> Estimates:
    """KID, precision, recall, density and coverage."""
    shares = precision_recall(real, features, neighbours=neighbours)
    names = ("precision", "recall", "density", "coverage")
    return {"kid": kernel_distance(real, features), **{name: getattr(shares, name) for name in names}}


def fid_infinity(features: np.ndarray, moments: Moments, fid: float) -> float | None:
    """FID in the limit of ever more samples (Chong & Forsyth 2020); ``None`` where there are too few to tell.

    FID's bias falls as one over the number of samples, so the limit is as far below all of them as they are below the
    mean of their two halves. Halves must have more rows than features, below which the bias follows another law.
    """
    rows, width = features.shape
    if rows // 2 <= width:
        return None
    halves = [frechet_distance(Moments.of(half), moments) for half in (features[: rows // 2], features[rows // 2 :])]
    return 2 * fid - float(np.mean(halves))


def caution(rows: int, width: int) -> str:
    """What to mind where there are fewer samples than features; empty otherwise."""
    if rows > width:
        return ""
    return (
        f"FID is of {rows:,} samples under {width:,} features, fewer samples than features: it is far above what more"
        " samples would give, and can be compared with the same number of samples only. KID has no such bias"
    )
