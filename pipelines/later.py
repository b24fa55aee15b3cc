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
    """A stage with some of its numbers changed, all at once: of several that are checked together, none comes first.

    Raises:
        ValueError: a key names no number that may change, or a value is not allowed.
    """
    for key in changes:
        if key.split(".")[0] not in ROOTS:
            raise ValueError(f"{key!r} cannot change while a stage trains; numbers of {', '.join(ROOTS)} can")
    return _replaced(stage, {key: (key, value) for key, value in changes.items()})


def _replaced(part: Any, changes: Mapping[str, tuple[str, float]]) -> Any:
    """A part with changes by their keys below it, each with its whole key."""
    below: dict[str, dict[str, tuple[str, float]]] = {}
    for key, told in changes.items():
        name, _, rest = key.partition(".")
        below.setdefault(name, {})[rest] = told
    known = _names(part)
    if unknown := [told for name, inner in below.items() if name not in known for told in inner.values()]:
        there = f"; there are {', '.join(known)}" if known else ""
        raise ValueError(f"{unknown[0][0]!r} names no number of the stage{there}")
    return replace(part, **{name: _new(getattr(part, name), inner) for name, inner in below.items()})


def _new(old: Any, changes: Mapping[str, tuple[str, float]]) -> Any:
    return _number(old, *changes[""]) if "" in changes else _replaced(old, changes)


def _names(part: object) -> list[str]:
    return [one.name for one in fields(part)] if is_dataclass(part) else []


def _number(old: Any, key: str, value: float) -> int | float:
    if isinstance(old, bool) or not isinstance(old, int | float):
        raise ValueError(f"{key!r} is no number, and numbers alone can change while a stage trains")
    if isinstance(old, int) and value != int(value):
        raise ValueError(f"{key!r} is a whole number; given {value}")
    return type(old)(value)
