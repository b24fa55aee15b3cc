"""The Frechet distance between two Gaussians fitted to features (FID; Heusel et al. 2017, eq. 6)."""

import numpy as np
import torch
from jaxtyping import Float64

from hd_core.metrics.estimate import Estimate
from hd_core.metrics.statistics import Features, Moments, as_rows, check_widths


def frechet_distance(a: Moments, b: Moments) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 sqrt(S_a S_b))``, in squared feature units (Dowson & Landau 1982).

    Exact for singular covariances too. Not clamped: identical inputs give zero to rounding, on either side. The root's
    trace is the sum of the singular values of ``F_a^T F_b``: those are the square roots of the eigenvalues of
    ``sqrt(S_a) S_b sqrt(S_a)``, found without squaring them first, which keeps the small ones accurate (for ``a = b``
    the result is the trace of ``S_a`` to rounding).

    Raises:
        ValueError: The widths differ, or one of the two has fewer than two rows.
    """
    product = _product(a, b)
    roots = np.linalg.svd(product, compute_uv=False) if product.size else np.zeros(0)
    return _distance(a, b, roots)


def frechet_estimate(features: Features, reference: Moments) -> Estimate:
    """The distance of the Gaussian fitted to some rows, with its interval over draws of as many rows.

    The interval is the first-order one: what each row adds to the distance (`influences`), over the root of their
    number. It holds the distance's mean at this number of rows, which lies above the limit of ever more rows.

    Raises:
        ValueError: As in `frechet_distance`, or `as_rows` refuses the rows.
    """
    moments = Moments.of(features)
    _, roots, right = np.linalg.svd(_product(moments, reference), full_matrices=False)
    kept = roots > len(roots) * np.finfo(np.float64).eps * roots.max(initial=0.0)  # others are rounding
    effects = influences(features, moments, reference, right[kept].T / np.sqrt(roots[kept]))
    return Estimate.normal(_distance(moments, reference, roots), float(effects.std(ddof=1)) / len(effects) ** 0.5)


def influences(
    features: Features, moments: Moments, reference: Moments, whitening: Float64[np.ndarray, "k r"]
) -> Float64[np.ndarray, " n"]:
    """First-order effect of each row on the distance, up to a constant.

    With ``z`` a row without the mean it is ``2 (m - m_ref) z + z^T (I - T) z``, where ``T`` is the matrix of the
    optimal transport from the fitted Gaussian to the reference, ``F (F^T S F)^(-1/2) F^T``.
    """
    rows = as_rows(features)
    z = rows - torch.as_tensor(moments.mean, device=rows.device)
    transported = z @ torch.as_tensor(reference.factor @ whitening, device=rows.device)
    shift = torch.as_tensor(2.0 * (moments.mean - reference.mean), device=rows.device)
    return (z @ shift + z.square().sum(1) - transported.square().sum(1)).cpu().numpy()


def _product(a: Moments, b: Moments) -> Float64[np.ndarray, "i j"]:
    check_widths(a.width, b.width)
    return a.factor.T @ b.factor


def _distance(a: Moments, b: Moments, roots: Float64[np.ndarray, " r"]) -> float:
    shift = a.mean - b.mean
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    return float(shift @ shift) + traces - 2.0 * float(roots.sum())
