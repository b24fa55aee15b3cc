"""The kernel distance between two sets of features (KID; Binkowski et al. 2018)."""

import torch
from jaxtyping import Float64
from torch import Tensor

from hd_core.metrics.estimate import Estimate
from hd_core.metrics.statistics import Features, as_rows, check_widths


def cubic_kernel(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """``k(x, y) = (x . y / d + 1)^3`` for every pair of rows (Binkowski et al. 2018)."""
    return (x @ y.T).div_(x.shape[1]).add_(1.0).pow_(3)


def sums_between(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"], block_rows: int) -> Float64[Tensor, " m"]:
    """For each row of ``y`` the sum of its kernel with every row of ``x``."""
    return torch.stack([cubic_kernel(block, y).sum(dim=0) for block in torch.split(x, block_rows)]).sum(dim=0)


def sums_within(x: Float64[Tensor, "n d"], block_rows: int) -> Float64[Tensor, " n"]:
    """For each row the sum of its kernel with every other row; each unordered pair is computed once."""
    sums = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), block_rows):
        block, rest = x[start : start + block_rows], x[start + block_rows :]
        own, others = cubic_kernel(block, block), cubic_kernel(block, rest)
        sums[start : start + block_rows] += own.sum(dim=1) - own.diagonal() + others.sum(dim=1)
        sums[start + block_rows :] += others.sum(dim=0)
    return sums


def kernel_distance(real: Features, generated: Features, *, block_rows: int = 512) -> Estimate:
    """The unbiased estimate of the squared MMD with the cubic kernel (Gretton et al. 2012, eq. 3); can be negative.

    Every pair is used, in float64, so the result needs no random subsets and no seed. Memory is ``block_rows`` times
    the larger set, twice at the most (0.4 GB at 50,000 rows); the work runs where the features are. The interval is
    the first-order one over draws of the generated rows (Gretton et al. 2012, section 4.1); the real rows are fixed.

    Raises:
        ValueError: The widths differ, a set has fewer than two rows, or `as_rows` refuses one.
    """
    x, y = as_rows(real), as_rows(generated)
    check_widths(x.shape[1], y.shape[1])
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a kernel distance needs 2 rows of each kind, got {len(x)} real and {len(y)} generated")
    y = y.to(x.device)
    among_real = sums_within(x, block_rows).sum().item() / (len(x) * (len(x) - 1))
    towards_real, among_generated = sums_between(x, y, block_rows) / len(x), sums_within(y, block_rows) / (len(y) - 1)
    of_rows = among_generated - 2.0 * towards_real
    error = 2.0 * (among_generated - towards_real).std().item() / len(y) ** 0.5
    return Estimate.normal(among_real + of_rows.mean().item(), error)
