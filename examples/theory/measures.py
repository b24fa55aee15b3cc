"""How near a cloud of points is to the target, and which of its modes it has lost."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from examples.theory.target import RingOfRings

REACH = 3.0  # standard deviations; holds 98.9 % of a mode's mass in two dimensions
DUE = 0.5  # of the due mass; a ring filled evenly, no mode of it resolved, passes: it gives each two thirds


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one generator."""

    sliced_w2: float
    """Sliced Wasserstein-2 distance to independent data."""
    coarse_recall: float
    """Share of clusters that get at least half of their due mass inside their small ring's outer edge."""
    fine_recall: float
    """Share of modes that get at least half of their due mass within three std."""
    precision: float
    """Share of points within three std of a mode."""
    endpoint_rmse: float
    """Root mean square distance to the exact flow's end from the same noise."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(points: Tensor, target: RingOfRings, data: Tensor, ends: Tensor) -> Measures:
    """Everything at once. ``points``, ``data`` and ``ends`` are ``(rows, 2, 1, 1)``, as many of each."""
    flat = points.flatten(1).to(target.dtype)
    edge = target.mode_radius + REACH * target.std
    clusters, _ = _hits(flat, cluster_middles(target), edge)
    modes, precision = _hits(flat, target.means, REACH * target.std)
    rmse = (points - ends).square().flatten(1).sum(1).mean().sqrt().item()
    return Measures(
        sliced_w2=sliced_w2(flat, data.flatten(1).to(flat)),
        coarse_recall=_recall(clusters, len(flat)),
        fine_recall=_recall(modes, len(flat)),
        precision=precision,
        endpoint_rmse=rmse,
    )


def cluster_middles(target: RingOfRings) -> Tensor:
    """Where the clusters are, ``(clusters, 2)``."""
    return target.means.unflatten(0, (target.clusters, target.modes)).mean(1)


def _hits(points: Tensor, middles: Tensor, reach: float) -> tuple[Tensor, float]:
    """Points within reach of each middle that is their nearest, and the share of points within reach of one."""
    distance, nearest = torch.cdist(points, middles).min(1)
    near = distance <= reach
    return torch.bincount(nearest[near], minlength=len(middles)), near.double().mean().item()


def _recall(hits: Tensor, rows: int) -> float:
    return (hits >= DUE * rows / len(hits)).double().mean().item()


def sliced_w2(points: Tensor, data: Tensor, directions: int = 64) -> float:
    """Root of the mean squared one-dimensional Wasserstein-2 distance over evenly spread directions of the plane."""
    angles = torch.arange(directions, dtype=points.dtype) * (math.pi / directions)
    axes = torch.stack([angles.cos(), angles.sin()])
    return ((points @ axes).sort(0).values - (data @ axes).sort(0).values).square().mean().sqrt().item()
