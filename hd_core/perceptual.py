"""Perceptual distance: how far two images are apart in the activations of a network that has learned to see."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hd_core.types import PerSample

Activations = Sequence[Float[Tensor, "b c h w"]]


def perceptual_distance(activations: Activations, others: Activations) -> PerSample:
    """LPIPS with equal weights (Zhang et al. 2018, Eq. 1): one number a row.

    Activations of each layer are normalised over channels at every position; their squared differences are summed over
    channels, averaged over positions, and summed over layers.
    """
    layers = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).flatten(1).mean(1)
        for a, b in zip(activations, others, strict=True)
    ]
    return torch.stack(layers).sum(0)
