"""How different the samples of one class are from each other: what a collapsing generator loses first."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def within_class_spread(samples: Float[Tensor, "n ..."], labels: Int[Tensor, " n"]) -> float:
    """Root of the mean variance of a value around its class's mean, in float64; 0 where no class has two samples.

    Half the mean squared distance between two samples of one class is their summed variance, so a generator that
    makes one picture per class has 0, and one as varied as the data has the data's own number.
    """
    flat = samples.detach().flatten(1).double().cpu()
    labels = labels.cpu()
    present = torch.bincount(labels).nonzero().flatten()
    groups = [flat[labels == label] for label in present]
    variances = [group.var(0).mean() * len(group) for group in groups if len(group) > 1]
    rows = sum(len(group) for group in groups if len(group) > 1)
    return float(torch.stack(variances).sum() / rows) ** 0.5 if variances else 0.0
