"""Classifier-free guidance (Ho & Salimans 2022): a velocity in, a velocity out."""

import torch

from hd_core.types import Condition, Images, Times, Velocity


def branches(scale: float) -> int:
    """Network calls that one guided velocity costs: scale 1 needs no unconditional one."""
    return 1 if scale == 1 else 2


def guided(velocity: Velocity, null_condition: Condition | None, scale: float) -> Velocity:
    """Guide a velocity: ``v_null + scale (v_condition - v_null)``; one doubled call.

    ``null_condition`` holds one row, which stands for every row. Scale 1 is the velocity itself, untouched.
    """
    if branches(scale) == 1:
        return velocity
    if null_condition is None:
        raise ValueError(f"guidance at scale {scale} needs a null condition, and this teacher has none; use scale 1")

    def guided_velocity(x_t: Images, t: Times, condition: Condition) -> Images:
        null = null_condition.to(x_t.device).map(lambda row: row.expand(len(x_t), *row.shape[1:]))
        both = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), condition.joined(null))
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided_velocity
