"""Finds the space of a sweep: one that ships with the package, or a YAML file of one's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.artifacts import flatten
from pipelines.mistakes import nearest
from pipelines.recipe import Recipe, override, read_yaml
from pipelines.tuning.work import chained
from tune_spaces import SPACES
from tune_spaces.space import Choice, Distribution, Integer, Space, Uniform

_KEYS = ("stage", "parameters")
_PARAMETER_KEYS = ("low", "high", "log", "whole", "values")


def find_space(name_or_path: str, recipe: Recipe, stage: str) -> Space:
    """The space of a name, or of a YAML file such as this one::

        stage: refine
        parameters:
          stages.refine.objective.adversarial.weight: {low: 0.01, high: 1.0, log: true}
          stages.refine.objective.update_ratio: {low: 1, high: 5, whole: true}
          stages.refine.discriminator.arm: {values: [adaptive, pooled]}

    Raises:
        ValueError: there is no such space, it does not fit the recipe, or it changes what the recipe does not have.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        space = _of_file(path, recipe, stage)
    elif name_or_path in SPACES:
        space = SPACES[name_or_path](recipe.to_dict(), stage)
    else:
        raise ValueError(
            f"unknown space {name_or_path!r}{nearest(name_or_path, SPACES)}. Known: {', '.join(SPACES)}; a space of"
            " your own is named by its path, ending in .yaml"
        )
    _check(space, recipe, name_or_path)
    return space


def _check(space: Space, recipe: Recipe, source: str) -> None:
    """See that what the space changes is there, before any trial is."""
    trained = chained(recipe, space.stage)
    left_out = [repr(name) for name in recipe.stages if name not in trained.stages]
    for values in [*space.baselines.values(), *(space.draw(f"check-{number}") for number in range(3))]:
        try:
            override(trained, space.overrides(values))
        except ValueError as error:
            without = " (what does not lead to the stage that is scored is left out)"
            about_those = any(name in str(error) for name in left_out)
            raise ValueError(
                f"space {source} does not fit the recipe: {error}{without if about_those else ''}"
            ) from None


def _of_file(path: Path, recipe: Recipe, asked: str) -> Space:
    values = read_yaml(path, "space file", _KEYS)
    if set(values) - set(_KEYS) or not isinstance(values.get("parameters"), Mapping) or not values["parameters"]:
        raise ValueError(f"space file {path} holds stage and parameters, and nothing else; given {', '.join(values)}")
    parameters: Mapping[str, Any] = values["parameters"]
    stage = asked or str(values.get("stage") or "") or list(recipe.stages)[-1]
    recipe.require_stage(stage)
    own = flatten(recipe.to_dict())
    return Space(
        stage=stage,
        parameters={key: _distribution(path, key, given) for key, given in parameters.items()},
        changes=dict,
        baselines={"hand-set": {}},
        in_parameters=lambda given: given or {key: own[key] for key in parameters if key in own},
    )


def _distribution(path: Path, key: str, given: Any) -> Distribution:
    known = isinstance(given, Mapping) and set(given) <= set(_PARAMETER_KEYS)
    try:
        if known and set(given) == {"values"}:
            return Choice(values=list(given["values"]))
        if known and {"low", "high"} <= set(given) and "values" not in given:
            low, high = given["low"], given["high"]
            if given.get("whole"):
                return Integer(low=int(low), high=int(high))
            return Uniform(low=float(low), high=float(high), log=bool(given.get("log")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"space file {path}: {key}: {error}") from None
    raise ValueError(
        f"space file {path}: {key} must be {{low: NUMBER, high: NUMBER}}, with log: true or whole: true where that is"
        f" meant, or {{values: [...]}}; given {given!r}"
    )
