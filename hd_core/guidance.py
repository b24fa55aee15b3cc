"""Classifier-free guidance (Ho & Salimans 2022): a velocity in, a velocity out; or a flow map in, a flow map out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hd_core.types import Condition, FlowMap, Images, Velocity


def branches(scale: float) -> int:
    """Network calls that one guided velocity costs: scale 1 needs no unconditional one."""
    return 1 if scale == 1 else 2


def guided(velocity: Velocity, null_condition: Condition | None, scale: float) -> Velocity:
    """Guide a velocity: ``v_null + scale (v_condition - v_null)``; one doubled call.

    ``null_condition`` holds one row, which stands for every row. Scale 1 is the velocity itself, untouched.

    Raises:
        ValueError: the scale is not 1 and there is no null condition.
    """
    return _guided(velocity, null_condition, scale)


def guided_map(student: FlowMap, null_condition: Condition | None, scale: float) -> FlowMap:
    """Guide a student's mean velocity in the same way: what SFD does with one that was distilled at scale 1.

    Raises:
        ValueError: the scale is not 1 and there is no null condition.
    """
    return _guided(student, null_condition, scale)


def _guided(network: Callable[..., Images], null_condition: Condition | None, scale: float) -> Callable[..., Images]:
    if branches(scale) == 1:
        return network
    if null_condition is None:
        raise ValueError(f"guidance at scale {scale} needs a null condition, and this teacher has none; use scale 1")

    def guided_network(x_t: Images, *rest: Any) -> Images:
        *times, condition = rest
        null = null_condition.to(x_t.device).map(lambda row: row.expand(len(x_t), *row.shape[1:]))
        null = replace(null, steps=condition.steps)
        both = network(torch.cat([x_t, x_t]), *(torch.cat([t, t]) for t in times), condition.joined(null))
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided_network
