"""Numbers of a stage that change while it trains."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

Part = TypeVar("Part")
Changes = Mapping[str, float]
"""Numbers by dotted key, within a stage."""

ROOTS = ("objective", "optimizers", "ema_decay")
"""Fields of a stage below which numbers may change."""


def changed(stage: Part, changes: Changes) -> Part:
    """A stage with some of its numbers changed.

    Raises:
        ValueError: a key names no number that may change, or a value is not allowed.
    """
    for key, value in changes.items():
        if key.split(".")[0] not in ROOTS:
            raise ValueError(f"{key!r} cannot change while a stage trains; numbers of {', '.join(ROOTS)} can")
        stage = _replaced(stage, key.split("."), value, key)
    return stage


def _replaced(part: Any, keys: list[str], value: float, key: str) -> Any:
    name, *rest = keys
    known = _names(part)
    if name not in known:
        raise ValueError(f"{key!r} names no number of the stage" + (f"; there are {', '.join(known)}" if known else ""))
    inner = getattr(part, name)
    return replace(part, **{name: _replaced(inner, rest, value, key) if rest else _number(inner, value, key)})


def _names(part: object) -> list[str]:
    return [one.name for one in fields(part)] if is_dataclass(part) else []


def _number(old: Any, value: float, key: str) -> int | float:
    if isinstance(old, bool) or not isinstance(old, int | float):
        raise ValueError(f"{key!r} is no number, and numbers alone can change while a stage trains")
    if isinstance(old, int) and value != int(value):
        raise ValueError(f"{key!r} is a whole number; given {value}")
    return type(old)(value)
