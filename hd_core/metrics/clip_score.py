"""How well pictures fit their prompts: the CLIP score (Hessel et al. 2021)."""

import numpy as np
from jaxtyping import Float

from hd_core.metrics.estimate import Estimate


def clip_score(cosines: Float[np.ndarray, " n"]) -> Estimate:
    """``E 100 max(cos(picture, prompt), 0)``, from 0 to 100 (Hessel et al. 2021, eq. 1, with w = 100 in place of 2.5).

    Each picture's cosine is cut at 0, as in the paper. The interval is normal, by the spread over pictures.

    Args:
        cosines: ``(n,)`` of each picture's and its own prompt's embedding.

    Raises:
        ValueError: there are fewer than two, or one is not finite.
    """
    if len(cosines) < 2 or not np.isfinite(cosines).all():
        raise ValueError(f"a CLIP score needs at least 2 cosines, all finite; given {len(cosines)}")
    scores = 100 * np.maximum(cosines.astype(np.float64), 0)
    return Estimate.normal(float(scores.mean()), float(scores.std(ddof=1)) / len(scores) ** 0.5)
