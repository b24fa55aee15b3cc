"""Declarations of searches; nothing here runs anything."""

from collections.abc import Callable

from tune_spaces import awd_weighting, dmd_balance, meanflow_sampler, sfd_schedule
from tune_spaces.space import Space, Values

SPACES: dict[str, Callable[[Values, str], Space]] = {
    "awd_weighting": awd_weighting.space,
    "dmd_balance": dmd_balance.space,
    "meanflow_sampler": meanflow_sampler.space,
    "sfd_schedule": sfd_schedule.space,
}
"""By name, from a recipe's plain form and the stage that is asked for (empty: the first that fits)."""
