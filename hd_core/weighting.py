"""The adaptive weight of a squared error (Geng et al. 2025, MeanFlow, section 4.3)."""

from hd_core.types import PerSample


def adaptive(error: PerSample, *, power: float, constant: float) -> PerSample:
    """Each row's error divided by its own ``(error + constant)^power``, which is not differentiated.

    Power 0 leaves the error as it is; at power 1 every row with an error well above the constant pulls alike.
    """
    return error / (error.detach() + constant) ** power if power else error


def require_adaptive(*, power: float, constant: float) -> None:
    """Raises ValueError where a power and a constant make no weight."""
    if not (power >= 0 and constant > 0):
        raise ValueError(f"power must be >= 0 and constant > 0; given {power} and {constant}")
