"""How sure a classifier is of each sample, and how evenly it names all classes (IS; Salimans et al. 2016)."""

import torch

from hd_core.metrics.estimate import Estimate
from hd_core.metrics.statistics import Features, as_rows


def inception_score(logits: Features) -> Estimate:
    """``exp(E_x KL(p(y|x) || p(y)))``, from 1 to the number of classes (Salimans et al. 2016, section 4).

    ``p(y)`` is the mean over all rows, where older code takes ten parts of 5,000 and their mean; fewer rows give less.
    The interval is the first-order one of the logarithm, to which each row adds its own divergence.

    Args:
        logits: ``(n, classes)``.

    Raises:
        ValueError: there are fewer than two rows, or `as_rows` refuses them.
    """
    rows = as_rows(logits)
    if len(rows) < 2:
        raise ValueError(f"an inception score needs at least 2 rows, got {len(rows)}")
    log_p = torch.log_softmax(rows, dim=1)
    log_mean = torch.logsumexp(log_p, dim=0) - torch.tensor(len(rows), dtype=torch.float64).log()
    divergences = (log_p.exp() * (log_p - log_mean)).sum(dim=1)
    return Estimate.log_normal(divergences.mean().exp().item(), divergences.std().item() / len(rows) ** 0.5)
