"""The Frechet distance between two Gaussians fitted to features (FID; Heusel et al. 2017, eq. 6)."""

import numpy as np
from jaxtyping import Float64

from hd_core.metrics.statistics import Matrix, Moments, check_widths


def covariance_factor(covariance: Matrix) -> Float64[np.ndarray, "d k"]:
    """``F`` of shape ``(d, rank)`` with ``F F^T = covariance``, by a symmetric eigendecomposition.

    Directions whose variance is rounding (numpy's rank tolerance) are left out: the square root would lift an error
    of 1e-16 to 1e-8, once for each missing row when there are fewer rows than features.
    """
    variances, directions = np.linalg.eigh(covariance)
    kept = variances > len(variances) * np.finfo(np.float64).eps * variances[-1]
    return directions[:, kept] * np.sqrt(variances[kept])


def trace_of_root_product(a: Matrix, b: Matrix) -> float:
    """``tr sqrt(sqrt(a) b sqrt(a))``: the sum of the singular values of ``F_a^T F_b``.

    Those are the square roots of the eigenvalues of ``sqrt(a) b sqrt(a)``, found without squaring them first, which
    keeps the small ones accurate (for ``a = b`` the result is the trace of ``a`` to rounding).
    """
    product = covariance_factor(a).T @ covariance_factor(b)
    return float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0


def frechet_distance(a: Moments, b: Moments) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 sqrt(S_a S_b))``, in squared feature units (Dowson & Landau 1982).

    Exact for singular covariances too. Not clamped: identical inputs give zero to rounding, on either side.

    Raises:
        ValueError: The widths differ, or one of the two has fewer than two rows.
    """
    check_widths(a.width, b.width)
    shift = a.mean - b.mean
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    return float(shift @ shift) + traces - 2.0 * trace_of_root_product(a.covariance, b.covariance)
