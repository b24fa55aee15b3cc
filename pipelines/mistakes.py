"""Mistakes in a recipe, each in a line that a person understands: which field, what was given, what is allowed."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.stages import StageConfig


def nearest(given: str, known: Any) -> str:
    """``(did you mean ...?)`` in brackets, after a space; nothing where no name is like the one that was given."""
    near = difflib.get_close_matches(given, list(known), 1, 0.5) if isinstance(known, Mapping | list) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def explain(error: dict[str, Any], values: Mapping[str, Any], root: type) -> str | None:
    """One line for a mistake; ``None`` for one that only says that another member of a union does not fit either.

    Args:
        error: as pydantic lists it.
        values: what was given.
        root: the dataclass that it should have been.
    """
    try:
        keys, owner = _locate(error["loc"], values, root)
    except _WrongName as wrong:
        return str(wrong)
    if not keys and error["loc"]:
        return None
    where = ".".join(keys)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = field_names(owner)
        return f"{where}: unknown key{nearest(keys[-1], allowed)}. Keys here: {', '.join(allowed)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{'.'.join(keys[:-1])}: holds too few values" if keys[-1].isdigit() else f"{where}: required"
    if error["type"] in ("dataclass_type", "dict_type"):
        return f"{where}: must be a mapping; given {_given(error['input'])}"
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return f"{where}: {_wanted(error)}; given {_given(error['input'])}"


def _given(value: Any) -> str:
    return "nothing" if value is None else repr(value)


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "invalid": "text",  # a key of a mapping
    "tuple": "a list",
    "list": "a list",
}
"""What a value must be, by the first word of pydantic's name of the error."""


def _wanted(error: Mapping[str, Any]) -> str:
    if error["type"] == "literal_error":
        return f"must be {error['ctx']['expected']}"
    if error["type"] in ("too_long", "too_short"):
        return f"must hold {error['ctx'].get('max_length', error['ctx'].get('min_length'))} values"
    kind = error["type"].split("_")[0]
    return f"must be {_WANTED[kind]}" if kind in _WANTED else error["msg"]


def unnamed_objectives(values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each stage whose objective does not say which it is, and would be guessed from its fields."""
    stages = values.get("stages")
    for name, stage in stages.items() if isinstance(stages, Mapping) else ():
        objective = stage.get("objective") if isinstance(stage, Mapping) else None
        if isinstance(objective, Mapping) and "name" not in objective:
            known = ", ".join(member.name for member in _members(_child(StageConfig, "objective")).values())
            yield f"stages.{name}.objective.name: required: one of {known}"


class _WrongName(Exception):
    """A mapping that names none of a union's members."""


def _locate(location: Sequence[str | int], values: Mapping[str, Any], root: type) -> tuple[list[str], Any]:
    """The dotted key of an error and the dataclass that holds its last part; no key if another member is meant."""
    keys: list[str] = []
    owner, inner, given = root, root, values
    for part in location:
        members = _members(inner)
        if part in members:
            if _chosen(given, members, keys) is not members[part]:
                return [], owner
            inner = members[part]
            continue
        plain = _plain_members(inner)
        if part == "int" and "float" in plain:  # the other member's error says it
            return [], owner
        if part == "[key]" or part in plain:
            continue
        keys.append(str(part))
        owner, inner = inner, _child(inner, str(part))
        given = given.get(str(part), {}) if isinstance(given, Mapping) else {}
    return keys, owner


def _members(kind: Any) -> dict[str | int, Any]:
    """The dataclasses of a union, by the tag that pydantic gives each in an error's location."""
    found: list[Any] = [member for member in typing.get_args(kind) if dataclasses.is_dataclass(member)]
    return {member.__name__: member for member in found}


def _plain_members(kind: Any) -> list[str]:
    """The names by which pydantic tells the members of a union such as ``int | float`` apart."""
    return [member.__name__ for member in typing.get_args(kind) if member in (int, float, str, bool)]


def _chosen(given: Any, members: Mapping[str | int, Any], keys: list[str]) -> Any:
    by_name = {member.name: member for member in members.values()}
    if not isinstance(given, Mapping) or given.get("name") not in by_name:
        name = given.get("name") if isinstance(given, Mapping) else given
        raise _WrongName(f"{'.'.join(keys)}.name: must be one of {', '.join(by_name)}; given {name!r}")
    return by_name[given["name"]]


def _child(kind: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind).get(key)
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    members = [m for m in typing.get_args(kind) if m is not types.NoneType]
    return members[0] if len(members) == 1 else None


def field_names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
